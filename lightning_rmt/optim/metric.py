"""The metric in which a base optimizer's step is steepest descent, and operators in its coordinates.

A step is ``-lr D^-1 m`` with m a mean of gradients: D is ``sqrt(vhat) + eps`` for Adam and 1 for SGD. Groups with learning
rates of their own belong to it, relative to the largest: a step of mixed rates, projected in the plain coordinates, would
move a slow group by what the fast one's gradient says. In the coordinates ``D^(1/2) w`` the step is along the gradient, and
the Hessian is ``D^(-1/2) H D^(-1/2)``: shrinking that one's eigenvectors leaves a positive matrix times the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.krylov.lanczos import SymmetricOperator, product_noise, shards_of

Metric = Literal["auto", "adam", "identity"]
METRICS: tuple[Metric, ...] = ("auto", "adam", "identity")
#: Optimizers whose step is known to be one over ``sqrt(vhat) + eps`` times a mean of gradients.
ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam)


def metric_of(base: Optimizer, metric: Metric) -> Literal["adam", "identity"]:
    """What ``"auto"`` means for this optimizer: Adam's metric where it is one.

    Raises:
        ValueError: there is no such metric, or the optimizer has no second moments.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    moments = all("betas" in group and "eps" in group for group in base.param_groups)
    if metric == "adam" and not moments:
        raise ValueError(
            f"metric='adam' needs an Adam as base, with second moments (exp_avg_sq), betas and eps; got "
            f"{type(base).__name__}: use metric='identity'"
        )
    return "adam" if metric == "adam" or (metric == "auto" and isinstance(base, ADAMS)) else "identity"


def group_of(base: Optimizer) -> dict[int, dict[str, Any]]:
    """The parameter group of each tensor, by its id."""
    return {id(p): group for group in base.param_groups for p in group["params"]}


def inverse_roots(
    base: Optimizer, block: ParameterBlock, metric: Literal["adam", "identity"]
) -> list[Tensor | None] | None:
    """``D^(-1/2)`` for each parameter of a block, up to a common factor.

    Args:
        base: the optimizer, with the state of its last step.
        block: some of its parameters, and perhaps others.
        metric: which D.

    Returns:
        A tensor of the parameter's shape, or of none; None for one that the optimizer doesn't move (it isn't in it, its
        learning rate is 0, or Adam never saw a gradient of it). None altogether where D is 1.
    """
    groups = group_of(base)
    rates = [float(groups[id(p)]["lr"]) if id(p) in groups else None for p in block.tensors]
    known = [rate for rate in rates if rate is not None]
    fastest = max(known, default=0.0)
    even = all(rate == fastest for rate in known)
    if metric == "identity" and even and len(known) == len(rates):
        return None
    roots: list[Tensor | None] = []
    for p, rate in zip(block.tensors, rates, strict=True):
        if rate is None or (rate <= 0 and not even):
            roots.append(None)
            continue
        share = 1.0 if even else math.sqrt(rate / fastest)
        if metric == "identity":
            roots.append(torch.full((), share, dtype=block.dtype, device=p.device))
            continue
        denominator = adam_denominator(base.state.get(p, {}), groups[id(p)], block.dtype)
        roots.append(None if denominator is None else denominator.rsqrt_().mul_(share))
    return roots


def adam_denominator(state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> Tensor | None:
    """``sqrt(vhat) + eps``, as Adam divides by it, in a new tensor; None before its first step."""
    moments = state.get("max_exp_avg_sq") if group.get("amsgrad") else state.get("exp_avg_sq")
    if moments is None:
        return None
    step = state["step"]
    if not float(step):  # a fused step that a gradient scaler skipped leaves zeros
        return None
    # Adam itself takes this in double precision where the count is on the host, and on the device else
    correction = 1 - float(group["betas"][1]) ** (step.item() if step.device.type == "cpu" else step)
    root = (moments.to(dtype, copy=True) / correction).sqrt_()
    return root.add_(group["eps"]).clamp_min_(torch.finfo(dtype).tiny)


def flat_roots(block: ParameterBlock, roots: Sequence[Tensor | None]) -> Tensor:
    """The roots as one vector, shape (n,), zero for what isn't moved."""
    pairs = zip(block.tensors, roots, strict=True)
    return block.flatten([None if root is None else root.expand(p.shape) for p, root in pairs])


def block_of(operator: SymmetricOperator | None) -> ParameterBlock | None:
    """The parameters that an operator's vectors run over, None where it doesn't say; a sum over ranks has them inside."""
    block = getattr(operator, "block", None) or getattr(getattr(operator, "operator", None), "block", None)
    return block if isinstance(block, ParameterBlock) else None


def in_metric(
    base: Optimizer, metric: Literal["adam", "identity"], operator: SymmetricOperator, block: ParameterBlock
) -> SymmetricOperator:
    """The operator ``D^(-1/2) H D^(-1/2)``, zero for what the optimizer doesn't move; itself where D is 1.

    Raises:
        ValueError: the operator isn't of the block's size, or its vectors are spread over processes.
        RuntimeError: Adam has no second moments yet.
    """
    if shards_of(operator).local_size != operator.size:
        raise ValueError("the operator's vectors are spread over processes; build it with sharded=False")
    if block.size != operator.size:
        raise ValueError(
            f"the operator has size {operator.size} and the parameters {block.size} entries: pass those that the operator "
            "was built on, parameters=..."
        )
    roots = inverse_roots(base, block, metric)
    if roots is None:
        return operator
    if all(root is None for root in roots):
        raise RuntimeError(
            "the base moves none of these parameters yet: Adam's metric needs second moments (exp_avg_sq), which are there "
            "after its first step; ask `due` before a refresh"
        )
    return InMetric(operator, flat_roots(block, roots).to(operator.device, operator.dtype))


class InMetric:
    """``S H S`` for a diagonal S: an operator in the metric's coordinates, with the interface of the one inside.

    Args:
        operator: H, whole in this process.
        scale: diagonal of S, shape (n,), in the operator's dtype and on its device.
    """

    def __init__(self, operator: SymmetricOperator, scale: Tensor) -> None:
        self.operator = operator
        self.size, self.device, self.dtype = operator.size, operator.device, operator.dtype
        self.noise = product_noise(operator)
        self.samples = getattr(operator, "samples", None)
        self.agree: Callable[[bool], bool] = getattr(operator, "agree", bool)
        self.reserve: Callable[[int], None] | None = getattr(operator, "reserve", None)
        # whole on every rank; they also keep what goes wrong on one of them, until the run is over
        self.shards = shards_of(operator)
        self._scale = scale

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the rows of ``V``, shape (k, n)."""
        return self.operator.matmat(V * self._scale) * self._scale
