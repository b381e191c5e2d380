"""An optimizer's weights and state before a step, to be put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.optim.kept import keep

#: Where heavy-ball momentum is kept, as in torch's SGD.
HEAVY_BALL = "momentum_buffer"
#: Names under which optimizers keep their first moment.
MOMENTUM_KEYS = (HEAVY_BALL, "exp_avg", "momentum")


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter of every group, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Snapshot:
    """Weights, and perhaps ``optimizer.state`` and what a step changes in ``param_groups``, as they are when this is made.

    What an optimizer keeps elsewhere is `OutsideState`.

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
        buffers = momentum_buffers(optimizer)
        self.momenta = [None if buffer is None else buffer.detach().clone() for buffer in buffers]
        self._state = keep(optimizer.state) if state else None
        self._options = [_keep_options(group) for group in optimizer.param_groups] if state else []

    @torch.no_grad()
    def restore(self, *, options: bool = True) -> None:
        """Puts weights and state back, into the same tensors.

        Args:
            options: also what is in the groups, the damping and the learning rate among it.
        """
        for p, before in zip(optimizer_parameters(self._optimizer), self.weights, strict=True):
            p.copy_(before)
        if self._state is not None:
            self._state()
        for restore in self._options if options else ():
            restore()


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


def _keep_options(group: dict[str, Any]) -> Callable[[], None]:
    """Puts back what is in a group, where many optimizers count their steps."""
    options = keep({name: value for name, value in group.items() if name != "params"})

    def restore() -> None:
        restored = options()
        for name in [name for name in group if name not in restored and name != "params"]:
            del group[name]
        group.update(restored)

    return restore
