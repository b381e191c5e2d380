"""How known optimizers scale and average the gradient, and the edge of stability of their steps.

A step is ``-lr P^-1 m``: P is a diagonal that the optimizer keeps, m a running mean of gradients. With P held fixed on a
quadratic with Hessian H, iterates diverge once they change sign at every step, which is where ``lr r lambda = 2``: lambda is
the largest eigenvalue of ``P^(-1/2) H P^(-1/2)`` and r is what m keeps of a gradient that changes sign at every step, for
Adam ``(1 - beta1) / (1 + beta1)``. That is the threshold ``2 (1 + beta1) / ((1 - beta1) lr)`` of Cohen et al. 2022
(arXiv 2207.14484), 38 / lr for 0.9. Adam's correction of the mean, ``1 / (1 - beta1^t)``, is part of r here as it is of
their P; it is gone after some 50 steps.

Parameters with products ``lr r`` of their own share one threshold where these are part of P, relative to the largest: for
parameters that change sign together the condition is the same matrix's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.optim.metric import adam_denominator, flat_roots, group_of


class Scaling(NamedTuple):
    """What an optimizer does to the gradient of one parameter, by the state that its last step left.

    Attributes:
        denominator: P, in a new tensor of the parameter's shape; None where it is 1.
        response: r, what the direction of a step keeps of a gradient that changes sign at every step.
    """

    denominator: Tensor | None
    response: float


Rule = Callable[[dict[str, Any], dict[str, Any], torch.dtype], "Scaling | None"]


@dataclass(frozen=True)
class DiagonalMetric:
    """The metric of all optimizers together on a block of parameters.

    Attributes:
        scale: diagonal of ``P^(-1/2)``, shape (n,), zero for what isn't moved; None where all of it is 1.
        limit: of the largest eigenvalue of ``P^(-1/2) H P^(-1/2)``; None where every learning rate is 0.
        optimizers: names of their classes.
        unmoved: names of the parameters that no step moves.
    """

    scale: Tensor | None
    limit: float | None
    optimizers: tuple[str, ...]
    unmoved: tuple[str, ...]


def rule_of(optimizer: Optimizer) -> Rule | None:
    """How this optimizer scales gradients; None where that isn't known: another class, or a step of its own."""
    for kind, rule in RULES.items():
        # torch wraps `step` once for every class, to profile it
        if isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step):
            return rule
    return None


def diagonal_metric(optimizers: Sequence[Optimizer], block: ParameterBlock) -> DiagonalMetric | None:
    """The metric in which the optimizers' steps are steepest descent, and its edge of stability.

    Reads their state and changes nothing. P is that of the last step: the moments that it left, with the correction for
    their number of steps.

    Args:
        optimizers: of known rules; each parameter is in one of them or in none.
        block: the parameters.

    Returns:
        None where no step was taken yet that left a state.

    Raises:
        ValueError: an optimizer's rule isn't known.
    """
    owners: list[tuple[Optimizer, dict[str, Any]] | None] = []
    groups = [(optimizer, group_of(optimizer)) for optimizer in optimizers]
    for p in block.tensors:
        owners.append(next(((optimizer, known[id(p)]) for optimizer, known in groups if id(p) in known), None))
    scalings = [None if o is None else _scaling(*o, p, block) for o, p in zip(owners, block.tensors, strict=True)]
    if all(scaling is None for scaling in scalings):
        return None
    rates = [0.0 if o is None else float(o[1]["lr"]) for o in owners]
    rest = max(rates) == 0  # a warm-up that begins at 0, say
    gains = [
        0.0 if scaling is None else scaling.response * (1.0 if rest else rate)
        for scaling, rate in zip(scalings, rates, strict=True)
    ]
    largest = max(gains)
    if largest == 0:
        return None
    roots: list[Tensor | None] = []
    plain = True
    for p, scaling, gain in zip(block.tensors, scalings, gains, strict=True):
        share = math.sqrt(gain / largest)
        if scaling is None or share == 0:
            roots.append(None)
        elif scaling.denominator is None:
            roots.append(torch.full((), share, dtype=block.dtype, device=p.device))
        else:
            roots.append(scaling.denominator.rsqrt_().mul_(share))
        plain = plain and scaling is not None and scaling.denominator is None and share == 1
    kinds = [type(o[0]).__name__ for o in owners if o is not None]
    return DiagonalMetric(
        scale=None if plain else flat_roots(block, roots),
        limit=None if rest else 2 / largest,
        optimizers=tuple(dict.fromkeys(kinds)),
        unmoved=tuple(name for name, root in zip(block.names, roots, strict=True) if root is None),
    )


def plain_limit(optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> float | None:
    """The limit on the largest learning rate times lambda_max in the plain coordinates, where P is 1.

    Args:
        optimizers: all of them; the learning rate is the largest of any of their groups.
        parameters: those that lambda_max is of.

    Returns:
        2 for gradient descent, ``2 (1 + momentum)`` for SGD with momentum, and 2 where an optimizer isn't known. Where
        groups have learning rates of their own, below it no step is unstable. None where one scales the gradient, as Adam
        does: the limit is on the curvature in its own metric; and where one ascends.
    """
    measured = {id(p) for p in parameters}
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]
    own = [(optimizer, group) for optimizer, group in groups if any(id(p) in measured for p in group["params"])]
    rules = [rule_of(optimizer) for optimizer, _ in own]
    if any(rule not in (None, _sgd) for rule in rules) or any(group.get("maximize") for _, group in own):
        return None
    if None in rules or not own:
        return 2.0
    fastest = max(float(group["lr"]) for _, group in groups)
    moved = [(group, float(group["lr"]) / fastest if fastest > 0 else 1.0) for _, group in own]
    largest = max(_sgd({}, group, torch.float32).response * share for group, share in moved)
    return 2.0 / largest if largest > 0 else None


def _scaling(optimizer: Optimizer, group: dict[str, Any], p: Tensor, block: ParameterBlock) -> Scaling | None:
    rule = rule_of(optimizer)
    if rule is None:
        raise ValueError(f"it isn't known how {type(optimizer).__name__} scales the gradient")
    return rule(optimizer.state.get(p, {}), group, block.dtype)


def _steps(state: dict[str, Any]) -> float:
    """Steps that this parameter took part in; a tensor on any device, or a number."""
    return float(state.get("step", 0))


def _mean(group: dict[str, Any], step: float) -> float:
    """Response of an exponential moving average, corrected for having begun at zero."""
    beta = float(group["betas"][0])
    return (1 - beta) / (1 + beta) / (1 - beta**step)


def _positive(denominator: Tensor) -> Tensor:
    return denominator.clamp_min_(torch.finfo(denominator.dtype).tiny)


def _sgd(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling:
    momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
    heavy_ball = 1.0 if momentum == 0 else (1 - float(group["dampening"])) / (1 + momentum)
    return Scaling(None, 1 + momentum * heavy_ball if nesterov else heavy_ball)


def _adam(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    denominator = adam_denominator(state, group, dtype)
    return None if denominator is None else Scaling(denominator, _mean(group, _steps(state)))


def _nadam(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    denominator = adam_denominator(state, group, dtype)
    if denominator is None:
        return None
    beta, step, decay = float(group["betas"][0]), _steps(state), float(group["momentum_decay"])
    now, following = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    product = float(state["mu_product"])
    own, mean = (1 - now) / (1 - product), following / (1 - product * following)
    return Scaling(denominator, own + mean * (1 - beta) / (1 + beta))


def _radam(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    step, beta = _steps(state), float(group["betas"][1])
    if step == 0:
        return None
    correction = 1 - beta**step
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / correction
    if length <= 5:  # too few gradients for a second moment: it takes steps of SGD
        return Scaling(None, _mean(group, step))
    rectified = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    root = state["exp_avg_sq"].to(dtype, copy=True).sqrt_().add_(group["eps"])
    return Scaling(_positive(root.div_(correction**0.5 * rectified)), _mean(group, step))


def _adamax(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    step = _steps(state)
    if step == 0:
        return None
    return Scaling(_positive(state["exp_inf"].to(dtype, copy=True)), _mean(group, step))


def _rmsprop(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    if _steps(state) == 0:
        return None
    mean_square = state["square_avg"].to(dtype, copy=True)
    if group["centered"]:
        mean_square.addcmul_(*2 * [state["grad_avg"].to(dtype)], value=-1).clamp_min_(0)
    return Scaling(_positive(mean_square.sqrt_().add_(group["eps"])), 1 / (1 + float(group["momentum"])))


def _adagrad(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Scaling | None:
    step = _steps(state)
    if step == 0:  # its state is there from the beginning
        return None
    root = state["sum"].to(dtype, copy=True).sqrt_().add_(group["eps"])
    return Scaling(_positive(root), 1 / (1 + (step - 1) * float(group["lr_decay"])))


#: By class; `rule_of` takes one for a class and for its subclasses that leave its step as it is.
RULES: dict[type[Optimizer], Rule] = {
    optim.SGD: _sgd,
    optim.AdamW: _adam,
    optim.Adam: _adam,
    optim.NAdam: _nadam,
    optim.RAdam: _radam,
    optim.Adamax: _adamax,
    optim.RMSprop: _rmsprop,
    optim.Adagrad: _adagrad,
}
