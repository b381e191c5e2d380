"""Edges of a compact bulk from the late Lanczos coefficients, behind two gates.

For a spectral measure on one interval the coefficients settle at ``(a + b)/2`` and ``(b - a)/4`` (Mate, Nevai and Totik
1985), whatever outliers there are; Abi Younes, Ding and Trogdon (2025) count spikes with it. Networks mostly have heavy
tailed bulks, whose coefficients never settle: an edge read from them moves with the number of steps. Two gates keep those
out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal

#: Fewest steps from which late coefficients are read.
MIN_STEPS = 24
#: Gate 1: largest coefficient of variation of the late beta.
MAX_VARIATION = 0.05
#: Gate 2: largest shift of either edge between the last two stretches of the run, in bulk widths.
MAX_DRIFT = 0.03


@dataclass(frozen=True)
class CoefficientEdge:
    """Edges of the bulk as the late coefficients give them, and whether they may be believed.

    Attributes:
        low: lower edge.
        high: upper edge.
        margin: a Ritz value must lie further out than this to count as an outlier.
        variation: coefficient of variation of beta over the second half of the run.
        drift: larger of the two edges' shifts between the second and the last half, in bulk widths.
    """

    low: float
    high: float
    margin: float
    variation: float
    drift: float

    @property
    def converged(self) -> bool:
        """Whether both gates are passed."""
        return self.variation < MAX_VARIATION and self.drift <= MAX_DRIFT

    def mirrored(self) -> CoefficientEdge:
        """The edges of ``-H``."""
        return CoefficientEdge(-self.high, -self.low, self.margin, self.variation, self.drift)


def coefficient_edge(run: Tridiagonal, size: int) -> CoefficientEdge | None:
    """Edges from the late coefficients, or None for a run too short to have any.

    Args:
        run: a reorthogonalised run of m steps.
        size: n.
    """
    m = run.steps
    if m < MIN_STEPS:
        return None
    alpha, beta = run.alpha, run.beta
    upper, lower = alpha + 2 * beta, alpha - 2 * beta
    late, earlier = np.arange(m // 2, m - 1), np.arange(m // 4, m // 2)
    width = float(np.median(upper[late]) - np.median(lower[late]))
    if width <= 0 or beta[late].mean() <= 0:
        return None
    variation = float(beta[late].std() / beta[late].mean())
    drift = max(abs(float(np.median(u[late]) - np.median(u[earlier]))) for u in (upper, lower)) / width

    extra = 0.0
    if m / size > 0.003 and m >= 100:
        # beta_j falls like sqrt(1 - j/n): extrapolate the edges back to the first step, never inside the medians.
        trend = np.arange(m // 3, m - 1)
        high = max(_at_first_step(trend, upper[trend]), float(np.median(upper[trend])))
        low = min(_at_first_step(trend, lower[trend]), float(np.median(lower[trend])))
    else:
        centre = float(np.median(alpha[late]))
        radius = 2 * float(np.median(beta[late] / math.sqrt(max(1 - 0.75 * m / size, 0.25))))
        low, high = centre - radius, centre + radius
        extra = 0.02 if m / size > 0.003 else 0.0
    width = high - low
    scatter = float(np.median(np.abs(upper[late] - np.median(upper[late]))))
    # The edge is off by about a percent, and the outermost level of a random bulk fluctuates about the edge (by less than
    # this in 99 of 100 draws of the GOE and of white sample covariances; Tracy and Widom 1996): the two add.
    margin = max((0.01 + extra) * width, 3 * scatter / math.sqrt(m / 3)) + width * size ** (-2 / 3)
    return CoefficientEdge(low, high, margin, variation, drift)


def _at_first_step(steps: NDArray[np.intp], values: NDArray[np.float64]) -> float:
    """Robust line (slope from the medians of the two halves, median intercept) at step 0."""
    half = steps.size // 2
    slope = (np.median(values[half:]) - np.median(values[:half])) / (np.median(steps[half:]) - np.median(steps[:half]))
    return float(np.median(values - slope * steps))
