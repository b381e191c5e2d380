"""Evaluating the same random loss twice: the state of every random number generator that a loss may use."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomState:
    """The global random number generators (torch, NumPy, Python) as they were when this was made.

    Dropout masks, mix-up coefficients and the like then are the same in every evaluation under `replay`. A
    generator that the loss owns itself is out of reach.

    Args:
        devices: accelerators whose generators count too; other accelerators are left alone.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = sorted({d for d in devices if d.type in ("cuda", "xpu")}, key=str)
        self._state = self._read()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Starts from the recorded state, and puts everything back on leaving."""
        outside = self._read()
        self._write(self._state)
        try:
            yield
        finally:
            self._write(outside)

    def restore(self) -> None:
        """Puts the recorded state back for good."""
        self._write(self._state)

    def _read(self) -> tuple[Any, ...]:
        accelerators = [torch.get_device_module(d).get_rng_state(d) for d in self._devices]
        return torch.get_rng_state(), accelerators, np.random.get_state(), random.getstate()

    def _write(self, state: tuple[Any, ...]) -> None:
        cpu, accelerators, numpy_state, python_state = state
        torch.set_rng_state(cpu)
        for device, accelerator in zip(self._devices, accelerators, strict=True):
            torch.get_device_module(device).set_rng_state(accelerator, device)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
