"""Which Ritz values are eigenvalues: residuals, resolved prefixes, certificates.

Two notions, both read from the ends of the spectrum inwards, because Lanczos converges from the ends:

* *resolved*: the residual is at most a tenth of the distance to the neighbouring Ritz values. Enough to count levels and
  to know their quadrature weights.
* *certified*: resolved, and the residual is below 5e-9 of the value (or below the rounding of the product where that is
  coarser). Enough to quote the value to 1e-8. The Kato-Temple bound ``residual^2 / gap`` would certify a step or two
  earlier, but it holds for the gap to the next *eigenvalue*: two eigenvalues that the run has not told apart show as one
  Ritz value somewhere between them, far from the next one, until the second comes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal

#: A level is resolved when its residual is at most this share of the distance to its neighbours.
RESOLVED_SHARE = 0.1
#: Spacing statistics want every level of a run to within this share of the local mean spacing, taken over so many gaps.
SPACING_SHARE, SPACING_GAPS = 0.02, 5
#: Largest residual of a certified level, relative to its value (rounding of the product comes on top).
CERTIFIED_RESIDUAL = 5e-9
#: Values below this share of the largest are never certified: float64 products round at about 4e-15 of the largest, which
#: is 4e-9 of such a value.
CERTIFIED_FLOOR = 1e-6
#: A simple eigenvalue's weight times n is chi-squared with one degree of freedom: above 16 with probability 6e-5.
SIMPLE_WEIGHT = 16.0
#: A Ritz value with less than this share of its neighbour's weight, and not told from it, is a copy made by rounding.
COPY_WEIGHT = 1e-6


@dataclass(frozen=True)
class Level:
    """An outermost Ritz value and how well it is known.

    Attributes:
        value: in the operator's units.
        residual: an eigenvalue lies within this of ``value``: ``|H y - theta y|`` plus the rounding of the product.
        certified: an eigenvalue lies within 1e-8 of the value, relatively (the product's own rounding where that is more),
            and no level was seen further out. A degenerate eigenvalue is one level; so are two within the residual.
    """

    value: float
    residual: float
    certified: bool


def noise_floor(noise: float) -> float:
    """Share of the largest eigenvalue below which a value is not told from zero: 1e-5 for float32, 1e-10 for float64."""
    return max(1e-10, 4 * noise)


@dataclass(frozen=True, eq=False)
class RitzLevels:
    """Distinct Ritz values of one run, ascending, with what is known of each.

    Attributes:
        values: shape (k,), float64. Copies of one eigenvalue, as far as rounding can tell, are one entry.
        residuals: shape (k,), ``|H y - theta y|`` as the iteration knows it; `rounding` comes on top.
        weights: shape (k,), quadrature weights, summed over copies.
        copies: shape (k,), how many Ritz values were merged.
        resolved_high: number of resolved levels from the largest value down.
        resolved_low: number of resolved levels from the smallest value up.
        scale: largest magnitude.
        noise: relative rounding error of a product.
        complete: every eigenvalue that the start vector sees is here (an exhausted run, or exact levels).
        steps: Lanczos steps, or None for exact levels.
    """

    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    weights: NDArray[np.float64]
    copies: NDArray[np.intp]
    resolved_high: int
    resolved_low: int
    scale: float
    noise: float
    complete: bool
    steps: int | None

    @property
    def rounding(self) -> float:
        """Error of a product, in the operator's units."""
        return self.noise * self.scale

    @property
    def floor(self) -> float:
        """Magnitude below which a value is not told from zero, in the operator's units."""
        return noise_floor(self.noise) * self.scale

    def certified(self) -> NDArray[np.bool_]:
        """Which levels are certified, shape (k,); a value at the noise floor never is."""
        index = np.arange(self.values.size)
        resolved = (index < self.resolved_low) | (index >= self.values.size - self.resolved_high)
        magnitude = np.abs(self.values)
        exact = self.residuals <= max(CERTIFIED_RESIDUAL, self.noise) * magnitude
        return resolved & exact & (magnitude > max(CERTIFIED_FLOOR * self.scale, self.floor))

    def level(self, index: int) -> Level:
        """One entry as a `Level`; negative indices count from the largest value."""
        return Level(
            float(self.values[index]), float(self.residuals[index]) + self.rounding, bool(self.certified()[index])
        )

    def spacing_run(self) -> int:
        """Number of levels from the largest down that are known well enough for their spacings to be.

        Each is resolved, and its residual is below 0.02 of the mean of the five gaps on its outer side (those levels are
        known already; the next one further in may not be). Such runs were never seen to skip an eigenvalue.
        """
        descending = self.values[::-1][: self.resolved_high]
        if descending.size < 2:
            return 0
        gaps = -np.diff(descending)
        total = np.append(0.0, np.cumsum(gaps))
        place = np.maximum(np.arange(descending.size), 1)  # the outermost has nothing beyond it
        first = np.maximum(place - SPACING_GAPS, 0)
        spacing = (total[place] - total[first]) / (place - first)
        error = self.residuals[::-1][: self.resolved_high] + self.rounding
        return _prefix(error <= SPACING_SHARE * spacing)

    def mirrored(self) -> RitzLevels:
        """The levels of ``-H``."""
        return RitzLevels(
            values=-self.values[::-1],
            residuals=self.residuals[::-1],
            weights=self.weights[::-1],
            copies=self.copies[::-1],
            resolved_high=self.resolved_low,
            resolved_low=self.resolved_high,
            scale=self.scale,
            noise=self.noise,
            complete=self.complete,
            steps=self.steps,
        )


def ritz_levels(run: Tridiagonal, noise: float) -> RitzLevels:
    """Distinct Ritz values of a run.

    Args:
        run: a finished Lanczos run.
        noise: relative rounding error of a product (4.4e-15 for float64, 2.4e-6 for float32).
    """
    return _distinct(run.nodes, run.residuals, run.weights, noise, run.exhausted, run.steps)


def exact_levels(eigenvalues: ArrayLike, noise: float = 20 * np.finfo(np.float64).eps) -> RitzLevels:
    """Exact eigenvalues (all of them, in any order) in the form that the rules read, so that one rule judges both."""
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError("expected a non-empty vector of finite eigenvalues")
    weights = np.full(values.size, 1 / values.size)
    return _distinct(values, np.zeros(values.size), weights, noise, True, None)


def _distinct(
    values: NDArray[np.float64],
    residuals: NDArray[np.float64],
    weights: NDArray[np.float64],
    noise: float,
    complete: bool,
    steps: int | None,
) -> RitzLevels:
    scale = float(np.abs(values).max())
    rounding = noise * scale
    values, raw, weights, copies = _without_copies(values, residuals, weights, rounding)
    room = _nearest(np.diff(values))
    resolved = raw + rounding <= RESOLVED_SHARE * room
    return RitzLevels(
        values=values,
        residuals=raw,
        weights=weights,
        copies=copies,
        resolved_high=_prefix(resolved[::-1]),
        resolved_low=_prefix(resolved),
        scale=scale,
        noise=noise,
        complete=complete,
        steps=steps,
    )


def _without_copies(
    values: NDArray[np.float64], residuals: NDArray[np.float64], weights: NDArray[np.float64], rounding: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Merges Ritz values that stand for one eigenvalue.

    Rounding lets further copies of a degenerate eigenvalue in, late. Copies that have arrived are within rounding of each
    other, all of them: where products are so imprecise that a whole bulk is a chain of such neighbours, it isn't one
    eigenvalue. One on its way is betrayed by its weight: it comes from rounding errors alone, while another eigenvalue that
    happens to be so near would have about the weight of its neighbour.
    """
    copies = np.ones(values.size, dtype=np.intp)
    while values.size > 1:
        gaps = np.diff(values)
        arrived = _clusters(values, 2 * rounding)
        beside = np.minimum(np.append(np.inf, gaps[:-1]), np.append(gaps[1:], np.inf))  # from a pair to the others
        worse = np.maximum(residuals[1:], residuals[:-1])
        light = np.minimum(weights[1:], weights[:-1]) <= COPY_WEIGHT * np.maximum(weights[1:], weights[:-1])
        on_its_way = light & (gaps <= worse + 10 * rounding) & (worse <= RESOLVED_SHARE * beside)
        same = arrived | on_its_way
        if not same.any():
            break
        first = np.flatnonzero(np.append(True, ~same))
        ends = np.append(first[1:], values.size)
        heaviest = [a + int(np.argmax(weights[a:b])) for a, b in zip(first, ends, strict=True)]
        values, residuals = values[heaviest], np.minimum.reduceat(residuals, first)
        weights, copies = np.add.reduceat(weights, first), np.add.reduceat(copies, first)
    return values, residuals, weights, copies


def _clusters(values: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Which neighbours belong together, shape (k - 1,): chains of gaps within the tolerance that aren't long themselves."""
    near = np.diff(values) <= tolerance
    first = np.flatnonzero(np.append(True, ~near))
    ends = np.append(first[1:], values.size)
    for a, b in zip(first, ends, strict=True):
        if values[b - 1] - values[a] > 2 * tolerance:
            near[a : b - 1] = False
    return near


def _nearest(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance to the nearer neighbour from the gaps between them; infinite towards the outside."""
    return np.minimum(np.append(np.inf, gaps), np.append(gaps, np.inf))


def _prefix(flags: NDArray[np.bool_]) -> int:
    """Length of the leading run of True."""
    return int(flags.size if flags.all() else np.argmin(flags))
