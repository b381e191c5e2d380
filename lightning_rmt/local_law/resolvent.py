"""Means of ``1 / (eigenvalue + damping)`` over the bulk of a measured spectrum, and from which damping on they hold.

What enters, and why:

* *Negative eigenvalues* enter with their sign. The local law is about the resolvent ``(H + damping)^-1`` of the matrix
  itself, and says nothing about ``|H|``; the damping must therefore lie above the lower end of the bulk.
* *Outliers*, where the spectrum's rule could count any, are left out at both ends. They have no mass in the limit, a
  positive one of n eigenvalues would add ``1 / (n (eigenvalue + damping))``, and a negative one would put a pole where a
  preconditioner that treats outliers one by one (by their absolute value) has none. Where none could be counted, all of the
  spectrum is bulk, its negative tail too.
* *The atom at zero* is an eigenvalue like any other, unless it shows that the noise doesn't reach there: noise in every
  direction would have smeared it over ``[-2 s, 2 s]``. Parameters without any influence make such an atom. The local law
  then holds on the other directions alone: with a share z of them at zero, there the noise has the variance
  ``s^2 / (1 - z)``, since s is measured as ``s^2 = E |N|_F^2 / n`` over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.spectra.spectrum import Spectrum

#: An atom at zero that is narrower than this share of the noise scale isn't reached by the noise.
UNREACHED = 0.1
#: Nearer to the lowest eigenvalue than where it makes up this share of ``mean 1 / (l + damping)^2``, means over the bulk are
#: those of that one eigenvalue.
OF_ONE = 0.5


@dataclass(frozen=True, eq=False)
class Resolvent:
    """The bulk where the noise acts, as nodes and weights.

    Attributes:
        nodes: ascending, in the operator's units.
        weights: summing to the bulk's share of the eigenvalues that the noise reaches: 1 without outliers.
        variance: factor by which the noise variance is larger there, 1 without an unreached atom at zero.
        floor: smallest damping at which means over the bulk are not those of its lowest eigenvalue, perhaps negative. A
            little above minus the lowest eigenvalue: about ``n^(-2/3)`` of the bulk's width where it ends like a semicircle.
        dead: share of all eigenvalues in an unreached atom at zero.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    variance: float
    floor: float
    dead: float = 0.0

    def mean(self, damping: float, power: int = 1) -> float:
        """``(1/n) sum 1 / (eigenvalue + damping)^power`` over the bulk; infinite at or below its end."""
        shifted = self.nodes + damping
        if shifted.size and shifted[0] <= 0:
            return math.inf
        return float(self.weights @ shifted**-power)

    def mean_error(self, damping: float, spectrum: Spectrum) -> float:
        """Standard error of ``mean(damping)`` from the probes' sampling of the bulk.

        Where an atom at zero is unreached, its sampled mass moves the mean, and the noise variance by as much: an error of
        ``mean`` that does to a self-consistent damping what both do together.

        Args:
            damping: above the bulk's end.
            spectrum: the one that this is of.
        """
        bulk, tau = spectrum.bulk, self.mean(damping)

        def influence(x: NDArray[np.float64]) -> NDArray[np.float64]:
            unreached = bulk.is_zero(x) & (self.dead > 0)
            return np.where(unreached, 2 * tau, 1 / np.where(unreached, 1.0, x + damping))[None, :]

        variance = float(bulk.covariance(influence)[0, 0])
        return math.sqrt(max(variance, 0.0)) * (1 - bulk.removed_mass) / (1 - self.dead)

    def damping_where(self, factor: float, wanted: float, start: float) -> float:
        """The damping d above the bulk with ``d - factor mean(d) = wanted``, or ``start`` if that is larger.

        Args:
            factor: positive.
            wanted: any number.
            start: a damping at or above the bulk's end.
        """
        if not self.nodes.size:
            return max(wanted, start)
        # the lowest node alone gives a root that is too small
        lowest, pull = float(self.nodes[0]), factor * float(self.weights[0])
        offset = lowest + wanted
        reach = math.hypot(offset, 2 * math.sqrt(pull))
        distance = (offset + reach) / 2 if offset > 0 else 2 * pull / (reach - offset)
        return rising_root(
            lambda d: (d - factor * self.mean(d) - wanted, 1 + factor * self.mean(d, 2)),
            max(start, distance - lowest),
            concave=True,
        )

    @classmethod
    def of(cls, spectrum: Spectrum, noise: float) -> Resolvent:
        """From a spectrum that contains noise of this scale.

        Args:
            spectrum: of a curvature matrix.
            noise: scale of the noise in that matrix. It decides what an atom at zero means.
        """
        bulk = spectrum.bulk
        unreached = noise > 0 and bulk.zero_mass > 0 and bulk.zero_width <= UNREACHED * noise
        dead = bulk.zero_mass * (1 - bulk.removed_mass) if unreached else 0.0
        nodes, weights = bulk.pooled(zeros=not unreached)
        if not nodes.size:  # nothing but outliers and zeros: noise has nowhere to act
            return cls(np.empty(0), np.empty(0), 1.0, 0.0)
        share = (1 - bulk.removed_mass - dead) / (1 - dead)
        probes = (bulk.probe(index, zeros=not unreached) for index in range(len(bulk.nodes)))
        floors = [_floor(x, w, bool(bulk.is_zero(x[:1]).all())) for x, w in probes if x.size]
        return cls(nodes, weights * share, 1 / (1 - dead), max(floors), dead)


def _floor(nodes: NDArray[np.float64], weights: NDArray[np.float64], atom: bool) -> float:
    """Where the lowest node makes up half of ``mean 1 / (l + damping)^2``; minus that node where it is an atom."""
    lowest, own = float(nodes[0]), float(weights[0])
    if atom or own >= OF_ONE or nodes.size < 2:
        return -lowest
    gaps, others = nodes[1:] - lowest, weights[1:]

    def excess(log_distance: float) -> float:
        x = math.exp(log_distance)
        return float(others @ (x / (x + gaps)) ** 2) * OF_ONE / (1 - OF_ONE) - own

    from scipy.optimize import brentq  # SciPy is slow to import

    ends = math.log(float(gaps[0])) - 40, math.log(float(gaps[-1])) + 40
    if excess(ends[1]) <= 0:
        return -lowest
    return math.exp(brentq(excess, *ends, xtol=1e-12)) - lowest


def rising_root(
    function: Callable[[float], tuple[float, float]], start: float, concave: bool, steps: int = 200
) -> float:
    """Root of an increasing function by Newton's method, from the side on which it can't overshoot.

    Scale-free, unlike a bisection to an absolute tolerance: a damping may be 1e-9 or 1e+3.

    Args:
        function: gives value and slope.
        start: at or below the root of a concave function, at or above that of a convex one.
        concave: which of the two.
        steps: at most so many.
    """
    x = start
    for _ in range(steps):
        value, slope = function(x)
        following = x - value / slope
        if not (following > x if concave else following < x):
            break
        x = following
    return x
