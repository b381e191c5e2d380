"""Whether a law is excluded by what is certain: the Chebyshev-Markov-Stieltjes bounds on the distribution function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.law import Law
from lightning_rmt.spectra.bulk import Bulk
from lightning_rmt.spectra.spectrum import Spectrum

#: Points at which the bounds are taken.
POINTS = 64
#: Moves of a law's distribution function within its errors that are tried, in standard errors.
MOVES = np.linspace(-8.0, 8.0, 161)


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds on the share of eigenvalues at or below points off zero and inside the bulk; certain for what the probes see.

    Attributes:
        x: the points, ascending.
        lower: lower bounds there.
        upper: upper bounds there.
        size: n, outliers included.
        probes: number of probes that the bounds are averaged over.
    """

    x: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    size: int
    probes: int


def spectrum_bounds(spectrum: Spectrum) -> Bounds:
    """The bounds at nodes of the bulk (at most 64, each costs an eigenproblem), where they are tightest."""
    nodes, _ = spectrum.bulk.probe(0)
    nodes = nodes[~spectrum.bulk.is_zero(nodes)]
    chosen = np.unique(np.linspace(0, nodes.size - 1, min(POINTS, nodes.size)).round().astype(int))
    x = nodes[chosen]
    lower, upper = spectrum.cdf_band(x, z=0.0)
    return Bounds(x, lower, upper, spectrum.size, len(spectrum.runs))


def exclusion_z(law: Law, bulk: Bulk, bounds: Bounds, errors: ArrayLike = 0.0) -> float:
    """How many standard errors of sampling the law lies outside the bounds, at the worst of the points; 0 if inside.

    The law stands for the bulk alone: the outliers are put back, and so are the zeros beside a law without an atom. The
    standard error of a probe's mass at or below x is ``sqrt(2 F (1 - F) / (n + 2))``; that is for a normal law, and for the
    few eigenvalues of a tail far too small. So the number of standard errors is taken from the probability
    of such a deviation, ``z^2 = (n + 2) probes KL(F | bound)``, which is the same where F isn't small. Less than one
    eigenvalue is never expected beyond x, since the eigenvalues of a matrix aren't quantiles of its law.

    What another member of the family would allow doesn't exclude this one: the distribution function may move by d of its
    own errors for the price of ``d^2``, and the cheapest such move counts.

    Args:
        law: the law.
        bulk: the bulk that it stands for.
        bounds: of the spectrum.
        errors: standard errors of the law's distribution function at the bounds' points, from those of its parameters;
            shape of the points.
    """
    n = bounds.size
    zeros = 0.0 if law.atom > 0 else bulk.zero_mass
    inside = law.cdf(bounds.x) * (1 - zeros) + zeros * (bounds.x > 0)
    below = np.searchsorted(bulk.outliers, bounds.x, side="right")
    error = np.asarray(errors) * (1 - zeros) * bulk.size / n
    expected = ((inside * bulk.size + below) / n + MOVES[:, None] * error).clip(1 / n, 1 - 1 / n)
    # where eigenvalues are known a bound may be 0 or 1 exactly
    bound = np.clip(expected, bounds.lower.clip(0.5 / n, 1 - 0.5 / n), bounds.upper.clip(0.5 / n, 1 - 0.5 / n))
    divergence = expected * np.log(expected / bound) + (1 - expected) * np.log((1 - expected) / (1 - bound))
    squares = (n + 2) * bounds.probes * divergence.clip(0) + MOVES[:, None] ** 2
    return float(np.sqrt(squares.min(axis=0).max(initial=0.0)))
