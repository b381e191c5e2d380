"""An optimizer's weights and state before a step, to be put back bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Where heavy-ball momentum is kept, as in torch's SGD.
HEAVY_BALL = "momentum_buffer"
#: Names under which optimizers keep their first moment.
MOMENTUM_KEYS = (HEAVY_BALL, "exp_avg", "momentum")


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter of every group, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Snapshot:
    """Weights, and perhaps ``optimizer.state``, as they are when this is made.

    What an optimizer keeps elsewhere, in attributes of its own, isn't seen.

    Args:
        optimizer: whose.
        state: also copy its state; needed where a step may be undone.

    Attributes:
        weights: clones, in the order of `optimizer_parameters`.
        momenta: the momentum buffers likewise, None for a parameter without one.
    """

    def __init__(self, optimizer: Optimizer, *, state: bool) -> None:
        self._optimizer = optimizer
        self.weights = [p.detach().clone() for p in optimizer_parameters(optimizer)]
        self.momenta = [_copied(buffer) for buffer in momentum_buffers(optimizer)]
        self._state = {key: _copied(entry) for key, entry in optimizer.state.items()} if state else None

    @torch.no_grad()
    def restore(self) -> None:
        """Puts weights and state back, into the same tensors."""
        for p, before in zip(optimizer_parameters(self._optimizer), self.weights, strict=True):
            p.copy_(before)
        if self._state is not None:
            _put_back(self._optimizer.state, self._state)


def momentum_buffers(optimizer: Optimizer) -> list[Tensor | None]:
    """``state[p]["momentum_buffer"]`` of every parameter, None where there is none like the parameter."""
    found = [optimizer.state.get(p, {}).get(HEAVY_BALL) for p in optimizer_parameters(optimizer)]
    parameters = optimizer_parameters(optimizer)
    return [m if isinstance(m, Tensor) and m.shape == p.shape else None for m, p in zip(found, parameters, strict=True)]


@torch.no_grad()
def halve_momentum(optimizer: Optimizer) -> None:
    """Halves every first moment of the optimizer's state that goes by a usual name."""
    for entry in optimizer.state.values():
        if not isinstance(entry, dict):
            continue
        for key in MOMENTUM_KEYS:
            if isinstance(entry.get(key), Tensor) and entry[key].is_floating_point():
                entry[key].mul_(0.5)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_copied(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _put_back(current: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Makes a dictionary what it was; tensors that are still there are filled, since others may hold on to them."""
    for key in [key for key in current if key not in saved]:
        del current[key]
    for key, value in saved.items():
        present = current.get(key)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and _alike(present, value):
            present.copy_(value)
        elif isinstance(value, dict) and isinstance(present, dict):
            _put_back(present, value)
        else:
            current[key] = _copied(value)


def _alike(present: Tensor, saved: Tensor) -> bool:
    return (
        present.shape == saved.shape
        and present.dtype == saved.dtype
        and present.device == saved.device
        and present.layout == saved.layout
    )
