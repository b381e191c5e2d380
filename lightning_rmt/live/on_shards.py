"""Under FSDP2, where whole parameters don't fit on a rank: what is measured on the shards instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.fsdp_passes import sharded_modules
from lightning_rmt.curvature.parameters import select_parameters
from lightning_rmt.curvature.sharded_differences import ShardedDifferenceHessian
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.loss import curvature_loss
from lightning_rmt.live.memory import SHARE, Memory, gathered_bytes
from lightning_rmt.live.operators import unused_warning
from lightning_rmt.live.ranks import Ranks
from lightning_rmt.live.settings import ProbeSettings

_GIBI = 2**30


def gathers(module: Any, settings: ProbeSettings, probes: int, memory: Memory, ranks: Ranks, device: Any) -> bool:
    """Whether a probe is to gather the parameters of a sharded module, which has to fit on every rank.

    Decided before anything is gathered, by all ranks together; True for a module without sharded parts.

    Args:
        module: the LightningModule, before the fence.
        settings: with the parameters that are measured.
        probes: start vectors.
        memory: what there is; it notes what was decided.
        ranks: all that take part.
        device: where the module trains.
    """
    memory.gathered = False
    if ranks.group is None or not sharded_modules(module):
        return True
    needed = ranks.together(lambda: _needed(module, settings, probes))
    memory.gathered = ranks.all_ok(memory.can_gather(needed, device))
    return memory.gathered


def _needed(module: Any, settings: ProbeSettings, probes: int) -> int:
    chosen = [p for _, p in select_parameters(module.named_parameters(), settings.parameters)]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in chosen) else torch.float32
    everything = sum(p.numel() * p.dtype.itemsize for p in module.parameters())
    return gathered_bytes(everything, sum(p.numel() for p in chosen), probes, dtype)


def without_exact_parts(settings: ProbeSettings) -> tuple[ProbeSettings, tuple[str, ...]]:
    """Settings without what takes exact products, and sentences that say what is missing."""
    wanted = {
        "level statistics": settings.levels,
        "spectra of groups of parameters": settings.blocks,
        "noise scale": settings.noise,
        "outlier law": settings.batch_law,
    }
    notes = [f"no {what}: they take whole parameters, which don't fit on every rank" for what, w in wanted.items() if w]
    return replace(settings, levels=None, blocks=None, noise=False, batch_law=False), tuple(notes)


def operator_on_shards(
    module: Any, captured: Sequence[CapturedBatch], settings: ProbeSettings, ranks: Ranks, memory: Memory
) -> tuple[ShardedDifferenceHessian, tuple[str, ...], tuple[str, ...]]:
    """Central differences on the shards of a fenced module, what to warn of, and sentences to keep with what they show.

    Passes are collectives: every rank has to call it, and one that fails within a pass, alone, leaves the others waiting.

    Args:
        module: the LightningModule, fenced and sharded.
        captured: this rank's curvature batches.
        settings: which matrix of which parameters.
        ranks: all that take part.
        memory: what there is, for the words.

    Raises:
        CurvatureError: it takes whole parameters, or finite differences can't be trusted.
        ValueError: the loss or the parameters are unusable.
    """
    free = f"of {memory.free / _GIBI:.2g} GiB that are free here a probe takes at most {SHARE:.0%}"
    why = f"whole parameters don't fit on every rank ({free})"
    wanted = "product='exact'" if settings.product == "exact" else f"curvature={settings.curvature!r}"
    if settings.product == "exact" or settings.curvature != "hessian":
        raise CurvatureError(
            f"{wanted} takes whole parameters on every rank, and {why}: free some memory, measure fewer parameters "
            "(parameters=), or take curvature='hessian' with product='auto', which then are finite differences on the shards"
        )
    chosen = select_parameters(module.named_parameters(), settings.parameters)
    loss = curvature_loss(module, settings.loss_fn)
    try:
        operator = ShardedDifferenceHessian(loss, chosen, captured, module, ranks.group, weights=settings.rank_weights)
    except CurvatureError as refused:
        raise CurvatureError(
            f"{why}, so that only finite differences on the shards are left; but {refused}. Free some memory, or measure "
            "fewer parameters (parameters=)"
        ) from refused
    check = operator.checked
    assert check is not None  # made unless a tolerance of infinity asks for none
    note = (
        f"products are finite differences of gradients on the parameters' shards, because {why}: step {check.step:.1e}, two "
        f"steps differ by {check.disagreement:.1e}, asymmetry {check.asymmetry:.1e}. Good for density and outliers, not for "
        "the last digits"
    )
    return operator, unused_warning(operator.unused), (note,)
