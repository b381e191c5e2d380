"""How many eigenvalues stand apart from the rest: a count, or a refusal in words.

Where the late Lanczos coefficients settle, the bulk has an edge and outliers are what lies beyond it (``bulk_edge``).
Elsewhere, as on nearly every trained network, the only thing that can be counted is the group above the largest relative
gap among resolved levels (``gap``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.spectra.bulk_edge import CoefficientEdge
from lightning_rmt.spectra.gap import (
    CLEAR_SPACINGS,
    FOLLOWERS,
    LIKELY_RATIO,
    LIKELY_SPACINGS,
    MAX_GROUP,
    Gap,
    widest_gap,
)
from lightning_rmt.spectra.levels import RESOLVED_SHARE, SIMPLE_WEIGHT, Level, RitzLevels, exact_levels

#: With fewer Lanczos steps a wider gap may still be hidden further in: the count is a lower bound, unless all levels that
#: could matter are resolved.
STEPS_FOR_COUNT = 100


@dataclass(frozen=True, eq=False)
class OutlierSide:
    """What stands apart at one end of the spectrum.

    Attributes:
        count: number of outliers, None where none can be given (``verdict`` says why).
        values: the outliers, outermost first, float64, shape (count,); empty without a count.
        levels: the same with residuals and certificates.
        kind: ``"edge"``: beyond a bulk edge; ``"gap"``: above the largest relative gap; ``"none"``: no count.
        confidence: 2 clear, 1 likely (or a lower bound), 0 no count.
        gap_index: number of levels above the widest gap in local log spacings, counted or not; None where no gap could be
            looked at.
        gap_ratio: ratio of the values at both sides of that gap.
        gap_spacings: its width F in local log spacings.
        p_scale_free: bound on the probability of such a gap anywhere among the levels looked at under an uncorrelated
            Pareto tail (exact for one K, Bonferroni over K).
        at_least: the count is a lower bound.
        unresolved: the levels that decide were in part not resolved.
        edge: where the bulk begins: the bulk edge (kind "edge"), the largest level that is no outlier (kind "gap"), or None.
        verdict: one sentence for the user.
    """

    count: int | None
    values: NDArray[np.float64]
    levels: tuple[Level, ...]
    kind: Literal["edge", "gap", "none"]
    confidence: int
    gap_index: int | None
    gap_ratio: float | None
    gap_spacings: float | None
    p_scale_free: float | None
    at_least: bool
    unresolved: bool
    edge: float | None
    verdict: str


@dataclass(frozen=True, eq=False)
class Outliers:
    """Outliers at both ends; statements about the operator that was probed, here a curvature batch."""

    high: OutlierSide
    low: OutlierSide


@dataclass(frozen=True)
class BulkEdges:
    """Where the bulk ends. One definition at a time, never substituted for each other.

    Attributes:
        low: lower edge, None where there is none to give.
        high: upper edge, None where there is none to give.
        definition: ``"edge"``: limits of the late Lanczos coefficients; ``"gap"``: the outermost level that is no
            outlier; ``"none"``.
    """

    low: float | None
    high: float | None
    definition: Literal["edge", "gap", "none"]


def find_outliers(
    probes: Sequence[RitzLevels], size: int, edges: Sequence[CoefficientEdge | None] | None = None
) -> Outliers:
    """Applies the rule to every probe and reports where they agree.

    Args:
        probes: levels of reorthogonalised runs of one operator, or of one exact spectrum.
        size: n.
        edges: coefficient edges of the same runs; None (for exact levels, which have no coefficients) looks at gaps only.
    """
    edges = [None] * len(probes) if edges is None else list(edges)
    mirrored = [None if edge is None else edge.mirrored() for edge in edges]
    high = [_one_side(levels, size, edge, 1) for levels, edge in zip(probes, edges, strict=True)]
    low = [_one_side(levels.mirrored(), size, edge, -1) for levels, edge in zip(probes, mirrored, strict=True)]
    return Outliers(high=_agreed(high), low=_negated(_agreed(low)))


def outliers_of_eigenvalues(eigenvalues: ArrayLike) -> Outliers:
    """The same rule on an exact spectrum (all eigenvalues, in any order)."""
    levels = exact_levels(eigenvalues)
    return find_outliers([levels], int(np.size(eigenvalues)))


def bulk_edges(outliers: Outliers) -> BulkEdges:
    """The edges that the outlier rule implies."""
    kinds = {side.kind for side in (outliers.low, outliers.high)}
    definition: Literal["edge", "gap", "none"] = "edge" if "edge" in kinds else "gap" if "gap" in kinds else "none"
    low, high = (side.edge if side.kind == definition else None for side in (outliers.low, outliers.high))
    return BulkEdges(low, high, definition)


def refused(reason: str) -> Outliers:
    """No count at either end, for a reason."""
    side = _refusal(None, f"no outlier count: {reason}")
    return Outliers(high=side, low=side)


def _refusal(gap: Gap | None, verdict: str) -> OutlierSide:
    return OutlierSide(
        count=None,
        values=np.empty(0),
        levels=(),
        kind="none",
        confidence=0,
        gap_index=None if gap is None else gap.levels,
        gap_ratio=None if gap is None else gap.ratio,
        gap_spacings=None if gap is None else gap.spacings,
        p_scale_free=None if gap is None else gap.p_scale_free,
        at_least=False,
        unresolved=gap is not None and gap.unresolved,
        edge=None,
        verdict=verdict,
    )


def _agreed(sides: Sequence[OutlierSide]) -> OutlierSide:
    """One answer for several probes: that of the first probe that counts, unless another counts differently."""
    counted = [side for side in sides if side.count is not None]
    if not counted:
        return sides[0]
    if len({side.count for side in counted}) > 1:
        counts = ", ".join(str(side.count) for side in counted)
        return replace(
            _refusal(None, f"no outlier count: probes disagree ({counts}) on this curvature batch"),
            gap_index=sides[0].gap_index,
            gap_ratio=sides[0].gap_ratio,
            gap_spacings=sides[0].gap_spacings,
            p_scale_free=sides[0].p_scale_free,
        )
    best = counted[0]
    if len(counted) < len(sides):
        note = f"; {len(sides) - len(counted)} of {len(sides)} probes could not count"
        best = replace(best, confidence=1, verdict=best.verdict + note)
    return best


def _negated(side: OutlierSide) -> OutlierSide:
    return replace(
        side,
        values=-side.values,
        levels=tuple(replace(level, value=-level.value) for level in side.levels),
        edge=None if side.edge is None else -side.edge,
    )


def _one_side(levels: RitzLevels, size: int, edge: CoefficientEdge | None, sign: int) -> OutlierSide:
    """The rule at the upper end; ``sign`` is -1 for the levels of ``-H``, and only the words need it."""
    gap = widest_gap(levels, size)
    if edge is not None and edge.converged:
        return _beyond_edge(levels, size, edge, gap, sign)
    if gap is not None and gap.grade > 0:
        return _above_gap(levels, gap, sign)
    if gap is not None:
        words = (
            f"no outlier count: eigenvalues thin out without a gap (widest x{gap.ratio:.2f} after {gap.levels}, "
            f"{gap.spacings:.1f} local spacings, need {_needed(gap)}) on this curvature batch"
        )
        return _refusal(gap, words)
    return _refusal(None, f"no outlier count: {_why_no_gap(levels)} on this curvature batch")


def _needed(gap: Gap) -> str:
    """What the gap lacks, in words."""
    if gap.spacings < LIKELY_SPACINGS:
        return f"{LIKELY_SPACINGS:.0f}"
    if gap.ratio < LIKELY_RATIO:
        return f"{CLEAR_SPACINGS:.0f}, or {LIKELY_SPACINGS:.0f} and a ratio of {LIKELY_RATIO}"
    return f"{CLEAR_SPACINGS:.0f} while the levels behind it are not resolved: raise the number of steps"


def _why_no_gap(levels: RitzLevels) -> str:
    above = int((levels.values > levels.floor).sum())
    if levels.complete:
        return f"only {_counted(above, 'eigenvalue')} above the noise floor"
    found = min(levels.resolved_high, above)
    return f"only {_counted(found, 'level')} resolved at m={levels.steps}; raise the number of steps"


def _beyond_edge(levels: RitzLevels, size: int, edge: CoefficientEdge, gap: Gap | None, sign: int) -> OutlierSide:
    """Ritz values beyond a converged bulk edge, with residuals that leave no doubt at which side they are."""
    descending = np.arange(levels.values.size)[::-1]
    beyond = int((levels.values > edge.high + edge.margin).sum())
    count = 0
    for index in descending[:beyond]:
        sure = levels.residuals[index] + levels.rounding < RESOLVED_SHARE * (levels.values[index] - edge.high)
        if not sure or levels.weights[index] * size >= SIMPLE_WEIGHT:
            break
        count += 1
    unresolved = count < beyond
    at_least = unresolved or (levels.steps is not None and levels.steps < STEPS_FOR_COUNT and not levels.complete)
    words = (
        f"{_number(count, at_least)} beyond the bulk edge {sign * edge.high:.3g} (late coefficients converged, "
        f"cv {edge.variation:.3f}, drift {edge.drift:.3f}) on this curvature batch"
    )
    return OutlierSide(
        count=count,
        values=levels.values[::-1][:count].copy(),
        levels=tuple(levels.level(int(index)) for index in descending[:count]),
        kind="edge",
        confidence=1 if unresolved else 2,
        gap_index=None if gap is None else gap.levels,
        gap_ratio=None if gap is None else gap.ratio,
        gap_spacings=None if gap is None else gap.spacings,
        p_scale_free=None if gap is None else gap.p_scale_free,
        at_least=at_least,
        unresolved=unresolved,
        edge=edge.high,
        verdict=words,
    )


def _above_gap(levels: RitzLevels, gap: Gap, sign: int) -> OutlierSide:
    resolved = levels.resolved_high >= MAX_GROUP + 1 + FOLLOWERS  # no wider gap can hide behind this one
    at_least = levels.steps is not None and levels.steps < STEPS_FOR_COUNT and not (levels.complete or resolved)
    if gap.multiplicity > 1:
        words = (
            f"{_number(gap.levels, at_least)} above a (near-)degenerate level (multiplicity >= {gap.multiplicity:.0f})"
        )
    elif gap.grade == 2:
        words = (
            f"{_number(gap.levels, at_least)}: gap x{gap.ratio:.2f} = {gap.spacings:.1f} local spacings below the "
            f"last of them; next eigenvalue {sign * gap.next_value:.3g}"
        )
    else:
        words = (
            f"probably {_number(gap.levels, at_least)}: gap x{gap.ratio:.2f} = {gap.spacings:.1f} local spacings; an "
            f"uncorrelated heavy tail could do this (p<={gap.p_scale_free:.2g})"
        )
    last = levels.values.size - 1
    return OutlierSide(
        count=gap.levels,
        values=levels.values[::-1][: gap.levels].copy(),
        levels=tuple(levels.level(last - i) for i in range(gap.levels)),
        kind="gap",
        confidence=gap.grade,
        gap_index=gap.levels,
        gap_ratio=gap.ratio,
        gap_spacings=gap.spacings,
        p_scale_free=gap.p_scale_free,
        at_least=at_least,
        unresolved=gap.unresolved,
        edge=gap.next_value,
        verdict=words + " on this curvature batch",
    )


def _number(count: int, at_least: bool) -> str:
    return f"{'>= ' if at_least else ''}{_counted(count, 'outlier')}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
