"""What the statistics are for GOE and for independent levels: the table that ``null`` has simulated.

Tail probabilities are simulated down to .002 and continued as an exponential to 1e-4. They rest on 20 000 windows for each
size up to 140 levels, 8000 up to 400, 3000 up to 800, 1000 up to 1600 and 400 beyond, smoothed over the sizes from 200 on:
p = .01 is good to some 7 % of itself at 100 levels, 10 % at 400 and 20 % at 4000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

#: Levels for which the null was simulated; in between it is interpolated in log k.
SIZES = (25, 35, 50, 70, 100, 140, 200, 280, 400, 560, 800, 1130, 1600, 2260, 3200, 4096)
#: Upper tail probabilities at which quantiles of the Anderson-Darling statistic are kept.
# fmt: off
TAILS = (
    0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002
)
# fmt: on
#: The smallest p that is given as a number. Below the last of `TAILS` the tail is continued as an exponential.
SMALLEST_P = 1e-4
#: Fewest levels for number variance and rigidity, and their windows in mean spacings.
LONG_RANGE_LEVELS = 400
NUMBER_VARIANCE_LENGTHS = (3.0, 10.0)
RIGIDITY_LENGTH = 15.0
FILE = "goe_null.npz"


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a statistic under a null."""

    mean: float
    sd: float


def p_value(statistic: float, k: int) -> float:
    """Share of GOE windows of ``k`` levels whose Anderson-Darling statistic is at least this, never below `SMALLEST_P`.

    Raises:
        ValueError: ``k`` is outside the table, 25 to 4096, or the statistic is no number.
    """
    _check(k)
    if np.isnan(statistic):
        raise ValueError("the Anderson-Darling statistic is not a number: spacings are zero or not finite")
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
    with as_file(files("lightning_rmt.levels") / FILE) as path, np.load(path, allow_pickle=False) as archive:
        return {name: np.asarray(archive[name], dtype=np.float64) for name in archive}
