"""The noise of the curvature matrix on the live module, from the two halves of a probe's batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from lightning_rmt.curvature.batches import micro_batches, sample_count
from lightning_rmt.curvature.errors import is_out_of_memory
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.krylov.lanczos import SymmetricOperator
from lightning_rmt.krylov.ritz_vectors import ritz_vectors
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.memory import Memory, NoiseVectors, noise_vectors
from lightning_rmt.live.operators import build_operator
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.local_law.noise import NoiseScale, noise_scale
from lightning_rmt.spectra.spectrum import Spectrum

#: Directions that are kept out of the bulk's noise, at most, and where outliers can't be counted.
MOST_DIRECTIONS, UNCOUNTED = 16, 10
#: Random vectors, and outliers whose own noise is measured: with half batches, four products' worth in all.
RANDOM, RESOLVED = 2, 2


class OutlierDirections:
    """The outliers' directions, taken from the basis of a spectrum while that is there.

    The spectrum is worth more than they are: what goes wrong is kept, and said when they are asked for.
    """

    def __init__(self) -> None:
        self._vectors: Tensor | None = None
        self._reason: str | None = None

    def keep(self, spectrum: Spectrum, basis: Tensor, operator: CurvatureOperator) -> None:
        """Takes them; see `outlier_directions`."""
        try:
            self._vectors = outlier_directions(spectrum, basis, operator)
        except Exception as error:
            self._reason = "memory ran out" if is_out_of_memory(error) else str(error) or type(error).__name__

    def take(self) -> Tensor | None:
        """Hands them over.

        Raises:
            RefusedError: they couldn't be had.
        """
        vectors, self._vectors = self._vectors, None
        if self._reason is not None:
            raise RefusedError(self._reason)
        return vectors


def vectors_of(operator: CurvatureOperator, settings: ProbeSettings, ranks: Ranks) -> NoiseVectors:
    """What the noise of this operator will take in this process, at most; nothing where it isn't measured."""
    if not settings.noise or not operator.exact:
        return NoiseVectors()
    return noise_vectors(
        operator.size, operator.dtype, MOST_DIRECTIONS, RANDOM + RESOLVED, RANDOM, ranks.local_size(operator)
    )


def outlier_directions(spectrum: Spectrum, basis: Tensor, operator: CurvatureOperator) -> Tensor | None:
    """Ritz vectors of the outliers, largest first; of the largest certified eigenvalues where those can't be counted.

    Args:
        spectrum: of the operator.
        basis: of its first run, or this rank's part of it.
        operator: says where they are wanted.

    Returns:
        Shape (k, n) or this rank's parts of them; None where nothing is certified.
    """
    counts = spectrum.outliers.high.count, spectrum.outliers.low.count
    high = UNCOUNTED if counts[0] is None else counts[0]
    levels = [*spectrum.top[:high], *spectrum.bottom[: counts[1] or 0]]
    levels = levels[: min(MOST_DIRECTIONS, operator.size // 2)]
    if not levels:
        return None
    nodes = spectrum.runs[0].nodes
    places = dict.fromkeys(int(np.abs(nodes - level.value).argmin()) for level in levels)
    return ritz_vectors(spectrum.runs[0], basis, list(places), operator.device).to(operator.dtype)


def measure_noise(
    module: Any,
    batches: Sequence[CapturedBatch],
    outliers: Callable[[], Tensor | None],
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    *,
    exact: bool,
    mixed_precision: bool,
    seed: int,
    over_ranks: Callable[[CurvatureOperator], SymmetricOperator] | None = None,
) -> tuple[NoiseScale | None, tuple[str, ...]]:
    """The noise of matrices on half of the curvature batches, and why it can't be had.

    Called inside the fence, by all ranks.

    Args:
        module: the LightningModule.
        batches: this rank's curvature batches.
        outliers: gives the directions that have a noise of their own, or raises why they can't be had.
        settings: which matrix of which parameters.
        ranks: all that take part.
        memory: what graphs may take.
        exact: whether the spectrum's products are, on every rank.
        mixed_precision: whether the fence computes in it.
        seed: of the random vectors.
        over_ranks: what the noise is of, given the operator on a rank's half; None: the mean over the ranks.
    """
    mean = over_ranks or (lambda half: ranks.mean(half, settings.rank_weights))
    if not settings.noise:
        return None, ()
    if not exact:
        return None, ("no noise scale: finite differences are too imprecise for the difference of two matrices",)
    with ExitStack() as stack:

        def build() -> list[CurvatureOperator]:
            try:
                return halves_built()
            except Exception as error:
                if len(batches) % 2 == 0 or is_out_of_memory(error) or isinstance(error, RefusedError):
                    raise
                raise RefusedError(
                    f"on half of the batch the loss fails; with batches=2 halves are whole ones: {error}"
                ) from error

        def halves_built() -> list[CurvatureOperator]:
            built = []
            for half in _halves(batches):
                operator, _, _ = build_operator(
                    module,
                    half,
                    settings,
                    mixed_precision=mixed_precision,
                    product="exact",
                    memory=memory,
                    agree=ranks.agree,
                )
                stack.callback(operator.release)
                built.append(operator)
            return built

        try:
            vectors = all_or_none(ranks, outliers)
            halves = all_or_none(ranks, build)
            first, second = (all_or_none(ranks, lambda half=half: mean(half)) for half in halves)  # type: ignore[misc]

            def run() -> NoiseScale:
                return noise_scale(first, second, RANDOM, seed, outliers=vectors, resolved=RESOLVED)

            return all_or_none(ranks, run), ()
        except RefusedError as error:
            return None, (f"no noise scale: {error}",)


def _halves(batches: Sequence[CapturedBatch]) -> tuple[list[CapturedBatch], list[CapturedBatch]]:
    """Two disjoint halves: of the list if that is even, else of the samples of every batch."""
    if len(batches) % 2 == 0:
        return list(batches[::2]), list(batches[1::2])
    first, second = [], []
    for captured in batches:
        size = sample_count(captured.batch)
        if size < 2:
            raise RefusedError("a single sample has no halves; take batches=2")
        one, other = micro_batches(captured.batch, -(-size // 2))
        first.append(replace(captured, batch=one))
        second.append(replace(captured, batch=other))
    return first, second
