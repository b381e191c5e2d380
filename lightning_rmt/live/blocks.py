"""Spectra of groups of parameters, from the graphs that the whole spectrum was measured with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.restricted import Restricted
from lightning_rmt.live.level_blocks import LevelBlock, named_block
from lightning_rmt.live.memory import SHARE, Memory, Plan, free_bytes, host_bytes, least_plan, plan
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.probe import Until, estimate_spectrum
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

    return spectrum_of(
        block, settings, ranks, memory, seed=seed, until=lambda shared: Settled(shared.size, shared.noise)
    )


def spectrum_of(
    operator: CurvatureOperator,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    *,
    seed: int,
    until: Callable[[CurvatureOperator | RankSum], Until],
    most_steps: int | None = None,
    light: bool = False,
) -> Spectrum:
    """The spectrum of one more operator of a probe, over all ranks, with one start vector and as good a basis as fits.

    Args:
        operator: this rank's.
        settings: with the most steps that are wanted.
        ranks: all that take part.
        memory: what a basis may take.
        seed: of the start vector.
        until: makes the rule that ends it, for the operator over all ranks.
        most_steps: fewer steps than the settings'.
        light: whether eigenvalues are all that is wanted; see `plan`.

    Raises:
        RefusedError: it can't be had, on any rank.
    """
    rows = ranks.local_size(operator)
    steps = settings.lanczos_steps if most_steps is None else min(settings.lanczos_steps, most_steps)

    def planned() -> Plan:
        available = SHARE * free_bytes(operator.device)
        return plan(
            operator.size,
            steps,
            1,
            operator.dtype,
            available,
            host=SHARE * host_bytes(operator.device),
            local_size=rows,
            largest=memory.largest_basis,
            light=light,
        )

    agreed = least_plan(ranks, all_or_none(ranks, planned))
    all_or_none(ranks, lambda: memory.try_out(operator, agreed, rows))
    shared = all_or_none(ranks, lambda: ranks.mean(operator, settings.rank_weights))

    def run() -> Spectrum:
        return estimate_spectrum(shared, steps=agreed.steps, seed=seed, basis=agreed.basis, until=until(shared))

    return all_or_none(ranks, run)
