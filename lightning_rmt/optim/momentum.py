"""What a damping made of one gradient: a step without the momentum of earlier ones and without weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_rmt.optim.snapshot import HEAVY_BALL

#: Adam's mean of gradients. NAdam's step is no multiple of it, and NAdam alone keeps the other.
MEAN, NADAM = "exp_avg", "mu_product"
#: Relative difference up to which a step and a momentum buffer are the same.
SAME_STEP = 0.02


@torch.no_grad()
def without_momentum(
    move: Tensor, gradient: Tensor | None, earlier: Tensor | None, entry: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Tensor, bool]:
    """The move of one parameter for its gradient alone.

    *Heavy ball*, where the weights show that the move is minus the buffer, or Nesterov's, minus ``new + momentum * buffer``:
    the new part ``buffer - momentum * earlier buffer`` remains, whatever made it of the gradient. *Adam*, where the weights
    show that the move is minus the mean of gradients times positive factors: these times the gradient remain. That the mean
    is divided by ``1 - beta1^t`` is taken for granted there. Any other move is left as it is.

    Args:
        move: of the parameter, divided by the learning rate, without weight decay.
        gradient: the step's own.
        earlier: heavy-ball buffer before the step, None where there was none.
        entry: the parameter's state after the step.
        options: of its group, before the step.

    Returns:
        The move, and whether there is no earlier momentum in it.
    """
    buffer, mean = entry.get(HEAVY_BALL), entry.get(MEAN)
    if isinstance(buffer, Tensor) and buffer.shape == move.shape:
        return _heavy_ball(move, buffer, earlier, options)
    if isinstance(mean, Tensor) and mean.shape == move.shape:
        return _adam(move, gradient, mean, entry, options)
    return move, True


def _heavy_ball(
    move: Tensor, buffer: Tensor, earlier: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, bool]:
    momentum = float(options.get("momentum", 0.0))
    if earlier is None:  # torch's first buffer is the new part, undamped
        nesterov = momentum > 0 and _near(-(1 + momentum) * buffer, move)
        return (-buffer if nesterov else move), True
    new = (buffer - momentum * earlier) / (1 - float(options.get("dampening", 0.0)))
    if _near(-buffer, move) or _near(-(new + momentum * buffer), move):
        return -new, True
    return move, False


def _adam(
    move: Tensor, gradient: Tensor | None, mean: Tensor, entry: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Tensor, bool]:
    beta = float(options["betas"][0]) if "betas" in options else None
    # pytorch-optimizer counts in the group, and these options are from before the step
    steps = float(entry["step"]) if "step" in entry else float(options.get("step", 0)) + 1
    if beta == 0 or steps <= 1:
        return move, True
    if beta is None or NADAM in entry or gradient is None or gradient.layout != torch.strided:
        return move, False
    downhill = move * mean < 0
    if not bool(move[~downhill].abs().sum() <= SAME_STEP * move.abs().sum()):  # also where it isn't finite
        return move, False
    factors = torch.where(downhill, move / mean, torch.zeros_like(move))
    return factors * gradient * (1 - beta**steps), True


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether they agree as far as a step can be read off rounded weights."""
    return bool((one - other).norm() <= SAME_STEP * other.norm())
