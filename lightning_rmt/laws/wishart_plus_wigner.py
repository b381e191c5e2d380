"""A sample covariance matrix plus a Wigner matrix: the loss surfaces of Pennington and Bahri."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import UNSURE, Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.negative_mass import negative_mass
from lightning_rmt.laws.support import intervals


@dataclass(frozen=True)
class WishartPlusWigner(Law):
    """The law of ``scale (X X' / m + W)``, free of each other (Pennington and Bahri 2017, section 5).

    X is n x m with independent entries of variance 1 and ``n / m = phi``; W is GOE(s) with ``s^2 = 2 energy``, that is with
    off-diagonal variance ``2 energy / n``. In the paper phi is parameters over effective examples and the energy the loss
    per output, so that the number of negative eigenvalues tells a saddle's loss. The free cumulants are
    ``k_1 = scale``, ``k_2 = scale^2 (phi + 2 energy)`` and ``k_j = scale^j phi^(j - 1)`` from j = 3.

    Attributes:
        phi: dimension over samples of the covariance part, positive. Above 1 its zeros are smeared by the Wigner part.
        energy: half the squared scale of the Wigner part, positive.
        scale: factor on the whole matrix, its mean eigenvalue, positive.

    Raises:
        ValueError: a parameter isn't positive and finite.

    Example:
        >>> law = WishartPlusWigner(0.25, 0.1)
        >>> round(law.critical_energy, 6), round(law.index, 4)
        (0.04351, 0.054)
        >>> round(law.moment(2), 6)  # 1 + phi + 2 energy
        1.45
    """

    phi: float
    energy: float
    scale: float = 1.0

    limits: ClassVar[dict[str, str]] = {"energy": "MarchenkoPastur", "phi": "Semicircle"}

    def __post_init__(self) -> None:
        values = (self.phi, self.energy, self.scale)
        if not all(value > 0 and math.isfinite(value) for value in values):
            raise ValueError(f"phi, energy and scale must be positive and finite, got {values}")

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, or two: the smeared zeros may stand apart."""
        phi, energy = self.phi, self.energy
        away = np.array([phi**2, -2 * phi, 1.0])  # (1 - phi G)^2
        # -1/G^2 + phi/(1 - phi G)^2 + 2 energy = 0
        slope = np.polysub(2 * energy * np.polymul([1.0, 0, 0], away), np.polysub(away, [phi, 0, 0]))
        return intervals(slope, lambda g: self.scale * (1 / (1 - phi * g) + 2 * energy * g + 1 / g), self.density)

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x``, shape of ``x``, from the cubic for the transform (equation 18)."""
        points = np.asarray(x, dtype=np.float64) / self.scale
        z = points.ravel()
        # In y = 1/G, so that the leading coefficient can't vanish:
        # y^3 - (z + phi - 1) y^2 + (2 energy + phi z) y - 2 energy phi = 0
        companion = np.zeros((z.size, 3, 3))
        companion[:, 0, 0] = z + self.phi - 1
        companion[:, 0, 1] = -(2 * self.energy + self.phi * z)
        companion[:, 0, 2] = 2 * self.energy * self.phi
        companion[:, 1, 0] = companion[:, 2, 1] = 1.0
        y = np.linalg.eigvals(companion)
        # of a real cubic at most one pair is complex, so that no branch has to be picked
        value = np.abs((1 / y).imag).max(axis=1, initial=0.0) / (np.pi * self.scale)
        return np.asarray(value.reshape(points.shape))

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix, ascending; takes the time of a dense eigenproblem."""
        noise = rng.standard_normal((size, size)) * math.sqrt(self.energy / size)
        matrix = noise + noise.T
        # a GOE matrix looks the same in every basis, so that the covariance part may be diagonal
        matrix[np.diag_indices(size)] += MarchenkoPastur(self.phi).rvs(size, rng)
        return np.asarray(self.scale * np.linalg.eigvalsh(matrix))

    @cached_property
    def index(self) -> float:
        """Share of negative eigenvalues."""
        return negative_mass(self)

    @property
    def critical_energy(self) -> float:
        """Energy up to which no eigenvalue is negative (equation 21); 0 from phi = 1 on."""
        if self.phi >= 1:
            return 0.0
        # the printed form cancels as phi -> 1; with r = sqrt(1 + 8 phi) it is (3 - r)^3 (1 + r) / 128
        r = math.sqrt(1 + 8 * self.phi)
        return 4 * (1 - self.phi) ** 3 * (1 + r) / (3 + r) ** 3

    @property
    def threshold_factor(self) -> float:
        """alpha0 in ``index ~ alpha0 (energy / critical_energy - 1)^(3/2)`` just above the threshold (equation 20).

        The paper leaves it to its supplement. Here from the double root G0 that the cubic has at z = 0 and the critical
        energy, ``2 phi (1 - phi) G0^2 + (4 phi - 1) G0 - 2 = 0``, and the curvature z'' there. 0 from phi = 1 on.
        """
        phi = self.phi
        if phi >= 1:
            return 0.0
        root = (1 - 4 * phi - math.sqrt(1 + 8 * phi)) / (4 * phi * (1 - phi))
        curvature = 2 / root**3 + 2 * phi**2 / (1 - phi * root) ** 3
        reach = abs(2 * root * self.critical_energy)
        return 2 / (3 * math.pi) * math.sqrt(2 / abs(curvature)) * reach**1.5

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> WishartPlusWigner:
        """The member with these first three free cumulants, of the bulk without its atom at zero.

        Raises:
            NoFitError: the mean or the third free cumulant isn't positive, or the variance is too small for a Wigner part.
        """
        phi, wigner = split_variance(bulk)
        return cls(phi, wigner / bulk.continuous.k1**2 / 2, bulk.continuous.k1)


def split_variance(bulk: BulkMoments) -> tuple[float, float]:
    """Ratio of a covariance part with the bulk's mean and third free cumulant, and the variance that it leaves over.

    Raises:
        NoFitError: there is no such part, or it leaves nothing over; whether that is more than noise is said.
    """
    of = bulk.continuous
    if not of.k1 > 0:
        raise NoFitError(f"the covariance part has a positive mean eigenvalue, this bulk has {of.k1:.4g}")
    if not of.k3 > 0:
        said = f"the covariance part has a positive third free cumulant, this bulk has {of.k3:.4g}"
        if -of.k3 < UNSURE * bulk.third_error:
            said += f" +- {bulk.third_error:.2g}: it can't be told from zero, and the law not from a Semicircle"
        raise NoFitError(said)
    phi = math.sqrt(of.k3 / of.k1**3)
    wigner = of.k2 - phi * of.k1**2
    if not wigner > 0:
        if -wigner < UNSURE * bulk.excess_error:
            raise NoFitError(
                f"the energy can't be told from zero: the variance that a covariance part leaves over is {wigner:.2g} +- "
                f"{bulk.excess_error:.2g}; see MarchenkoPastur"
            )
        raise NoFitError(
            f"the variance {of.k2:.4g} is no larger than the {phi * of.k1**2:.4g} that the mean and the third free cumulant"
            " ask of the covariance part: nothing is left for a Wigner part"
        )
    return phi, wigner
