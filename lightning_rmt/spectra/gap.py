"""The widest gap among the largest levels, measured in local log spacings.

For the gap below the K-th level that is

    F_K = K log(l_K / l_{K+1}) / mean_{i = K+1 .. K+10} i log(l_i / l_{i+1}).

Under any power law ``i log(l_i / l_{i+1})`` has a constant mean (Renyi's representation), so no K is preferred; thinner
tails only make F smaller. F needs exact levels, not Lanczos coefficients, so it depends neither on the number of steps nor
on the probe. It is invariant under scaling but not under a shift: zero means something for a Hessian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.spectra.levels import RESOLVED_SHARE, SIMPLE_WEIGHT, RitzLevels

#: Largest group that is looked for.
MAX_GROUP = 32
#: Levels after the gap that set the local spacing, and the fewest that will do.
FOLLOWERS, MIN_FOLLOWERS = 10, 5
#: A clear gap: at least this many local spacings and this ratio. At most 4 % false under an uncorrelated heavy tail.
CLEAR_SPACINGS, CLEAR_RATIO = 10.0, 1.1
#: A likely gap. Up to 24 % false under an uncorrelated heavy tail, none in 4000 where levels repel.
LIKELY_SPACINGS, LIKELY_RATIO = 5.0, 1.5
#: Converged levels nearer than this (relative) count as one in the gap statistic.
NEAR_DEGENERATE = 1e-3
#: A level is converged, although it isn't in the resolved prefix, when its residual is below this share of it.
CONVERGED_RESIDUAL = 1e-4
#: A quadrature node of weight w stands for about this many levels times n w.
LEVELS_PER_WEIGHT = 0.25


@dataclass(frozen=True)
class Gap:
    """The gap below the K-th of the levels (near-degenerate ones taken together).

    Attributes:
        levels: how many are above it.
        ratio: of the values at both sides.
        spacings: its width F.
        grade: 2 clear, 1 likely, 0 neither.
        unresolved: the levels behind it, which set the local spacing, were mostly not resolved.
        p_scale_free: bound on the probability of such a gap under an uncorrelated Pareto tail.
        next_value: the level below it.
        multiplicity: of that level, 1 unless it is a clump.
    """

    levels: int
    ratio: float
    spacings: float
    grade: int
    unresolved: bool
    p_scale_free: float
    next_value: float
    multiplicity: float


def widest_gap(levels: RitzLevels, size: int) -> Gap | None:
    """The largest F among all gaps that may be looked at; graded gaps go before others."""
    ladder = _ladder(levels, size)
    if ladder is None:
        return None
    gaps = [gap for gap in (_gap_below(ladder, k) for k in range(1, ladder.reach + 1)) if gap is not None]
    if not gaps:
        return None
    return max(gaps, key=lambda gap: (gap.grade > 0, gap.spacings if gap.ratio >= CLEAR_RATIO else 0.0))


@dataclass(frozen=True, eq=False)
class _Ladder:
    """Positive levels in descending order on the axis of their index, all arrays of one length.

    A converged simple level takes one place on that axis, a clump its multiplicity, and an unresolved node as many
    places as its weight stands for.
    """

    values: NDArray[np.float64]
    residuals: NDArray[np.float64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    multiplicity: NDArray[np.float64]
    clump: NDArray[np.bool_]
    ambiguous: NDArray[np.bool_]
    distinct: NDArray[np.intp]  # number of distinct levels before each entry
    reach: int  # last K that may be looked at


def _ladder(levels: RitzLevels, size: int) -> _Ladder | None:
    values, residuals = levels.values[::-1], levels.residuals[::-1]
    count = int((values > levels.floor).sum())
    if count == 0:
        return None
    values, residuals = values[:count], residuals[:count]
    mass, copies = size * levels.weights[::-1][:count], levels.copies[::-1][:count]
    resolved = min(levels.resolved_high, count)
    converged = (np.arange(count) < resolved) | (residuals <= CONVERGED_RESIDUAL * values)

    first = [0]
    for i in range(1, count):
        near = values[first[-1]] - values[i] < NEAR_DEGENERATE * values[first[-1]]
        if not (near and converged[i] and converged[first[-1]]):
            first.append(i)
    head = np.array(first)
    mass, copies = np.add.reduceat(mass, head), np.add.reduceat(copies, head)
    values, residuals, converged = values[head], residuals[head] + levels.rounding, converged[head]

    heavy = mass > SIMPLE_WEIGHT
    clump = converged & (heavy | (copies >= 3))
    expected = LEVELS_PER_WEIGHT * mass
    multiplicity = np.where(
        converged,
        np.where(clump, np.maximum(copies, np.where(heavy, expected, 0.0)), 1.0),
        np.maximum(1.0, expected),
    )
    half = np.where(converged, 0.5, multiplicity / 2)
    length = np.where(clump, multiplicity - 1, 0.0)
    end = 0.5 + np.cumsum(2 * half + length) - half
    start = end - length

    reach = min(int((head < resolved).sum()), MAX_GROUP, head.size - 1)
    if clump.any():
        reach = min(reach, int(np.argmax(clump)))  # never count past a degenerate level
    return _Ladder(values, residuals, start, end, multiplicity, clump, ~converged & ~heavy, head, reach)


def _gap_below(ladder: _Ladder, k: int) -> Gap | None:
    """The gap between the k-th and the next level, or None where it can't be judged."""
    value, following = float(ladder.values[k - 1]), float(ladder.values[k])
    uncertainty = float(ladder.residuals[k])
    if uncertainty > RESOLVED_SHARE * (value - following):
        return None
    base = ladder.start[k]
    available = ladder.end[-1] - base
    if available < MIN_FOLLOWERS:
        return None
    followers = int(min(FOLLOWERS, available))
    places = np.stack([ladder.start[k:], ladder.end[k:]], axis=1).ravel()
    read = np.interp(base + np.arange(followers + 1), places, np.repeat(ladder.values[k:], 2))
    spacings = (k + 1 + np.arange(followers)) * np.log(read[:-1] / read[1:])
    ratio = value / (following + uncertainty)
    # Spacings inside a clump are zero; none below the tolerance for degeneracy is told from that.
    width = k * math.log(ratio) / max(float(spacings.mean()), NEAR_DEGENERATE) if ratio > 1 else 0.0

    entry = np.interp(base + np.arange(1, followers + 1), ladder.start[k:], np.arange(k, ladder.values.size))
    entry_index = np.minimum(np.ceil(entry - 1e-9).astype(int), ladder.values.size - 1)
    unresolved = float(ladder.ambiguous[entry_index].mean()) > 0.5
    grade = 0
    if width >= CLEAR_SPACINGS and ratio >= CLEAR_RATIO:
        grade = 2
    elif width >= LIKELY_SPACINGS and ratio >= LIKELY_RATIO and not unresolved:
        grade = 1
    return Gap(
        levels=int(ladder.distinct[k]),
        ratio=ratio,
        spacings=width,
        grade=grade,
        unresolved=unresolved,
        p_scale_free=min(1.0, MAX_GROUP * (1 + width / followers) ** -followers),
        next_value=following,
        multiplicity=float(ladder.multiplicity[k]) if ladder.clump[k] else 1.0,
    )
