"""One measurement on the live module: fenced, gathered, on all ranks together or on none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.scaled import Scaled
from lightning_rmt.curvature.sharded_differences import ShardedDifferenceHessian
from lightning_rmt.krylov.collectives import OtherRankFailedError
from lightning_rmt.krylov.lanczos import EXACT_BASES, Basis, rounding_noise
from lightning_rmt.krylov.tridiagonal import NonFiniteError
from lightning_rmt.levels.block import BlockLevels
from lightning_rmt.live.announcement import announcement, products_of_a_probe
from lightning_rmt.live.batch_law import measure_batch_law
from lightning_rmt.live.batches import CapturedBatch, is_empty
from lightning_rmt.live.blocks import measure_blocks
from lightning_rmt.live.fence import fence
from lightning_rmt.live.levels import measure_levels
from lightning_rmt.live.memory import Memory, Plan, least_plan
from lightning_rmt.live.noise import OutlierDirections, measure_noise, vectors_of
from lightning_rmt.live.on_shards import gathers, operator_on_shards, without_exact_parts
from lightning_rmt.live.operators import build_operator, hook_notes
from lightning_rmt.live.optimizer_metric import live_metric, metric_notes
from lightning_rmt.live.preconditioning import due_preconditioner, feed, state_of
from lightning_rmt.live.progress import probe_progress
from lightning_rmt.live.ranks import Ranks
from lightning_rmt.live.seeds import mixed_seed
from lightning_rmt.live.settings import Learned, LightEnds, ProbeSettings
from lightning_rmt.live.sharding import try_room_for_whole, unsharded
from lightning_rmt.live.training import dataset_size
from lightning_rmt.local_law.batch_law import BatchLaw
from lightning_rmt.local_law.noise import NoiseScale
from lightning_rmt.optim.diagonal_metric import DiagonalMetric
from lightning_rmt.probe import Measurement, Until, measure
from lightning_rmt.spectra.spectrum import Spectrum
from lightning_rmt.spectra.stopping import CertifiedEnds, Settled


@dataclass(frozen=True)
class LiveMeasurement:
    """What comes back from behind the fence: no reference to the module, its graph or its batches.

    Attributes:
        measurement: the spectrum and what it took.
        samples: in the curvature batches, over all ranks.
        parameters: names of the measured parameters.
        warnings: what the user should be warned of, about the module.
        notes: further sentences to keep with the reading.
        learned: what the next probe needn't find out again.
        product_error: of finite differences, the largest of any rank; None where products are exact.
        levels: level statistics of exact blocks; only a full probe has them.
        blocks: spectra of groups of parameters; only a full probe has them.
        noise: of the matrix on half of the batches; only a full probe has it.
        batches: curvature batches on a rank, the fewest of any.
        preconditioner: what the training's preconditioner was fed; empty where none was due.
        batch_law: outliers of parts of the batches; only a full probe whose turn it is has them.
        batch_law_seconds: that these took.
        metric: of the optimizers, where that was measured in; without its diagonal.
        products_seconds: what the products of the whole probe were expected to take; None where the operator wasn't checked.
    """

    measurement: Measurement
    samples: int
    parameters: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    learned: Learned
    product_error: float | None
    levels: tuple[BlockLevels, ...] = ()
    blocks: Mapping[str, Spectrum] = field(default_factory=dict)
    noise: NoiseScale | None = None
    batches: int = 1
    preconditioner: Mapping[str, float] = field(default_factory=dict)
    batch_law: BatchLaw | None = None
    batch_law_seconds: float = 0.0
    metric: DiagonalMetric | None = None
    products_seconds: float | None = None


def measure_live(
    trainer: Any,
    module: Any,
    captured: Callable[[], list[CapturedBatch]],
    step: int,
    settings: ProbeSettings,
    *,
    check: bool,
    light: LightEnds | None = None,
    learned: Learned | None = None,
    memory: Memory | None = None,
) -> LiveMeasurement:
    """Measures the curvature of the module's loss as it is now; training never notices.

    Every rank must call it at the same step. Whatever a rank may fail at on its own is followed by an agreement, so that
    all of them raise, or none does.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        captured: gives this rank's batches, or raises what went wrong when they were captured.
        step: the current step; with the seed, it makes the start vectors and the dropout masks.
        settings: what to measure, and how.
        check: whether to test the product's symmetry and repeatability first.
        light: what a light probe is to certify, with one start vector; None for a full probe.
        learned: what an earlier probe found out.
        memory: what it may take; it notes what was taken.

    Raises:
        OtherRankFailedError: another rank failed.
        NotSteppedError: on all ranks, there is no optimizer's metric yet to measure in.
        Exception: whatever went wrong here.
    """
    begin = time.perf_counter()
    ranks = Ranks.of(trainer)
    learned = learned or Learned(settings.product)
    memory = memory or Memory()
    probes = settings.probes if light is None else 1
    if ranks.differing([step, int(light is not None), int(settings.batch_law)]):
        raise OtherRankFailedError(f"ranks are at different steps or probes, this one at a probe after step {step}")
    metric = live_metric(trainer, module, settings.parameters, ranks) if settings.preconditioned else None
    about_metric, of_metric = ((), ()) if metric is None else metric_notes(metric)
    if metric is not None:
        settings, metric = replace(settings, scale=metric.scale), replace(metric, scale=None)
    whole = gathers(module, settings, probes, memory, ranks, trainer.strategy.root_device)
    settings, left_out = (settings, ()) if whole else without_exact_parts(settings)
    with ExitStack() as stack:

        def enter() -> tuple[list[CapturedBatch], tuple[str, ...]]:
            batches = captured()
            if not batches:
                raise ValueError("no batch was captured for this probe (a run that was resumed within its window)")
            batches = [batch for batch in batches if not is_empty(batch.batch)]
            if not batches:
                raise ValueError("every batch that was captured for this probe is empty on this rank (no samples)")
            hooks = hook_notes(module)
            seed = mixed_seed(settings.seed, step, ranks.rank)
            modes = {"autocast": settings.autocast, "first_order": settings.first_order or not whole}
            stack.enter_context(fence(trainer, module, seed=seed, **modes))
            if whole:
                try_room_for_whole(module)
            return batches, hooks

        def build() -> tuple[CurvatureOperator | ShardedDifferenceHessian, Plan, tuple[str, ...], tuple[str, ...]]:
            mixed = settings.autocast and "mixed" in str(trainer.precision)
            operator, warnings, notes = (
                build_operator(
                    module,
                    batches,
                    settings,
                    mixed_precision=mixed,
                    product=learned.product,
                    memory=memory,
                    check=check,
                    agree=ranks.agree,
                )
                if whole
                else operator_on_shards(module, batches, settings, ranks, memory)
            )
            stack.callback(operator.release)
            if isinstance(operator, CurvatureOperator):
                rows, length = ranks.local_size(operator), operator.size
                if check:
                    memory.graphs = operator.graph_bytes()
                if probes > 1:
                    operator.at_once = operator.compare_routes(probes) if learned.at_once is None else learned.at_once
            else:
                rows = length = operator.shards.local_size
            plan = memory.plan(
                operator, settings.lanczos_steps, probes, local_size=rows, product_size=length, light=light is not None
            )
            memory.try_out(operator, plan, rows)  # here, where a rank may still fail alone
            missing = _missing_batches(fewest, settings.batches)
            return operator, plan, (*hooks, *about_metric, *warnings), (*missing, *of_metric, *notes, *left_out)

        # Several stages, since what follows each of them is a collective, which every rank must reach.
        batches, hooks = ranks.together(enter)
        fewest = ranks.least(len(batches))
        if whole:
            stack.enter_context(unsharded(module))
        operator, mine, warnings, notes = ranks.together(build)
        shared = ranks.together(lambda: _over_ranks(operator, ranks, settings))
        basis, steps = least_plan(ranks, mine)
        notes = (*notes, *_lesser(basis, steps, min(settings.lanczos_steps, operator.size)))
        on_step = ranks.together(lambda: stack.enter_context(probe_progress(trainer, settings.name, probes * steps)))

        start = mixed_seed(settings.seed, step, 0)
        vectors = vectors_of(operator, settings, ranks) if isinstance(operator, CurvatureOperator) else None
        outliers = OutlierDirections()

        def keep_outliers(spectrum: Spectrum, basis: Tensor) -> None:
            if isinstance(operator, CurvatureOperator):
                outliers.keep(spectrum, basis, operator)

        def run() -> Measurement:
            return measure(
                shared,
                steps=steps,
                probes=probes,
                seed=start,
                check=check,
                basis=basis,
                until=_rule(shared, light),
                on_forecast=lambda cost: rank_zero_info(
                    announcement(module, settings, cost, memory, ranks.size, vectors)
                ),
                on_step=on_step,
                on_basis=keep_outliers if settings.noise and light is None else None,
            )

        # A rank that fails in a product makes the sum NaN, which is not what the others should report.
        measurement = ranks.together(run, follows=lambda error: isinstance(error, NonFiniteError))
        names = operator.block.names if isinstance(operator, CurvatureOperator) else operator.names
        found = learned
        if isinstance(operator, CurvatureOperator):
            product = "exact" if isinstance(operator, (Hessian, Scaled)) else learned.product
            found = replace(learned, product=product, at_once=operator.at_once if probes > 1 else learned.at_once)
        samples, product_error = int(shared.samples), shared.product_error
        result = LiveMeasurement(
            measurement, samples, names, warnings, notes, found, product_error, batches=fewest, metric=metric
        )
        if (cost := measurement.forecast) is not None:
            expected = cost.seconds * products_of_a_probe(settings, cost) / max(cost.products, 1)
            result = replace(result, products_seconds=expected)
        if not isinstance(operator, CurvatureOperator):
            return result
        kind: Any = {"exact": shared.exact, "mixed_precision": settings.autocast and "mixed" in str(trainer.precision)}
        if light is None:
            blocks, reasons = measure_blocks(module, operator, measurement.spectrum, settings, ranks, memory, start)
            result, notes = replace(result, blocks=blocks), (*notes, *reasons)
        preconditioner = due_preconditioner(trainer)
        if preconditioner is not None:
            fed = feed(
                preconditioner,
                trainer,
                module,
                batches,
                operator,
                settings,
                ranks,
                memory,
                samples=samples,
                seed=start,
                **kind,
            )
            notes = (*notes, *fed)
            result = replace(result, preconditioner=state_of(preconditioner))
        if light is not None:
            return replace(result, notes=notes)
        operator.release()  # its graphs are in the way of what follows
        noise, no_noise = measure_noise(module, batches, outliers.take, settings, ranks, memory, seed=start, **kind)
        seconds, seed = time.perf_counter() - begin, mixed_seed(settings.seed, step, ranks.rank)
        levels = measure_levels(trainer, module, batches, settings, ranks, seconds=seconds, seed=seed, learned=found)
        began = time.perf_counter()
        law, no_law = measure_batch_law(
            module,
            batches,
            measurement.spectrum,
            noise,
            settings,
            ranks,
            memory,
            dataset_size=dataset_size(trainer),
            seed=start,
            **kind,
        )
        return replace(
            result,
            levels=levels.blocks,
            notes=(*notes, *no_noise, *levels.notes, *no_law),
            learned=levels.learned,
            noise=noise,
            batch_law=law,
            batch_law_seconds=time.perf_counter() - began if settings.batch_law else 0.0,
        )


def _over_ranks(
    operator: CurvatureOperator | ShardedDifferenceHessian, ranks: Ranks, settings: ProbeSettings
) -> CurvatureOperator | RankSum | ShardedDifferenceHessian:
    """The operator on all ranks' batches; one on shards is that already."""
    return ranks.mean(operator, settings.rank_weights) if isinstance(operator, CurvatureOperator) else operator


def _lesser(basis: Basis, steps: int, wanted: int) -> tuple[str, ...]:
    """What a shortage of memory has cost, for the reading."""
    if basis in EXACT_BASES:
        return (f"memory for {steps} of {wanted} Lanczos steps",) if steps < wanted else ()
    kept = "is kept in bfloat16" if basis == "half" else "is not kept"
    return (f"memory is short, so the Lanczos basis {kept}: density and sums only, no eigenvalues and no counts",)


def _rule(operator: CurvatureOperator | RankSum | ShardedDifferenceHessian, light: LightEnds | None) -> Until:
    """What ends the probe before its last step."""
    if light is None:
        return Settled(operator.size, operator.noise)
    confirm = (
        1 if operator.noise <= rounding_noise(operator.dtype) else 4
    )  # what imprecise products miss is no small error
    return CertifiedEnds(operator.size, operator.noise, top=light.top, bottom=light.bottom, confirm=confirm)


def _missing_batches(captured: int, wanted: int) -> tuple[str, ...]:
    if captured >= wanted:
        return ()
    return (
        f"measured on {captured} of {wanted} curvature batches: the training was started or resumed while they were being "
        "collected, or some of them are empty",
    )
