"""Spacings in units of their local mean.

The density of a Hessian block varies over four decades and more, so that the textbook's way, a polynomial through the
counting function, is hopeless: on GOE levels spread over four decades it rejects GOE always. What varies smoothly is the
*logarithm of the spacing as a function of the rank*: near either end, spacings go like a power of the rank counted from
there (-1/3 at a soft edge, 1 at a hard edge, ``-a - 1`` for eigenvalues that fall like ``rank^-a``), so that their
logarithm is linear in ``log i`` and ``log (n + 1 - i)``. `unfold` fits that, plus a parabola in the rank, by maximum
likelihood for exponential spacings (a consistent fit of the mean whatever the spacings' distribution: Gourieroux,
Monfort and Trognon 1984), and what is left it divides by the running mean over 21 spacings.

Rejection rates at a nominal 5 % by the Anderson-Darling statistic, null simulated with the same procedure, over 400 spectra
of k = 50 and of k = 100 levels and 300 of k = 400 (last column: 800, 800 and 400). The first six are GOE levels, mapped;
the last two aren't GOE, and their rate is at a nominal 1 %:

=========================  ==================  ==================  ==================  ==================
k = 50 / 100 / 400         polynomial          polynomial in log   running mean of 15  this
=========================  ==================  ==================  ==================  ==================
whole GOE, with edges      .20  / .04  / .04   .20  / .04  / .04   .10  / .05  / .05   .05  / .04  / .05
Marchenko-Pastur c = 1/2   .19  / .05  / .06   .08  / .06  / .08   .07  / .06  / .06   .05  / .06  / .05
rank^-a over 4 decades     1    / 1    / 1     1    / .09  / .99   1    / 1    / .74   .06  / .06  / .07
log-uniform, 4 decades     1    / 1    / 1     .05  / .05  / .03   .86  / .15  / .03   .04  / .03  / .05
three heaps, 6 decades     1    / 1    / 1     1    / 1    / 1     1    / 1    / .56   .06  / .05  / .07
Student t2, both signs     1    / 1    / 1     1    / 1    / 1     1    / 1    / .76   .07  / .05  / .05
Poisson                    1.00 / 1    / 1     1    / 1    / 1     1.00 / 1    / 1     .99  / 1    / 1
two independent GOE        .76  / .97  / 1     .77  / .97  / 1     .75  / .96  / 1     .73  / .95  / 1
=========================  ==================  ==================  ==================  ==================

(Polynomial: of the counting function, degree ``min(5, k / 20)``. Without the running mean, "this" rejects three heaps in
18 % of the cases for k = 2000, and with it in 3 %; a polynomial in asinh is no better than in the logarithm.)

None of this follows a density with a narrow peak amid the levels, as Hessians have at zero. Where it can be known, the
run is cut there (`without_zero`); where the fit is off nevertheless, `unevenness` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

#: Spacings on either side of the running mean.
HALF_WINDOW = 10
#: Shortest of several runs of one spectrum that is unfolded; see `long_enough`.
SHORTEST_OF_SEVERAL = 30
#: Decades over which the mean spacing may vary within a run that crosses zero. GOE levels on ``10^-d sinh``, of both signs,
#: vary over .9 d: at a nominal 5 % those of d = 2 are rejected in 7 %, of d = 3 in 10 % to 15 %, of d = 6 in 54 % to 86 % of
#: the cases (k = 400 and 100), and in 3 % to 7 % for any d if they are cut at zero.
WIDE = 2.0
#: Largest `unevenness` with which wide runs count as unfolded: the first times the root of their length, at most the second.
#: It is .03 to .06 for GOE levels and up to .09 for those of the table above. Heaps and waves on a log-uniform density over
#: nine decades that have .2 with k = 400 are rejected in 7 % to 10 % of the cases at a nominal 5 %, with .4 in 19 % to 31 %;
#: heaps that have .1 with k = 100 in 13 %. Waves of a period below the running mean's pass for the levels' own.
_UNEVEN_PER_ROOT, _UNEVEN = 0.01, 0.2
#: Largest change of a log mean in one step of the fit, and the change at which it has converged.
_LARGEST_STEP, _CONVERGED = 2.0, 1e-6
#: Steps of the fit; some ten are needed.
_STEPS = 50


def long_enough(runs: Iterable[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The runs of one spectrum whose spacings may be compared with the null of as many levels in one run.

    Every run takes a fit of its own, and the null has one. GOE levels in 20 runs of 20 are rejected in 31 % to 33 % of the
    cases at a nominal 5 % and in 5 runs of 20 in 10 %; 16 runs of 25 in 8 %, 13 runs of 30 in 4 %, 40 of 30 in 7 %
    (500 spectra each). A run alone is what the null was simulated for.
    """
    every = list(runs)
    return every if len(every) == 1 else [run for run in every if run.size >= SHORTEST_OF_SEVERAL]


def unfold(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spacings of consecutive levels over their local mean.

    Invariant under scaling, and under a shift as long as the levels have both signs. Levels of one sign are taken by
    their logarithms, which makes a heavy tail milder; that isn't invariant under a shift.

    Args:
        levels: shape (k,), ascending without ties, k at least 20.

    Returns:
        Shape (k - 1,), mean 1.
    """
    return _by_running_mean(unfold_trend(levels))


def unfold_trend(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `unfold`, without the running mean: for statistics over many spacings, which a running mean would flatten."""
    spacings = np.diff(levels)
    if levels[0] > 0:
        spacings = np.log1p(spacings / levels[:-1])  # differences of logarithms, which would cancel
    elif levels[-1] < 0:
        spacings = np.log1p(spacings / -levels[1:])
    relative = spacings / np.exp(_log_mean(spacings))
    return np.asarray(relative / relative.mean())


def decades(levels: NDArray[np.float64]) -> float:
    """Over how many powers of ten the mean of 21 neighbouring spacings varies."""
    means = _running_mean(np.diff(levels))
    return float(np.log10(means.max() / means.min()))


def without_zero(levels: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """A run that crosses zero on a density too uneven for one fit, as its two sides; any other as it is.

    Each side is then taken by its logarithms. What is left of one side alone may be too short: see `long_enough`.
    """
    if not levels[0] < 0 < levels[-1] or decades(levels) <= WIDE:
        return [levels]
    return [side for side in (levels[levels < 0], levels[levels > 0]) if side.size >= SHORTEST_OF_SEVERAL]


def unevenness(runs: Iterable[NDArray[np.float64]]) -> float:
    """How far the fitted mean spacing is off, over 21 spacings: root mean square of their mean over the fit's, less 1.

    Independent levels have .2, too: it can't tell a bad fit from levels that don't repel.
    """
    off = np.concatenate([_running_mean(unfold_trend(run)) - 1 for run in runs])
    return float(np.sqrt(np.mean(off**2)))


def largest_unevenness(runs: Sequence[NDArray[np.float64]]) -> float:
    """With which the unfolded spacings of such runs may be compared with the null."""
    return min(_UNEVEN_PER_ROOT * float(np.mean([run.size for run in runs])) ** 0.5, _UNEVEN)


def _log_mean(spacings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the mean spacing by rank: Newton's method for ``sum log mu + s / mu``."""
    n = spacings.size
    rank = np.arange(1.0, n + 1)
    center = (2 * rank - n - 1) / n
    basis = np.linalg.qr(np.stack([np.ones(n), np.log(rank), np.log(n + 1 - rank), center, center**2], axis=1))[0]
    coefficients = basis.T @ np.log(np.maximum(spacings, np.finfo(np.float64).tiny))
    for _ in range(_STEPS):
        relative = np.exp(np.clip(np.log(spacings) - basis @ coefficients, -700, 700))
        curvature = basis.T @ (basis * relative[:, None]) + 1e-9 * np.eye(basis.shape[1])
        step = np.linalg.solve(curvature, basis.T @ (relative - 1))
        change = float(np.abs(basis @ step).max())
        coefficients += step * min(1.0, _LARGEST_STEP / max(change, _CONVERGED))
        if change < _CONVERGED:
            break
    return np.asarray(basis @ coefficients)


def _by_running_mean(spacings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the mean of the 21 spacings around each; at the ends, of the first or last 21."""
    means = _running_mean(spacings)
    relative = spacings / means[np.clip(np.arange(spacings.size) - HALF_WINDOW, 0, means.size - 1)]
    return np.asarray(relative / relative.mean())


def _running_mean(spacings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of 21 neighbouring spacings (of all, where there are fewer), one for each first of them."""
    width = min(2 * HALF_WINDOW + 1, spacings.size)
    total = np.append(0.0, np.cumsum(spacings))
    return np.asarray((total[width:] - total[:-width]) / width)


def pooled_unfold(spectra: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """Spacings of some spectra in the mean counting function of others ("Algorithm A" of Baskerville et al. 2021).

    The first third of the spectra is unfolded by the other p: a level e goes to ``#{levels of the others < e} / p``. The
    mean spacing comes out at 1, the resolution is 1 / p. It assumes that all spectra are independent and have one density:
    a batch whose Hessian is larger by a factor is unfolded wrongly (40 GOE spectra of 300 levels: distance .02 to .04 from
    Wigner's surmise; .07, and a mean spacing of .96, if they scatter by 10 % in scale), and spectra that share levels read
    as equispaced. Batches of one model may do both, so `level_statistics` unfolds each spectrum by itself.

    Args:
        spectra: at least 3, each of shape (k,), ascending.

    Returns:
        For each of the first third, spacings of shape (k - 1,).

    Raises:
        ValueError: fewer than 3 spectra, or one that isn't ascending.
    """
    if len(spectra) < 3:
        raise ValueError(f"pooled unfolding needs at least 3 spectra, got {len(spectra)}")
    for i, levels in enumerate(spectra):
        if not (np.diff(levels) >= 0).all():
            raise ValueError(f"spectrum {i}: expected ascending eigenvalues, as eigvalsh gives them")
    third = len(spectra) // 3
    pool = np.sort(np.concatenate(spectra[third:]))
    return [np.diff(np.searchsorted(pool, levels)) / (len(spectra) - third) for levels in spectra[:third]]
