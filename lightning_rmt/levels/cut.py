"""Which eigenvalues are levels: away from zero, told from their neighbours, and in unbroken runs.

Rounding noise is GOE: the null space of a rank-deficient matrix, computed, repels like a random matrix, and so does any
dense heap of levels that the noise of the products has stirred. So everything that noise could have arranged is left out
before anything is read from spacings, and no spacing reaches across a hole that the cut has made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.spectra.levels import exact_levels
from lightning_rmt.spectra.outliers import find_outliers

#: A level is zero when it is within so many times the operator noise.
ZERO_NOISE = 10.0
#: Mean spacings have to be so many times what noise moves a level by; at 58 times the ratio is off by at most .015.
SPACING_NOISE = 30.0
#: Levels on either side over which a mean spacing is taken when it is compared with the noise.
NOISE_WINDOW = 5
#: So many levels within noise of each other are an atom (a null space shifted by weight decay), not a chance.
ATOM = 5
#: A spacing of so many times the mean on either of its sides is a gap between two bulks...
GAP = 8.0
#: ...the mean of so many spacings.
GAP_WINDOW = 10
#: Shorter runs can't be unfolded and are left out.
SHORTEST_RUN = 20


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive levels with nothing cut between them.

    Attributes:
        levels: shape (k,), ascending, in the eigenvalues' units; a collapsed pair is one level.
        ranks: shape (k,): place counted from the spectrum's upper end (0, 1, ...) for a positive level, and from its lower
            end (-1, -2, ...) for a negative one. Matches levels of several spectra of one block.
    """

    levels: NDArray[np.float64]
    ranks: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of a spectrum, and what was taken away.

    Attributes:
        runs: the runs that are long enough, ascending.
        outliers: levels that stand apart from the rest at either end.
        outliers_counted: whether those could be told from the rest at both ends.
        zeros: levels within the zero cut.
        crowded: levels whose neighbourhood is too dense for the noise, atoms included.
        degenerate: levels that were collapsed into a neighbour.
        unused: levels in runs too short to use.
        tau: half width of the zero cut, in the eigenvalues' units.
        displacement: how far noise moves a level, in the eigenvalues' units.
        noise_to_spacing: that as a share of the median spacing that was kept, None where nothing was.
    """

    runs: tuple[Run, ...]
    outliers: int
    outliers_counted: bool
    zeros: int
    crowded: int
    degenerate: int
    unused: int
    tau: float
    displacement: float
    noise_to_spacing: float | None

    @property
    def kept(self) -> int:
        """Levels in the runs."""
        return sum(run.levels.size for run in self.runs)


def cut_levels(
    eigenvalues: NDArray[np.float64],
    noise: float,
    eps: float,
    size: int | None = None,
    norm: float | None = None,
    keep_outliers: bool = False,
) -> Cut:
    """Leaves out what noise could have arranged.

    The zero cut is ``tau = max(n eps |H|, 10 noise)``. Noise of norm ``noise`` that is spread over the directions moves a
    level by about ``noise / sqrt(n)``, and rounding by at most about ``sqrt(n) eps |H|``: neighbours within the larger of
    the two, the *displacement*, are one level, five or more of them are an atom and left out, and a level is left out
    where the mean spacing over its ten neighbours is below 30 displacements. (Collapsing at ``tau`` itself would
    contradict that: it is wider than spacings which the noise leaves intact.)

    Outliers, where `spectra.outliers` counts any, are left out too: they have their own mean spacing, which can't be known
    from so few. Ten of them above GOE levels, kept in, would have the distribution of spacings rejected in 17 % to 98 % of
    the cases at a nominal 5 %.

    Args:
        eigenvalues: shape (n,), ascending.
        noise: norm of the operator's error, in the eigenvalues' units; 0 for rounding only.
        eps: machine epsilon of the computation that gave them.
        size: dimension of the operator, None for ``n`` (all eigenvalues are here).
        norm: its spectral norm; None, or anything smaller, for the largest magnitude here.
        keep_outliers: don't look for outliers.
    """
    n = eigenvalues.size
    dimension = max(n, 1) if size is None else size
    norm = max(norm or 0.0, float(np.abs(eigenvalues).max(initial=0.0)))
    tau = max(dimension * eps * norm, ZERO_NOISE * noise)
    displacement = max(math.sqrt(dimension) * eps * norm, noise / math.sqrt(dimension))

    index = np.arange(n)
    is_zero = np.abs(eigenvalues) <= tau
    counts = (0, 0) if keep_outliers else _outliers(eigenvalues, max(noise, 20 * eps * norm))
    low, high = (count or 0 for count in counts)
    # from the first level that isn't an outlier: other spectra of the block may have more or fewer of those
    ranks = np.where(eigenvalues > 0, n - 1 - high - index, low - 1 - index)
    apart_from_rest = ((index < low) | (index >= n - high)) & ~is_zero
    pieces = _split(index, ~is_zero & ~apart_from_rest)
    crowded = degenerate = unused = 0
    runs: list[Run] = []
    for piece in pieces:
        apart, collapsed, in_atoms = _collapse(eigenvalues, piece, displacement)
        degenerate += collapsed
        crowded += in_atoms
        for part in (piece for gapless in apart for piece in _without_gaps(eigenvalues, gapless)):
            roomy = _mean_spacings(eigenvalues[part]) >= SPACING_NOISE * displacement
            crowded += int((~roomy).sum())
            for run in _split(part, roomy):
                if run.size >= SHORTEST_RUN:
                    runs.append(Run(eigenvalues[run], ranks[run]))
                else:
                    unused += run.size
    spacings = np.concatenate([np.diff(run.levels) for run in runs]) if runs else np.empty(0)
    return Cut(
        runs=tuple(runs),
        outliers=int(apart_from_rest.sum()),
        outliers_counted=None not in counts,
        zeros=int(is_zero.sum()),
        crowded=crowded,
        degenerate=degenerate,
        unused=unused,
        tau=tau,
        displacement=displacement,
        noise_to_spacing=displacement / float(np.median(spacings)) if spacings.size else None,
    )


def _outliers(eigenvalues: NDArray[np.float64], noise: float) -> tuple[int | None, int | None]:
    """Number of outliers at the lower and at the upper end, None where they can't be told from the rest."""
    scale = float(np.abs(eigenvalues).max(initial=0.0))
    if scale == 0:
        return 0, 0
    found = find_outliers([exact_levels(eigenvalues, min(noise / scale, 0.2))], eigenvalues.size)
    return found.low.count, found.high.count


def _split(index: NDArray[np.intp], keep: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """The stretches of ``index`` where ``keep`` holds."""
    edges = np.flatnonzero(np.diff(keep)) + 1
    return [part for part, kept in zip(np.split(index, edges), np.split(keep, edges), strict=True) if kept.any()]


def _collapse(
    eigenvalues: NDArray[np.float64], piece: NDArray[np.intp], displacement: float
) -> tuple[list[NDArray[np.intp]], int, int]:
    """Takes chains of neighbours within noise as one level, or as a hole if they are long.

    Returns:
        The pieces between atoms, the number of levels collapsed, and the number of levels in atoms.
    """
    first = np.flatnonzero(np.append(True, np.diff(eigenvalues[piece]) > displacement))
    lengths = np.diff(np.append(first, piece.size))
    single = lengths < ATOM
    return _split(piece[first], single), int((lengths[single] - 1).sum()), int(lengths[~single].sum())


def _without_gaps(eigenvalues: NDArray[np.float64], piece: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """The piece, cut where a spacing is too wide for any density that both of its sides have.

    GOE spacings never come near eight times their mean, independent ones do in one of 3000, where a cut costs one spacing.
    """
    spacings = np.diff(eigenvalues[piece])
    upto = np.append(0.0, np.cumsum(spacings))
    count = spacings.size
    middle = np.arange(count)
    low, high = np.maximum(middle - GAP_WINDOW, 0), np.minimum(middle + 1 + GAP_WINDOW, count)
    left = (upto[middle] - upto[low]) / np.maximum(middle - low, 1)
    right = (upto[high] - upto[middle + 1]) / np.maximum(high - middle - 1, 1)
    roomy = (middle + 1 >= SHORTEST_RUN) & (count - middle >= SHORTEST_RUN)
    gaps = np.flatnonzero(roomy & (spacings > GAP * np.maximum(left, right)))
    return np.split(piece, gaps + 1)


def _mean_spacings(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean spacing around each level over five neighbours on either side, as many as there are at the ends."""
    index = np.arange(levels.size)
    low, high = np.maximum(index - NOISE_WINDOW, 0), np.minimum(index + NOISE_WINDOW, levels.size - 1)
    return (levels[high] - levels[low]) / np.maximum(high - low, 1)
