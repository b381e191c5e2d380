"""Spectra of groups of parameters, from the graphs that the whole spectrum was measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.restricted import Restricted
from lightning_rmt.live.level_blocks import LevelBlock, named_block
from lightning_rmt.live.memory import SHARE, Memory, Plan, free_bytes, host_bytes, least_plan, plan
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.spectra.spectrum import Spectrum
from lightning_rmt.spectra.stopping import Settled


def measure_blocks(
    module: Any,
    operator: CurvatureOperator,
    whole: Spectrum,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    seed: int,
) -> tuple[Mapping[str, Spectrum], Sequence[str]]:
    """One spectrum for each group of parameters in ``settings.blocks``; called inside the fence, by all ranks.

    Exact products of the Hessian come from the graphs that are kept; where none are, each product runs the loss as those of
    the whole spectrum do. A group of all parameters has the whole spectrum.

    Args:
        module: the LightningModule.
        operator: this rank's operator, with its graphs.
        whole: its spectrum.
        settings: with the groups that are wanted.
        ranks: all that take part.
        memory: what a basis may take.
        seed: of the start vectors.

    Returns:
        The spectra by the groups' tags, and why others couldn't be had.
    """
    found, notes = {}, []
    for pattern in settings.blocks or ():
        try:
            group = all_or_none(ranks, partial(named_block, module, pattern, settings.parameters))
            found[group.name] = _spectrum(module, operator, whole, group, settings, ranks, memory, seed)
        except RefusedError as error:
            notes.append(f"no spectrum of {pattern}: {error}")
    return found, notes


def _spectrum(
    module: Any,
    operator: CurvatureOperator,
    whole: Spectrum,
    group: LevelBlock,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    seed: int,
) -> Spectrum:
    def restricted() -> Restricted:
        tensors = dict(module.named_parameters(remove_duplicate=False))
        known = {id(p): name for name, p in zip(operator.block.names, operator.block.tensors, strict=True)}
        return Restricted(operator, [known[id(tensors[name])] for name, _ in group.pieces])  # a tied one has two names

    block = all_or_none(ranks, restricted)
    if block.size == operator.size:
        return whole

    rows = ranks.local_size(block)

    def planned() -> Plan:
        available = SHARE * free_bytes(block.device)
        return plan(
            block.size,
            settings.lanczos_steps,
            1,
            block.dtype,
            available,
            host=SHARE * host_bytes(block.device),
            local_size=rows,
            largest=memory.largest_basis,
        )

    agreed = least_plan(ranks, all_or_none(ranks, planned))
    all_or_none(ranks, lambda: memory.try_out(block, agreed, rows))
    shared = all_or_none(ranks, lambda: ranks.mean(block, settings.rank_weights))

    def run() -> Spectrum:
        rule = Settled(shared.size, shared.noise)
        return estimate_spectrum(shared, steps=agreed.steps, seed=seed, basis=agreed.basis, until=rule)

    return all_or_none(ranks, run)
