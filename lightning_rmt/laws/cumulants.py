"""Free cumulants of a measured bulk, and how each eigenvalue moves them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError
from lightning_rmt.spectra.bulk import Bulk

#: A law isn't fitted to fewer nodes.
FEWEST_NODES = 8


def free_cumulants_of(m1: float, m2: float, m3: float, m4: float) -> FreeCumulantsOf:
    """Free cumulants of moments (Nica and Speicher 2006, lecture 11)."""
    return FreeCumulantsOf(
        k1=m1,
        k2=m2 - m1**2,
        k3=m3 - 3 * m1 * m2 + 2 * m1**3,
        k4=m4 - 4 * m1 * m3 - 2 * m2**2 + 10 * m1**2 * m2 - 5 * m1**4,
    )


@dataclass(frozen=True)
class Frame:
    """Origin and unit in which moments are taken: those of the bulk off zero, so that nothing cancels.

    Attributes:
        center: mean.
        unit: standard deviation.
    """

    center: float
    unit: float

    def cumulants(self, moments: NDArray[np.float64]) -> FreeCumulantsOf:
        """Free cumulants in the operator's units, from moments 1 to 4 in this frame."""
        of = free_cumulants_of(*(float(m) for m in moments))
        s = self.unit
        return FreeCumulantsOf(self.center + s * of.k1, s**2 * of.k2, s**3 * of.k3, s**4 * of.k4)

    def powers(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Powers 1 to 4 of points in this frame, shape (4, j)."""
        y = (x - self.center) / self.unit
        return np.stack([y, y**2, y**3, y**4])


@dataclass(frozen=True, eq=False)
class MeasuredMoments:
    """Five numbers that say all that a fit uses: moments 1 to 4 off zero, in their frame, and the mass at zero.

    Attributes:
        bulk: what was measured.
        frame: their origin and unit.
        values: shape (5,).
    """

    bulk: Bulk
    frame: Frame
    values: NDArray[np.float64]

    @cached_property
    def zero_error(self) -> float:
        """Standard error of the mass at zero."""
        return float(np.sqrt(self.bulk.covariance(lambda x: self.bulk.is_zero(x)[None, :].astype(float))[0, 0]))

    @cached_property
    def _errors(self) -> tuple[float, float]:
        """Standard errors of k3 and of ``k2 - sqrt(k1 k3)`` off zero, by the delta method."""
        of, unit = self.frame.cumulants(self.values[:4]), self.frame.unit

        # in the frame the mean is 0 and the variance 1, so that k2 moves with m2 and k3 with m3 - 3 m1
        third = unit**3 * np.array([-3.0, 0.0, 1.0, 0.0, 0.0])
        covariance = self.bulk.covariance(self.influences)
        error = math.sqrt(max(float(third @ covariance @ third), 0.0))
        if not (of.k1 > 0 and of.k3 > 0):
            return error, 0.0
        slope = np.array([unit, 0.0, 0.0, 0.0, 0.0])  # of k1
        root = math.sqrt(of.k1 * of.k3)
        excess = unit**2 * np.array([0.0, 1.0, 0.0, 0.0, 0.0]) - (of.k3 * slope + of.k1 * third) / (2 * root)
        return error, math.sqrt(max(float(excess @ covariance @ excess), 0.0))

    def moments(self, values: NDArray[np.float64] | None = None) -> BulkMoments:
        """What families are fitted to, of these values or of others near them."""
        of = self.values if values is None else values
        zero = float(of[4]) if self.bulk.zero_mass > 0 else 0.0
        origin = self.frame.powers(np.zeros(1))[:, 0]
        whole = self.frame.cumulants((1 - zero) * of[:4] + zero * origin)
        return BulkMoments(whole, self.frame.cumulants(of[:4]), zero, self.zero_error, *self._errors)

    def influences(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """How much each value moves with the mass of an eigenvalue at x, shape (5, j): the mean of this is zero."""
        zero = self.bulk.is_zero(x)
        off = (self.frame.powers(x) - self.values[:4, None]) * ~zero / (1 - self.bulk.zero_mass)
        return np.concatenate([off, (zero - self.bulk.zero_mass)[None, :]])


def measured_moments(bulk: Bulk) -> MeasuredMoments:
    """Takes the moments of a bulk.

    Raises:
        NoFitError: the bulk has too few nodes off zero, or no width, or isn't finite.
    """
    nodes, weights = bulk.pooled(zeros=False)
    if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
        raise NoFitError("the bulk holds values that are not finite")
    longest = max((int((~bulk.is_zero(x)).sum()) for x in bulk.nodes), default=0)
    if longest < FEWEST_NODES:
        raise NoFitError(
            f"the bulk has {longest} nodes off zero; a law needs at least {FEWEST_NODES}: more Lanczos steps"
        )
    center = float(weights @ nodes)
    unit = math.sqrt(float(weights @ (nodes - center) ** 2))
    if not unit > 1e-12 * float(np.abs(nodes).max()):
        raise NoFitError(f"the bulk has no width: it is one value, {center:.4g}")
    frame = Frame(center, unit)
    return MeasuredMoments(bulk, frame, np.append(frame.powers(nodes) @ weights, bulk.zero_mass))
