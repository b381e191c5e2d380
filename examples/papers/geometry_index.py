"""How the index of critical points grows with their energy: fits of (20), with errors, and in which window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from lightning_rmt.laws import WishartPlusWigner
from lightning_rmt.laws.law import Law

#: Points of a larger index are left out of the fits.
HIGHEST = 0.15
EXPONENTS = np.linspace(0.4, 3.0, 53)
#: Where eps_c may be: from so many times the spread of the energies below the lowest to so many above.
REACH = np.linspace(-1.5, 0.3, 91)


@dataclass(frozen=True)
class IndexFit:
    """``alpha = a (eps - eps_c)^p`` with p = 3/2 and with a free p, least squares of the index.

    Errors are standard deviations over resampled networks: what eigenvalues do within a network is far less, as they repel.

    Attributes:
        critical: eps_c for p = 3/2; with its error.
        free_critical: for the free one.
        exponent: the free p.
        window: lowest (other than 0) and highest index of the points.
        points: how many.
        factors: a, for p = 3/2 and for the free p.
    """

    critical: float
    critical_error: float
    free_critical: float
    free_error: float
    exponent: float
    exponent_error: float
    window: tuple[float, float]
    points: int
    factors: tuple[float, float]


def fit_index(energies: NDArray[np.float64], index: NDArray[np.float64], repeats: int, seed: int = 0) -> IndexFit:
    """Fits both to points with an index up to `HIGHEST`."""
    low = index <= HIGHEST
    energies, index = energies[low], index[low]
    _, critical, a = _fit(energies, index, np.array([1.5]))
    exponent, free, b = _fit(energies, index, EXPONENTS)
    random, drawn = np.random.default_rng(seed), []
    for _ in range(repeats):
        some = random.integers(0, len(index), len(index))
        drawn.append(
            (_fit(energies[some], index[some], np.array([1.5]))[1], *_fit(energies[some], index[some], EXPONENTS)[:2])
        )
    errors = np.std(drawn, axis=0, ddof=1)
    window = (float(index[index > 0].min()), float(index.max()))
    return IndexFit(critical, errors[0], free, errors[2], exponent, errors[1], window, len(index), (a, b))


def law_exponent(phi: float, window: tuple[float, float]) -> float:
    """The exponent that such a fit finds in the index of (18) itself, over the same window of the index."""
    critical = WishartPlusWigner(phi, 1.0).critical_energy

    def energy(index: float) -> float:
        return float(brentq(lambda eps: WishartPlusWigner(phi, eps).index - index, critical * 1.0001, 10.0, xtol=1e-7))

    energies = np.linspace(energy(window[0]), energy(window[1]), 20)
    return _fit(energies, np.array([WishartPlusWigner(phi, eps).index for eps in energies]), EXPONENTS)[0]


def index_bounds(nodes: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Between which shares of negative eigenvalues a quadrature leaves open (Chebyshev, Markov, Stieltjes).

    For a start vector, the mass below 0 lies between the weight of the negative nodes without the last one and that weight
    with the first positive node's; the means over start vectors are taken. How much a start vector's mass differs from the
    share of eigenvalues is not in it.
    """
    bounds = []
    for x, w in zip(nodes, weights, strict=True):
        order = np.argsort(x)
        below, upto = int((x < 0).sum()), np.append(0.0, np.cumsum(w[order]))
        bounds.append((upto[max(below - 1, 0)], upto[min(below + 1, len(w))]))
    low, high = np.mean(bounds, axis=0)
    return float(low), float(high)


def ks(law: Law, eigenvalues: NDArray[np.float64]) -> float:
    """Largest distance between the law's and the eigenvalues' distribution function."""
    levels = np.sort(eigenvalues)
    steps = np.arange(len(levels) + 1) / len(levels)
    cdf = law.cdf(levels)
    return float(max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()))


def _fit(
    energies: NDArray[np.float64], index: NDArray[np.float64], exponents: NDArray[np.float64]
) -> tuple[float, float, float]:
    """p, eps_c and a of least squares: linear in a, the others on a grid."""
    critical = energies.min() + REACH * np.ptp(energies)
    above = (energies - critical[:, None]).clip(0)[None] ** exponents[:, None, None]
    a = (above @ index) / np.square(above).sum(axis=-1).clip(1e-300)
    misfit = np.square(index - a[..., None] * above).sum(axis=-1)
    i, j = np.unravel_index(np.argmin(misfit), misfit.shape)
    return float(exponents[i]), float(critical[j]), float(a[i, j])
