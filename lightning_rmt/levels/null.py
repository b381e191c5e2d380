"""What the statistics are for GOE levels, simulated once and kept in ``goe_null.npz``.

A window of k consecutive levels from the middle of a GOE matrix of at least 1.6 k levels (the tridiagonal model of
`Semicircle.rvs`) goes through the same unfolding as the data. Large matrices give several windows side by side, whose
statistics are independent for all that matters here. Independent levels are simulated too, for Brody's exponent.

``python -m lightning_rmt.levels.null`` writes the table again, in about a quarter of an hour on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.levels.long_range import number_variance, rigidity
from lightning_rmt.levels.reference import (
    FILE,
    LONG_RANGE_LEVELS,
    NUMBER_VARIANCE_LENGTHS,
    RIGIDITY_LENGTH,
    SIZES,
    TAILS,
)
from lightning_rmt.levels.spacings import anderson_darling, brody_exponent
from lightning_rmt.levels.unfolding import unfold, unfold_trend

#: Simulated windows for each size, and seed.
_WINDOWS_OF = {25: 20_000, 200: 8_000, 560: 3_000, 1130: 1_000, 2260: 400}
_SEED = 20240
#: From so many levels on, quantiles are smoothed over the number of levels.
_SMOOTH_FROM = 200
#: Middle share of a simulated matrix that windows are taken from.
_MIDDLE = 0.625


def goe_windows(k: int, count: int, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Windows of ``k`` consecutive levels from the middle of simulated GOE matrices.

    Args:
        k: levels in a window.
        count: number of windows.
        rng: source of randomness.
    """
    size = max(int(np.ceil(k / _MIDDLE)), 320)
    windows: list[NDArray[np.float64]] = []
    while len(windows) < count:
        levels = Semicircle(2.0).rvs(size, rng)
        beside = int(size * _MIDDLE + 1e-9) // k
        start = (size - beside * k) // 2
        windows += [levels[start + j * k : start + (j + 1) * k] for j in range(beside)]
    return windows[:count]


def window_statistics(levels: NDArray[np.float64]) -> dict[str, float]:
    """The statistics of one window, by the names in the table."""
    spacings = unfold(levels)
    found = {
        "anderson_darling": anderson_darling(spacings),
        "brody": brody_exponent(spacings),
        "spacing_variance": float(spacings.var()),
    }
    if levels.size >= LONG_RANGE_LEVELS:
        positions = np.append(0.0, np.cumsum(unfold_trend(levels)))
        for length in NUMBER_VARIANCE_LENGTHS:
            found[f"number_variance_{length:.0f}"] = number_variance(positions, length)
        found["rigidity"] = rigidity(positions, RIGIDITY_LENGTH)
    return found


def simulate(k: int, count: int, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Statistics of ``count`` GOE windows of ``k`` levels, each of shape (count,)."""
    rows = [window_statistics(levels) for levels in goe_windows(k, count, rng)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def build(counts: dict[int, int], sizes: tuple[int, ...] = SIZES) -> dict[str, NDArray[np.float64]]:
    """The table: quantiles of shape (sizes, tails), and mean and sd of the others, shape (sizes, 2).

    Args:
        counts: windows to simulate, by the smallest size that gets so few.
        sizes: levels in a window.
    """
    quantiles, rows = [], []
    for k in sizes:
        count = counts[max(size for size in counts if size <= k)]
        rng = np.random.default_rng([_SEED, k])
        found = simulate(k, count, rng)
        found["brody_poisson"] = np.array(
            [brody_exponent(unfold(rng.exponential(size=k).cumsum())) for _ in range(2000)]
        )
        quantiles.append(np.quantile(found.pop("anderson_darling"), 1 - np.array(TAILS)))
        rows.append({name: (values.mean(), values.std()) for name, values in found.items()})
    nothing = (np.nan, np.nan)
    table = {name: np.array([row.get(name, nothing) for row in rows]) for name in rows[-1]}
    weights = [counts[max(size for size in counts if size <= k)] for k in sizes]
    return {"quantiles": _smoothed(np.array(quantiles), sizes, weights), **table}


def _smoothed(quantiles: NDArray[np.float64], sizes: Sequence[int], weights: Sequence[int]) -> NDArray[np.float64]:
    """Quantiles for 200 levels and more, of which fewer could be simulated, as a smooth function of their number.

    The surmise isn't quite the distribution of GOE spacings, so that the statistic's mean grows like k and its standard
    deviation like the root of a quadratic in root k: ``a + b sqrt(k) + c k`` fits every quantile within its error.
    """
    large = np.array(sizes) >= _SMOOTH_FROM
    if large.sum() < 6:
        return quantiles
    root = np.sqrt(np.array(sizes)[large])
    basis = np.stack([np.ones_like(root), root, root**2], axis=1)
    weight = np.sqrt(np.array(weights)[large])[:, None]
    fit = np.linalg.lstsq(basis * weight, quantiles[large] * weight, rcond=None)[0]
    smooth = quantiles.copy()
    smooth[large] = basis @ fit
    return smooth


if __name__ == "__main__":
    with as_file(files("lightning_rmt.levels") / FILE) as target:
        np.savez_compressed(target, **build(_WINDOWS_OF))  # type: ignore[arg-type]
