"""What a base optimizer's step did to the weights, apart from decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.optim.metric import flat_roots, group_of, inverse_roots
from lightning_rmt.optim.subspace import Subspace

# Since torch 2.7 AdamW is an Adam whose groups say so.
_DECOUPLED = tuple(getattr(torch.optim, name) for name in ("AdamW", "Adafactor", "Muon") if hasattr(torch.optim, name))


class Snapshot:
    """The weights as they were before a step.

    Args:
        block: whose.

    Attributes:
        before: shape (n,), None until `take`.
    """

    def __init__(self, block: ParameterBlock) -> None:
        self._block = block
        self.before: Tensor | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Copies the weights."""
        self.before = self._block.flatten(self._block.tensors)

    def after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with `take` behind its first evaluation: it may change weights, and that is no part of the step."""

        def evaluate() -> Any:
            loss = closure()
            if self.before is None:
                self.take()
            return loss

        return evaluate

    @torch.no_grad()
    def step(self, base: Optimizer, moved: list[bool], decoupled: bool | None) -> Tensor:
        """The step since then, shape (n,): zero for parameters that aren't moved, and without decoupled weight decay.

        Args:
            base: who took it.
            moved: for each parameter, whether it counts.
            decoupled: whether there is decoupled weight decay; None: as the base's class and groups say.
        """
        assert self.before is not None
        groups = group_of(base)
        for p, is_moved, part in zip(self._block.tensors, moved, self.before.split(self._block.sizes), strict=True):
            if is_moved:
                part.mul_(1 - decoupled_decay(base, groups[id(p)], decoupled))
        step = self._block.flatten(
            [p if is_moved else None for p, is_moved in zip(self._block.tensors, moved, strict=True)]
        )
        step.sub_(self.before)
        self.before = None
        for is_moved, part in zip(moved, step.split(self._block.sizes), strict=True):
            if not is_moved:
                part.zero_()
        return step


@torch.no_grad()
def shrink_step(
    snapshot: Snapshot,
    subspace: Subspace,
    factors: NDArray[np.float64],
    base: Optimizer,
    metric: Literal["adam", "identity"],
    decoupled: bool | None,
) -> None:
    """Takes back what a step did too much along a subspace.

    Args:
        snapshot: of the subspace's parameters before the step.
        subspace: where steps are shrunk.
        factors: by how much, shape (k,).
        base: who took the step, with the state that it left.
        metric: of the subspace's vectors.
        decoupled: as for `Snapshot.step`.
    """
    block = subspace.block
    roots = inverse_roots(base, block, metric)
    # without a gradient the base left a parameter alone, and it stays so: P is cut to the others on both sides
    moved = [p.grad is not None for p in block.tensors]
    if roots is not None:
        moved = [is_moved and root is not None for is_moved, root in zip(moved, roots, strict=True)]
    step = snapshot.step(base, moved, decoupled)
    correction = subspace.shrink(step, None if roots is None else flat_roots(block, roots), factors)
    for p, is_moved, part in zip(block.tensors, moved, correction.split(block.sizes), strict=True):
        if is_moved:
            p.add_(part.view(p.shape).to(p))


def decoupled_decay(base: Optimizer, group: dict[str, Any], decoupled: bool | None = None) -> float:
    """Share that decoupled weight decay takes off a weight in one step.

    Args:
        base: whose step.
        group: one of its groups.
        decoupled: whether there is such decay; None: as the base's class and group say, in torch's words or those of
            pytorch-optimizer.
    """
    if decoupled is None:
        said = group.get("decoupled_weight_decay", group.get("weight_decouple", False))
        decoupled = isinstance(base, _DECOUPLED) or bool(said)
    rate = 1.0 if group.get("fixed_decay", False) else float(group["lr"])
    return rate * float(group.get("weight_decay", 0.0)) if decoupled else 0.0
