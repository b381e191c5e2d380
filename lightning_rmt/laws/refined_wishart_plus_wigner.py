"""The refined model of Pennington and Bahri, for networks with ReLUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.negative_mass import negative_mass
from lightning_rmt.laws.support import intervals
from lightning_rmt.laws.wishart_plus_wigner import split_variance

#: Where the continuation begins and ends, in units of the law's standard deviation above the real line.
FAR, NEAR = 1e2, 1e-9
#: Factor on the height from one of its steps to the next.
STEP = 0.75


@dataclass(frozen=True)
class RefinedWishartPlusWigner(Law):
    """The law of ``H0 + H1``, free of each other, for one hidden layer of ReLUs (Pennington and Bahri 2017, section 6).

    ``H0 = sigma X X' / m`` with X of size n x m and ``n / m = phi``. H1 has zero blocks on the diagonal, so that it isn't a
    Wigner matrix: its transform is ``R(G) = energy phi G / (2 - energy phi^2 G^2)`` (equation 28). The free cumulants are
    ``sigma^j phi^(j - 1)`` of H0, and of H1 ``(energy phi^2 / 2)^(j / 2) / phi`` for even j.

    Attributes:
        phi: dimension over samples, positive.
        energy: the loss per output, positive.
        sigma: mean eigenvalue, positive.

    Raises:
        ValueError: a parameter isn't positive and finite.

    Example:
        >>> law = RefinedWishartPlusWigner(0.5, 0.1)
        >>> round(law.critical_energy, 6)
        0.081037
        >>> round(law.moment(2), 6)  # sigma^2 (1 + phi) + energy phi / 2
        1.525
    """

    phi: float
    energy: float
    sigma: float = 1.0

    limits: ClassVar[dict[str, str]] = {"energy": "MarchenkoPastur", "phi": "Semicircle"}

    def __post_init__(self) -> None:
        values = (self.phi, self.energy, self.sigma)
        if not all(value > 0 and math.isfinite(value) for value in values):
            raise ValueError(f"phi, energy and sigma must be positive and finite, got {values}")

    @property
    def _spread(self) -> float:
        return math.sqrt(self.sigma**2 * self.phi + self.energy * self.phi / 2)

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, or several: the smeared zeros may stand apart."""
        phi, energy, sigma = self.phi, self.energy, self.sigma
        wishart = np.polymul([-sigma * phi, 1.0], [-sigma * phi, 1.0])
        minus, plus = np.array([-energy * phi**2, 0, 2.0]), np.array([energy * phi**2, 0, 2.0])
        square = np.array([1.0, 0, 0])
        # -1/G^2 + sigma^2 phi/(1 - sigma phi G)^2 + energy phi (2 + energy phi^2 G^2)/(2 - energy phi^2 G^2)^2 = 0
        first = np.polymul(np.polysub(sigma**2 * phi * square, wishart), np.polymul(minus, minus))
        second = energy * phi * np.polymul(np.polymul(square, plus), wishart)
        return intervals(np.polyadd(first, second), self._z_of, self.density)

    @property
    def atom(self) -> float:
        """Share of zeros that both parts have in common: ``1 - 2 / phi`` above phi = 2."""
        return max(0.0, 1 - 2 / self.phi)

    def _z_of(self, g: NDArray[np.float64]) -> NDArray[np.float64]:
        phi, energy = self.phi, self.energy
        return np.asarray(
            self.sigma / (1 - self.sigma * phi * g) + energy * phi * g / (2 - energy * phi**2 * g**2) + 1 / g
        )

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x`` without the atom, shape of ``x``, from the quartic for the transform (equation 30).

        Two of its pairs of roots may be complex, so that the law's is followed from far above the real line, where it is
        ``1 / z``.
        """
        points = np.asarray(x, dtype=np.float64)
        real = points.ravel()
        height = self._spread * FAR
        g = 1 / (real + 1j * height)
        while height > self._spread * NEAR:
            height *= STEP
            g = self._newton(g, real + 1j * height)
        roots = np.linalg.eigvals(self._companion(real))
        own = roots[np.arange(real.size), np.argmin(np.abs(roots - (1 / g)[:, None]), axis=1)]
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(own == 0, 0.0, (-(1 / own).imag).clip(0) / np.pi)
        return np.asarray(value.reshape(points.shape))

    def _coefficients(self, z: NDArray[Any]) -> list[NDArray[Any]]:
        """Of the quartic ``sum_k c_k G^k``, constant first."""
        phi, energy, sigma = self.phi, self.energy, self.sigma
        return [
            -2 + 0 * z,
            2 * (z - sigma * (1 - phi)),
            -phi * (2 * sigma * z + energy * (1 - phi)),
            -energy * phi**2 * (z + sigma * (phi - 2)),
            z * energy * sigma * phi**3,
        ]

    def _newton(self, g: NDArray[Any], z: NDArray[Any]) -> NDArray[Any]:
        c = self._coefficients(z)
        for _ in range(3):
            value = (((c[4] * g + c[3]) * g + c[2]) * g + c[1]) * g + c[0]
            slope = ((4 * c[4] * g + 3 * c[3]) * g + 2 * c[2]) * g + c[1]
            g = g - value / np.where(slope == 0, 1.0, slope)
        return g

    def _companion(self, z: NDArray[Any]) -> NDArray[np.float64]:
        """Of the quartic in 1/G, whose leading coefficient can't vanish."""
        c = self._coefficients(z)
        matrix = np.zeros((z.size, 4, 4))
        for k in range(1, 5):
            matrix[:, 0, k - 1] = (c[k] / 2).real
        matrix[:, 1, 0] = matrix[:, 2, 1] = matrix[:, 3, 2] = 1.0
        return matrix

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix, ascending; takes the time of a dense eigenproblem.

        H1 is simulated as ``phi sqrt(energy / 2) (Y Y' - Z Z') / n`` with Y and Z of size ``n x n / (2 phi)``, which has
        the same transform.
        """
        matrix = np.zeros((size, size))
        columns = max(round(size / self.phi), 2)
        for sign, count in ((1, (columns + 1) // 2), (-1, columns // 2)):
            part = rng.standard_normal((size, count))
            matrix += sign * (part @ part.T)
        matrix *= self.phi * math.sqrt(self.energy / 2) / size
        # H1 looks the same in every basis, so that H0 may be diagonal
        matrix[np.diag_indices(size)] += self.sigma * MarchenkoPastur(self.phi).rvs(size, rng)
        return np.asarray(np.linalg.eigvalsh(matrix))

    @cached_property
    def index(self) -> float:
        """Share of negative eigenvalues."""
        return negative_mass(self)

    @property
    def critical_energy(self) -> float:
        """Energy up to which no eigenvalue is negative (equation 32); 0 from phi = 1 on."""
        if self.phi >= 1:
            return 0.0
        # the printed form cancels as phi -> 1; with r = sqrt(chi) its numerator is (3 - r)^3 (1 + r)
        r = math.sqrt(1 + 16 * self.phi - 8 * self.phi**2)
        return 16 * self.sigma**2 * (1 - self.phi) ** 3 * (1 + r) / (self.phi * (3 + r) ** 3)

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> RefinedWishartPlusWigner:
        """The member with these first three free cumulants, of the bulk without its atom at zero.

        Raises:
            NoFitError: as for `WishartPlusWigner`.
        """
        phi, rest = split_variance(bulk)
        return cls(phi, 2 * rest / phi, bulk.continuous.k1)
