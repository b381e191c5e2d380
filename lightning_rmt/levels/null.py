"""What the statistics are for GOE levels, simulated once and kept in ``goe_null.npz``.

A window of k consecutive levels from the middle of a GOE matrix of at least 1.6 k levels (the tridiagonal model of
`Semicircle.rvs`) goes through the same unfolding as the data. Large matrices give several windows side by side, whose
statistics are independent for all that matters here. Independent levels are simulated too, for Brody's exponent.

``python -m lightning_rmt.levels.null`` writes the table again, in about half an hour on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.levels.long_range import number_variance, rigidity
from lightning_rmt.levels.spacings import anderson_darling, brody_exponent
from lightning_rmt.levels.unfolding import unfold, unfold_trend

#: Levels for which the null was simulated; in between it is interpolated in log k.
SIZES = (25, 35, 50, 70, 100, 140, 200, 280, 400, 560, 800, 1130, 1600, 2260, 3200, 4096)
#: Upper tail probabilities at which quantiles of the Anderson-Darling statistic are kept.
TAILS = (
    0.999,
    0.99,
    0.95,
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.15,
    0.1,
    0.07,
    0.05,
    0.03,
    0.02,
    0.01,
    0.005,
    0.002,
)
#: The smallest p that is given as a number. Below the last of `TAILS` the tail is continued as an exponential.
SMALLEST_P = 1e-4
#: Fewest levels for number variance and rigidity, and their windows in mean spacings.
LONG_RANGE_LEVELS = 400
NUMBER_VARIANCE_LENGTHS = (3.0, 10.0)
RIGIDITY_LENGTH = 15.0
#: Simulated windows for each size, and seed.
_WINDOWS_OF = {25: 40_000, 200: 20_000, 560: 8_000, 1130: 3_000, 2260: 1_000}
_SEED = 20240
#: Middle share of a simulated matrix that windows are taken from.
_MIDDLE = 0.625
_FILE = "goe_null.npz"


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a statistic under a null."""

    mean: float
    sd: float


def p_value(statistic: float, k: int) -> float:
    """Share of GOE windows of ``k`` levels whose Anderson-Darling statistic is at least this, never below `SMALLEST_P`.

    Raises:
        ValueError: ``k`` is outside the table, 25 to 4096.
    """
    _check(k)
    quantiles = np.array([_at(k, column) for column in _table()["quantiles"].T])
    if statistic <= quantiles[-1]:
        return float(np.exp(np.interp(statistic, quantiles, np.log(TAILS), left=0.0)))
    decade = TAILS.index(0.02)
    rate = np.log(TAILS[decade] / TAILS[-1]) / (quantiles[-1] - quantiles[decade])
    return float(max(SMALLEST_P, TAILS[-1] * np.exp(-rate * (statistic - quantiles[-1]))))


def moments(name: str, k: int) -> Moments:
    """Mean and sd of a statistic over windows of ``k`` levels.

    Args:
        name: for GOE, ``"brody"``, ``"spacing_variance"`` and, from k = 400, ``"number_variance_3"``,
            ``"number_variance_10"`` and ``"rigidity"``; for independent levels, ``"brody_poisson"``.
        k: number of levels.

    Raises:
        ValueError: ``k`` is outside the table.
    """
    _check(k)
    mean, sd = (_at(k, column) for column in _table()[name].T)
    return Moments(mean, sd)


def in_table(k: int) -> bool:
    """Whether the null was simulated around ``k`` levels."""
    return SIZES[0] <= k <= SIZES[-1]


def _check(k: int) -> None:
    if not in_table(k):
        raise ValueError(f"the null was simulated for {SIZES[0]} to {SIZES[-1]} levels, not for {k}")


def _at(k: int, column: NDArray[np.float64]) -> float:
    known = np.isfinite(column)
    return float(np.interp(np.log(k), np.log(np.array(SIZES))[known], column[known]))


@cache
def _table() -> dict[str, NDArray[np.float64]]:
    with as_file(files("lightning_rmt.levels") / _FILE) as path, np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name], dtype=np.float64) for name in archive}


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


def build(counts: dict[int, int]) -> dict[str, NDArray[np.float64]]:
    """The table: quantiles of shape (sizes, tails), and mean and sd of the others, shape (sizes, 2).

    Args:
        counts: windows to simulate, by the smallest size that gets so few.
    """
    quantiles, rows = [], []
    for k in SIZES:
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
    return {"quantiles": np.array(quantiles), **table}


if __name__ == "__main__":
    with as_file(files("lightning_rmt.levels") / _FILE) as target:
        np.savez_compressed(target, **build(_WINDOWS_OF))  # type: ignore[arg-type]
