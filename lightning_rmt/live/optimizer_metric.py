"""The metric of the optimizers of a live training: what `SpectrumMonitor(preconditioned=True)` measures in."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.parameters import ParameterBlock, select_parameters
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.operators import listed
from lightning_rmt.live.ranks import Ranks
from lightning_rmt.optim.diagonal_metric import RULES, DiagonalMetric, diagonal_metric, rule_of

WHO = "SpectrumMonitor(preconditioned=True)"
#: Largest relative difference of the scales' norms between ranks that is taken for rounding.
SAME = 1e-4


class NotSteppedError(Exception):
    """No optimizer has a state yet: nothing went wrong, and a later probe will find one."""


def refuse_no_metric(trainer: Any, module: Any, parameters: Sequence[str] | None) -> None:
    """Refuses optimizers whose metric isn't known, once they are made and before the first step.

    Raises:
        MisconfigurationException: one that moves a measured parameter has a step that isn't known, ascends, or shares a
            parameter with another; none moves any; or parameters, and so the state, are sharded.
    """
    measured = [
        (name, p)
        for name, p in module.named_parameters()
        if parameters is None or any(fnmatchcase(name, pattern) for pattern in parameters)
    ]
    sharded = [name for name, p in measured if hasattr(p, "_local_tensor")]
    if sharded:
        raise MisconfigurationException(
            f"{WHO} needs the optimizer's whole state on every rank, and that of {sharded[0]} is sharded: measure the "
            "ordinary spectrum (preconditioned=False), or train under DDP or on one device"
        )
    owners: dict[int, Any] = {}
    names = {id(p): name for name, p in measured}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            own = [p for p in group["params"] if id(p) in names]
            if own:
                _refuse_unknown(optimizer, group)
            for p in own:
                if owners.setdefault(id(p), optimizer) is not optimizer:
                    raise MisconfigurationException(
                        f"{WHO}: two optimizers move {names[id(p)]}, each in a metric of its own; measure the ordinary "
                        "spectrum (preconditioned=False), or other parameters (parameters=)"
                    )
    if not owners and any(p.requires_grad for _, p in measured):
        raise MisconfigurationException(
            f"{WHO}: no optimizer of the Trainer moves any of the measured parameters, so that there is no metric; measure "
            "the ordinary spectrum (preconditioned=False)"
        )


def _refuse_unknown(optimizer: Any, group: dict[str, Any]) -> None:
    kind = type(optimizer).__name__
    if rule_of(optimizer) is None:
        known = ", ".join(sorted(known.__name__ for known in RULES))
        raise MisconfigurationException(
            f"{WHO}: it isn't known how {kind} scales the gradient. Known are torch.optim's {known}, and subclasses that "
            f"leave their step as it is. Train with one of them, measure parameters that {kind} doesn't move (parameters=), "
            "or measure the ordinary spectrum (preconditioned=False)"
        )
    if group.get("maximize"):
        raise MisconfigurationException(
            f"{WHO}: this {kind} climbs (maximize=True), and an edge of stability is one of descent; minimize the negative "
            "loss, or measure the ordinary spectrum (preconditioned=False)"
        )


def live_metric(trainer: Any, module: Any, parameters: Sequence[str] | None, ranks: Ranks) -> DiagonalMetric:
    """The metric of the optimizers' next steps, as far as their last ones tell it; all ranks call it.

    Raises:
        NotSteppedError: on all ranks, no optimizer has a state on one.
        CurvatureError: on all ranks, their states differ.
        OtherRankFailedError: another rank failed.
    """

    def read() -> DiagonalMetric | None:
        block = ParameterBlock(select_parameters(module.named_parameters(), parameters))
        return diagonal_metric(trainer.optimizers, block)

    found = ranks.together(read)
    if not ranks.all_ok(found is not None):
        raise NotSteppedError(
            "no optimizer has taken a step yet that left a state (a gradient scaler skips steps, a parameter may have had "
            "no gradient so far): there is no preconditioned spectrum"
        )
    assert found is not None
    norm = 0.0 if found.scale is None else float(found.scale.double().norm())
    norms = ranks.gather(np.array([norm]))
    if float(np.ptp(norms)) > SAME * float(norms.max()):
        raise CurvatureError(
            "the optimizers' states differ between the ranks (do all of them step on the same gradients?), so that there is "
            "no one metric"
        )
    return found


def metric_notes(metric: DiagonalMetric) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to warn of about a metric, and sentences to keep with what is measured in it."""
    warnings, notes = [], []
    if metric.optimizers == ("SGD",):
        same = "the ordinary one" if metric.scale is None else "the ordinary one up to the groups' learning rates"
        warnings.append(
            f"SGD doesn't scale the gradient: the preconditioned spectrum is {same}; its limit does know the momentum"
        )
    if metric.unmoved:
        notes.append(
            f"no step moves {listed(metric.unmoved)} (in no optimizer, with a learning rate of 0, or without a gradient so "
            "far): zeros in the preconditioned spectrum"
        )
    return tuple(warnings), tuple(notes)
