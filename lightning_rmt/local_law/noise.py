"""How noisy a curvature matrix is: the difference of two half batches' products, with random vectors and with outliers.

The one place in this package that takes operators, and with them torch; nothing else here imports it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

#: Fewest random vectors for a standard error.
FEWEST_FOR_ERROR = 2


@dataclass(frozen=True)
class NoiseScale:
    """The noise of a batch's curvature matrix around that of all data, as a GOE(s) matrix would have it.

    Attributes:
        mean: s, in the operator's units, for batches of ``batch_size``: ``s^2 = E |N z|^2 / n`` over random directions z
            away from the outliers, so that a flat bulk of such noise ends at 2 s.
        stderr: one standard error of it, from how much the random vectors differ (`_scale_and_error`): how well these two
            half batches' noise is known, not how it differs from batch to batch. None with one vector. Of 400 simulated
            scales, in coordinates that know nothing of the noise, were within two of it, with two vectors: 95 % for GOE
            noise, 82 % where eight of 200 directions carry it, 76 % for a spectrum that falls as 1 / i; with eight
            vectors 95 %, 94 % and 89 %.
        batch_size: samples; None where the operators don't say how many they have.
        anisotropy: variance that the noise has in the outliers' directions over ``s^2``, as far as it leads away from
            them: it is what moves an outlier from theta to about ``theta + anisotropy * s^2 / theta``. 1 for a GOE; 40 to 60
            measured on digits networks. None without outliers.
        products: operator products that it took; one with a half batch counts half.
        anisotropy_stderr: one standard error of the anisotropy, given these two half batches: from the random vectors, and
            from the finite number of entries that the noise along an outlier has, as if those were independent.
        along: standard deviation of ``u'Nu`` for an outlier's direction u, the root mean square over those that were
            looked at: how far the outlier itself moves from batch to batch. ``s sqrt(2 / n)`` for a GOE, hundreds of times
            that on digits networks. None without outliers.
    """

    mean: float
    stderr: float | None
    batch_size: float | None
    anisotropy: float | None
    products: float
    anisotropy_stderr: float | None = None
    along: float | None = None

    @property
    def edge(self) -> float:
        """Where a bulk of nothing but such noise ends: 2 s."""
        return 2.0 * self.mean

    def at(self, batch_size: float, dataset_size: float = math.inf) -> NoiseScale:
        """The noise of batches of another size, drawn without replacement: ``s^2`` goes as ``1/b - 1/N``.

        Args:
            batch_size: b, above 0 and at most ``dataset_size``.
            dataset_size: N. The known ``batch_size`` is taken as from the same data; with N infinite, both are.

        Raises:
            ValueError: a size is out of its range, or this noise is of batches of unknown size.
        """
        if self.batch_size is None:
            raise ValueError("the noise is of batches of unknown size, so it can't be had for another one")
        if not 0 < batch_size <= dataset_size:
            raise ValueError(
                f"batch_size must be above 0 and at most dataset_size, got {batch_size} and {dataset_size}"
            )
        per_sample = 1.0 / self.batch_size  # of halves, whose difference knows nothing of N
        factor = math.sqrt((1.0 / batch_size - 1.0 / dataset_size) / per_sample)
        stderr = None if self.stderr is None else self.stderr * factor
        along = None if self.along is None else self.along * factor
        return replace(self, mean=self.mean * factor, stderr=stderr, batch_size=batch_size, along=along)

    def to_dict(self) -> dict[str, float | None]:
        """Plain values."""
        return asdict(self)


def noise_scale(
    first: Any, second: Any, probes: int = 2, seed: int = 0, *, outliers: Any = None, resolved: int = 2
) -> NoiseScale:
    """Measures the noise from two disjoint half batches: ``s^2 = E |(H_1 - H_2) z|^2 / (2 n)``.

    The halves' difference knows the variance of one sample's curvature exactly, whatever the size of the data set (sampling
    without replacement); `NoiseScale.at` has the correction for that. Outliers are projected out of z and of the product:
    their noise is far larger, and would be taken for the bulk's.

    Args:
        first: operator on one half batch (see ``curvature/``); with ``shards`` on every rank.
        second: on the other half, of the same parameters.
        probes: random vectors.
        seed: of these.
        outliers: orthonormal eigenvectors to keep out, shape (k, n) (this process's parts of them), or None.
        resolved: take products with so many of these, the first ones, for `NoiseScale.anisotropy`.

    Returns:
        The noise of a batch as large as one half (their harmonic mean, if they differ).

    Raises:
        ValueError: the operators' sizes differ, ``probes`` is below 1, no direction is left, or products are NaN or
            infinite.
        Exception: over several processes, whatever went wrong in this one; the others see NaN.
    """
    from lightning_rmt.krylov.lanczos import shards_of, start_vector
    from lightning_rmt.krylov.reductions import inner_products, subtract_combination
    from lightning_rmt.krylov.tridiagonal import NonFiniteError

    if first.size != second.size:
        raise ValueError(f"the halves' operators must be of one size, got {first.size} and {second.size}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    shards = shards_of(first)
    kept = 0 if outliers is None else outliers.shape[0]
    chosen = min(resolved, kept)
    if kept >= first.size:
        raise ValueError(f"all {first.size} directions are outliers, which leaves none for the noise of the bulk")

    for half in (first, second):
        if (reserve := getattr(half, "reserve", None)) is not None:  # while all processes are fine
            reserve(probes + chosen)

    # Between two collectives a process that fails alone goes on (`Shards.attempt`): the others wait for it.
    def inner(rows: Any, vectors: Any) -> Any:
        """Inner products over all processes, shape (vectors, rows), in one all-reduce."""
        nan = vectors.new_full((len(vectors), len(rows)), math.nan).double()
        parts = shards.attempt(lambda: _stacked([inner_products(rows, vector) for vector in vectors]), nan)
        return shards.total(parts.reshape(-1)).reshape(nan.shape)

    def project(vectors: Any) -> None:
        """Takes the outliers' directions out, in place."""
        if kept:
            coefficients = inner(outliers, vectors)

            def subtract() -> None:
                for vector, coefficient in zip(vectors, coefficients, strict=True):
                    subtract_combination(vector, outliers, coefficient)

            shards.attempt(subtract, None)

    drawn = [start_vector(first, seed + 104_729 * (1 + probe)) for probe in range(probes)]
    failed = drawn[0].new_full((1, 1), math.nan).expand(probes + chosen, drawn[0].shape[0])
    vectors = shards.attempt(lambda: _stacked([*drawn, *([] if outliers is None else outliers[:chosen])]), failed)
    project(vectors[:probes])
    overlaps = inner(vectors[:probes], vectors[:probes])
    one, other = first.matmat(vectors), second.matmat(vectors)
    noise = shards.attempt(lambda: one - other, failed)
    moved = inner(noise[probes:], noise[probes:]).diagonal() if chosen else None
    along = inner(vectors[probes:], noise[probes:]).diagonal() if chosen else None
    project(noise[:probes])
    products = inner(noise[:probes], noise[:probes])
    shards.attempt(lambda: noise.square_(), None)
    fourth = inner(noise, noise).diagonal()
    for half in (first, second):
        shards_of(half).settle()
    if not all(bool(found.isfinite().all()) for found in (products, fourth, moved, along) if found is not None):
        raise NonFiniteError("the difference of the halves' products is NaN or infinite")

    # the halves' difference has both their noises
    scale, error = _scale_and_error(products / 2.0, overlaps, fourth[:probes] / 4.0)
    anisotropy = spread = outlier = None
    if along is not None:
        outlier = math.sqrt(float((along**2).mean()) / 2.0)
    if moved is not None and along is not None and scale > 0.0:
        across = float(((moved - along**2) / 2.0).clamp(min=0.0).mean())
        anisotropy = across / scale**2
        if error is not None and across > 0.0:
            # independent Gaussian entries w: the variance of |w|^2 is 2 sum E[w^2]^2 = (2/3) sum E[w^4]
            entries = math.sqrt(2.0 / 3.0 * float(fourth[probes:].sum())) / 2.0 / chosen
            spread = anisotropy * math.hypot(2.0 * error / scale, entries / across)
    sizes = [getattr(operator, "samples", None) for operator in (first, second)]
    size = 2.0 / (1.0 / sizes[0] + 1.0 / sizes[1]) if sizes[0] and sizes[1] else None
    return NoiseScale(scale, error, size, anisotropy, float(probes + chosen), spread, outlier)


def _stacked(vectors: list[Any]) -> Any:
    """Shape (k, n) from k vectors."""
    rows = vectors[0].new_empty(len(vectors), vectors[0].shape[0])
    for row, vector in zip(rows, vectors, strict=True):
        row.copy_(vector)
    return rows


def _scale_and_error(products: Any, overlaps: Any, fourth: Any) -> tuple[float, float | None]:
    """The root of the mean of ``z'N^2 z / z'z`` over the vectors z, and its standard error.

    How much the squares of k vectors differ says how well their mean is known (the jackknife, with k - 1 degrees of
    freedom), and so do the k (k - 1) / 2 products of different vectors, ``y'N^2 z``: turning two vectors into their sum and
    difference makes one of the other, so that both have the same variance, up to a factor of two, in every direction.

    Args:
        products: ``y'N^2 z`` of all pairs, shape (k, k).
        overlaps: ``y'z`` of all pairs, shape (k, k).
        fourth: sums of the fourth powers of Nz's entries, shape (k,): independent Gaussian entries would have a variance of
            two thirds of it, and correlated ones have more. With few vectors the differences alone are too small by chance.
    """
    count = len(products)
    lengths = overlaps.diagonal().sqrt()
    products, overlaps = (matrix / lengths[:, None] / lengths for matrix in (products, overlaps))
    mean = float(products.diagonal().mean())
    scale = math.sqrt(mean)
    if count < FEWEST_FOR_ERROR:
        return scale, None
    apart = products - mean * overlaps  # zero where N^2 is a multiple of the identity
    variance = float((apart**2).sum()) / (count - 1 + count * (count - 1) / 2)
    variance = max(variance, 2.0 / 3.0 * float((fourth / lengths**4).mean()))
    return scale, math.sqrt(variance / count) / (2.0 * scale) if scale else 0.0
