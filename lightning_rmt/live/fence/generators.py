"""The global random generators of torch, NumPy and Python."""

from __future__ import annotations

import random
from contextlib import ExitStack

import numpy as np
import torch

from lightning_rmt.live.fence.enclosure import Enclosure


def randomness(enclosure: Enclosure, undo: ExitStack) -> None:
    """Keep the state of the generators that a step can draw from, and seed them.

    Of the accelerators only the one that the module trains on: asking every visible device for its state starts a
    context on each and fails in forked processes. For the same reason not `torch.manual_seed`, which seeds all of them.
    """
    undo.callback(random.setstate, random.getstate())
    undo.callback(np.random.set_state, np.random.get_state())
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    device = enclosure.device
    if device.type in ("cuda", "xpu"):
        accelerator = torch.get_device_module(device)
        undo.callback(accelerator.set_rng_state, accelerator.get_rng_state(device), device)
    elif device.type == "mps":
        undo.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
    seed_generators(enclosure.seed, device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds what a step on this device can draw from; for the inside of a fence, which puts it all back."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "xpu"):
        accelerator = torch.get_device_module(device)
        with accelerator.device(device):
            accelerator.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
