"""The outlier map over batch sizes on the live module: outliers of growing parts of the batches that a probe has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lightning_rmt.curvature.batches import micro_batches, sample_count
from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.blocks import spectrum_of
from lightning_rmt.live.memory import Memory
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.operators import build_operator
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.local_law.batch_fit import LEAST_SIZES
from lightning_rmt.local_law.batch_law import BatchLaw
from lightning_rmt.local_law.noise import NoiseScale
from lightning_rmt.spectra.moments import Estimate
from lightning_rmt.spectra.spectrum import Spectrum
from lightning_rmt.spectra.stopping import CertifiedEnds

#: Sets of samples that have nothing in common; an error bar from four has three degrees of freedom.
GROUPS = 4
#: Batch sizes: a group whole, its halves, its quarters; its eighths too where every rank has this many samples.
MOST_SIZES, SAMPLES_FOR_MOST = 4, 64
#: Outliers that are followed, at most, and where they can't be counted.
MOST_OUTLIERS, UNCOUNTED = 5, 3
#: Products per batch, at most: outliers are mostly certified after 20, and on small batches it is them that stand out.
MOST_STEPS = 40
#: Steps between two looks: on a small model, looking at every step would take most of the time.
LOOK_EVERY = 5


def most_products(settings: ProbeSettings) -> int:
    """Products that a fit takes at most, one on a part of the samples counted as that part.

    Every batch size has all of the samples, in parts, so that is a spectrum for each.
    """
    return MOST_SIZES * min(settings.lanczos_steps, MOST_STEPS) if settings.batch_law else 0


def refuse_no_batch_law(
    batch_law_every: int | None, curvature: str, product: str, preconditioned: bool = False
) -> None:
    """Refuses a fit that could never be had, before the first step.

    Raises:
        MisconfigurationException: it is of another matrix, or products are never exact.
    """
    if batch_law_every is None:
        return
    if curvature == "gradient_covariance":
        raise MisconfigurationException(
            'batch_law_every is about the curvature of the loss: with curvature="gradient_covariance" leave it None'
        )
    if preconditioned:
        raise MisconfigurationException(
            "batch_law_every fits a law of the Hessian's outliers, which was never tested in an optimizer's metric: with "
            "preconditioned=True leave it None, and give it to a second monitor with another name"
        )
    if product == "finite_difference":
        raise MisconfigurationException(
            'batch_law_every needs exact products: with product="finite_difference" every one of its some thirty to sixty '
            'batches would have to find a step of its own. Take product="exact" or "auto", or leave it None'
        )


class Turns:
    """Which full probes fit the outlier map, and what one of them costs on average.

    Args:
        every: at every so many-th full probe, the first one included; None: never.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._seconds = 0.0

    def due(self, full_probes: int) -> bool:
        """Whether it is the next one's turn after so many full probes."""
        return self.every is not None and full_probes % self.every == 0

    def on_average(self, seconds: float, fit: float) -> float:
        """What a full probe costs with its share of a fit, in seconds: a schedule by budget expects the next one to.

        Args:
            seconds: that the last one took.
            fit: of these, what a fit took; 0 where it wasn't its turn.
        """
        self._seconds = fit or self._seconds
        return seconds - fit + (self._seconds / self.every if self.every else 0.0)


class _Batch(NamedTuple):
    """This rank's part of a batch, the group that it is in, and how often that was halved for it."""

    captured: list[CapturedBatch]
    group: int
    halvings: int


def measure_batch_law(
    module: Any,
    batches: Sequence[CapturedBatch],
    spectrum: Spectrum,
    noise: NoiseScale | None,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    *,
    exact: bool,
    mixed_precision: bool,
    dataset_size: float,
    seed: int,
) -> tuple[BatchLaw | None, tuple[str, ...]]:
    """The largest eigenvalues on parts of the curvature batches, and why they can't be had.

    Called inside the fence, by all ranks. A batch has the same number of samples from every rank.

    Args:
        module: the LightningModule.
        batches: this rank's curvature batches.
        spectrum: on all of them, over all ranks.
        noise: of half of them, where that was measured.
        settings: which matrix of which parameters.
        ranks: all that take part.
        memory: what graphs and bases may take.
        exact: whether the spectrum's products are, on every rank.
        mixed_precision: whether the fence computes in it.
        dataset_size: samples that the batches are drawn from.
        seed: of the start vectors.
    """
    if not settings.batch_law:
        return None, ()
    if not exact:
        return None, ("no outlier law: products are finite differences, each batch's with an error of its own",)
    try:
        wanted = _wanted(spectrum)
        parts = all_or_none(ranks, lambda: _nested(batches, ranks.agree))
        sizes, levels, products = [], [], 0.0
        for part in parts:
            found, size = _largest(module, part.captured, wanted, settings, ranks, memory, mixed_precision, seed)
            sizes.append(size)
            levels.append([level.value for level in found.top[:wanted]])
            products += found.products * size
        law = _law(parts, sizes, levels, spectrum, noise, dataset_size, products)
        return law, tuple(_shortfalls(law, wanted, spectrum))
    except RefusedError as error:
        return None, (f"no outlier law: {error}",)


def _wanted(spectrum: Spectrum) -> int:
    """How many of the largest eigenvalues are followed."""
    count = spectrum.outliers.high.count
    if count == 0:
        raise RefusedError("no eigenvalue stands apart above the bulk")
    positive = sum(level.value > 0 for level in spectrum.top)
    wanted = min(UNCOUNTED if count is None else count, MOST_OUTLIERS, positive)
    if wanted == 0:
        raise RefusedError("no positive eigenvalue is certified")
    return wanted


def _nested(batches: Sequence[CapturedBatch], agree: Callable[[int], int]) -> list[_Batch]:
    """The groups whole, then in halves, quarters, ..., each of as many samples on every rank."""
    counts = [sample_count(captured.batch) for captured in batches]
    samples = agree(sum(counts))
    sizes = MOST_SIZES if samples >= SAMPLES_FOR_MOST else LEAST_SIZES
    per_group = 2 ** (sizes - 1)
    needed = GROUPS * per_group
    unit = next((u for u in range(max(counts), 0, -1) if sum(count // u for count in counts) >= needed), 0)
    unit = agree(unit + 1) - 1  # which is at least 1, as every agreement is
    if unit == 0:
        raise RefusedError(
            f"{needed} parts of one size can't be cut from {samples} samples a rank; take more curvature batches (batches=)"
        )
    pieces = [
        replace(captured, batch=piece)
        for captured, count in zip(batches, counts, strict=True)
        for piece in micro_batches(captured.batch, unit)[: count // unit]
    ]
    length = agree(len(pieces) // needed)
    found = []
    for group in range(GROUPS):
        own = pieces[group * per_group * length : (group + 1) * per_group * length]
        for step in range(sizes):
            width = len(own) // 2**step
            found += [_Batch(own[start : start + width], group, step) for start in range(0, len(own), width)]
    return found


def _largest(
    module: Any,
    captured: list[CapturedBatch],
    wanted: int,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    mixed_precision: bool,
    seed: int,
) -> tuple[Spectrum, float]:
    """The spectrum of one batch as far as the eigenvalues that are wanted, and its samples over all ranks."""
    samples: list[float] = []
    with ExitStack() as stack:

        def build() -> CurvatureOperator:
            operator, _, _ = build_operator(
                module,
                captured,
                settings,
                mixed_precision=mixed_precision,
                product="exact",
                memory=memory,
                agree=ranks.agree,
            )
            stack.callback(operator.release)
            return operator

        def until(shared: CurvatureOperator | RankSum) -> CertifiedEnds:
            samples.append(float(shared.samples))
            return CertifiedEnds(shared.size, shared.noise, top=wanted, every=LOOK_EVERY)

        operator = all_or_none(ranks, build)
        spectrum = spectrum_of(
            operator, settings, ranks, memory, seed=seed, until=until, most_steps=MOST_STEPS, light=True
        )
    return spectrum, samples[0]


def _law(
    parts: list[_Batch],
    samples: list[float],
    levels: list[list[float]],
    spectrum: Spectrum,
    noise: NoiseScale | None,
    dataset_size: float,
    products: float,
) -> BatchLaw:
    """From the same numbers on every rank: they fail together."""
    known = min(sum(value > 0 for value in row) for row in levels)
    if known == 0:
        raise RefusedError(f"the largest eigenvalue isn't certified on every batch within {MOST_STEPS} products")
    one_sample = None
    if noise is not None and noise.batch_size is not None and noise.mean > 0:
        root = noise.batch_size**0.5  # of halves, whose difference knows nothing of the data set's size
        one_sample = Estimate(noise.mean * root, np.nan if noise.stderr is None else noise.stderr * root)
    halvings = np.array([part.halvings for part in parts])
    weights = np.array(samples)  # which a loss may give as it likes, to one batch more than to the next
    sizes = np.array([weights[halvings == step].mean() for step in halvings])
    whole = float(weights[halvings == 0].sum())
    law = BatchLaw(
        sizes,
        np.array([row[:known] for row in levels]),
        np.array([part.group for part in parts]),
        max(dataset_size, whole),
        float(spectrum.bulk.mean(lambda x: x[None])[0]),
        one_sample,
        products / whole,
    )
    try:
        _ = law.fits
    except ValueError as error:
        raise RefusedError(str(error)) from None
    return law


def _shortfalls(law: BatchLaw, wanted: int, spectrum: Spectrum) -> list[str]:
    """What is less than was meant, in words."""
    known, said = law.eigenvalues.shape[1], []
    if known < wanted:
        said.append(
            f"outlier law: only the first {known} of {wanted} eigenvalues are certified on every batch within {MOST_STEPS} "
            "products"
        )
    if spectrum.outliers.high.count is None:
        said.append("outlier law: outliers couldn't be counted, so it is fitted to the largest eigenvalues")
    return said
