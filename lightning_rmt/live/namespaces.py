"""Lightning ships under two names, ``lightning.pytorch`` and ``pytorch_lightning``, with classes that don't know each other.

A callback that derives from both is accepted by both Trainers and both LightningCLIs, and an exception that derives from
both is caught as either.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMESPACES = (
    ("pytorch_lightning", "lightning_fabric"),
    ("lightning.pytorch", "lightning.fabric"),
)


def _installed(module: str, attribute: str) -> type | None:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        return None


def callback_bases() -> tuple[type, ...]:
    """The ``Callback`` class of every installed namespace; at least one.

    Raises:
        ImportError: neither pytorch-lightning nor lightning is installed.
    """
    found = [_installed(package, "Callback") for package, _ in _NAMESPACES]
    bases = tuple(base for base in found if base is not None)
    if not bases:
        raise ImportError("SpectrumMonitor needs pytorch-lightning or lightning: pip install pytorch-lightning")
    return bases


def timer_classes() -> tuple[Any, ...]:
    """The ``Timer`` callback of every installed namespace: what a Trainer keeps its ``max_time`` in."""
    found = [_installed(f"{package}.callbacks", "Timer") for package, _ in _NAMESPACES]
    return tuple(timer for timer in found if timer is not None)


_misconfiguration = [
    _installed(f"{fabric}.utilities.exceptions", "MisconfigurationException") for _, fabric in _NAMESPACES
]


class MisconfigurationException(*[base for base in _misconfiguration if base is not None]):  # type: ignore[misc]
    """The Trainer and the callback don't fit together; an instance of each namespace's exception of this name."""
