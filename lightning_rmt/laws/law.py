"""What every limiting law offers: density, distribution function, atom, edges, moments, and a matrix to simulate it with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from lightning_rmt.laws.fit import Fit

#: Points per interval of the support at which the density is taken for its integrals. Even, so that no point is the
#: middle of a symmetric interval: densities may diverge at zero.
GRID = 2048
#: What is less than so many standard errors from zero can't be told from it.
UNSURE = 2.0


@dataclass(frozen=True)
class Law(ABC):
    """A limiting spectral law: a continuous part on a few intervals, and perhaps an atom.

    Subclasses are frozen dataclasses whose fields are the parameters. They give `support`, `density` and `rvs`, and `atom`
    where there is one; what is an integral over the density follows from these. The integrals are taken on a grid that
    is dense at both ends of every interval, where densities begin and end like square roots or diverge, and at zero for
    laws that ask for it.
    """

    #: Parameters that turn the law into another family's where they are zero, and that family's name; ``1/dims[2]`` is one.
    limits: ClassVar[dict[str, str]] = {}

    @property
    @abstractmethod
    def support(self) -> tuple[tuple[float, float], ...]:
        """Intervals that carry the continuous part, ascending."""

    @abstractmethod
    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density of the continuous part at ``x``, shape of ``x``, integrating to ``1 - atom``; zero off the support."""

    @abstractmethod
    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix of dimension ``size``, ascending.

        Args:
            size: dimension of the matrix.
            rng: source of randomness.
        """

    @property
    def atom(self) -> float:
        """Mass at `atom_location`, from 0 to 1."""
        return 0.0

    @property
    def atom_location(self) -> float:
        """Where the atom sits."""
        return 0.0

    @property
    def edges(self) -> tuple[float, float]:
        """Smallest and largest point of the continuous part."""
        return self.support[0][0], self.support[-1][1]

    def cdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Mass at or below ``x``, shape of ``x``."""
        points = np.asarray(x, dtype=np.float64)
        grid, mass = self._cumulative
        return np.asarray(np.interp(points, grid, mass) + self.atom * (points >= self.atom_location))

    def quantile(self, p: ArrayLike) -> NDArray[np.float64]:
        """Smallest x with at least the mass ``p`` at or below it, for ``p`` from 0 to 1, shape of ``p``.

        Raises:
            ValueError: a ``p`` lies outside 0 to 1.
        """
        shares = np.asarray(p, dtype=np.float64)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"p is a share between 0 and 1, got {p!r}")
        grid, mass = self._cumulative
        if self.atom > 0:
            below = float(np.interp(self.atom_location, grid, mass))
            place = int(np.searchsorted(grid, self.atom_location))
            grid = np.insert(grid, place, [self.atom_location] * 2)
            mass = np.concatenate([mass[:place], [below, below + self.atom], mass[place:] + self.atom])
        return np.asarray(np.interp(shares, mass, grid))

    def moment(self, k: int) -> float:
        """``E[x^k]``, the atom included.

        Raises:
            ValueError: ``k`` is negative.
        """
        if k < 0:
            raise ValueError(f"moments have orders from 0, got {k}")
        x, weights = self._quadrature
        return float(weights @ x**k + self.atom * self.atom_location**k)

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> Law:
        """The member of the family with these free cumulants.

        Raises:
            NoFitError: there is none; the message says why. So do families without a fit.
        """
        raise NoFitError(f"{cls.__name__} has no fit by free cumulants")

    @classmethod
    def fit(cls, spectrum: Spectrum) -> Fit:
        """Fits the family to the bulk of a measured spectrum.

        Raises:
            NoFitError: no member has the bulk's free cumulants, or the bulk can't be fitted at all; the message says why.
        """
        from lightning_rmt.laws.fitting import Measured, fit_law  # it needs this class

        return fit_law(cls, Measured(spectrum))

    @property
    def _stretch(self) -> float:
        """Power p of the substitution ``x = sign(t) |t|^p`` under the integrals.

        Above 1 it crowds points at zero, for densities that diverge there; a density like ``|x|^-a`` is integrated well
        from ``p = 1 / (1 - a)`` inside an interval, from half of that at its end.
        """
        return 1.0

    def _places(self, angle: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points of every interval at these angles from 0 to pi, and ``dx / d angle`` there; both intervals x angles."""
        # t = (a + b)/2 - (b - a)/2 cos(angle) takes square roots at both ends to sin^2
        ends = np.array(self.support)
        ends = np.sign(ends) * np.abs(ends) ** (1 / self._stretch)
        half, middle = (ends[:, 1:] - ends[:, :1]) / 2, (ends[:, 1:] + ends[:, :1]) / 2
        t = middle - half * np.cos(angle)
        slope = half * np.sin(angle) * self._stretch * np.abs(t) ** (self._stretch - 1)
        return np.sign(t) * np.abs(t) ** self._stretch, slope

    @cached_property
    def _unnormalised(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points and weights of the midpoint rule over the continuous part; midpoints, since densities may diverge."""
        x, slope = self._places((np.arange(GRID) + 0.5) * np.pi / GRID)
        return x.ravel(), (self.density(x) * slope * np.pi / GRID).ravel()

    @property
    def _quadrature(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points and weights that integrate a function over the continuous part, normalised to its known mass.

        Raises:
            ValueError: the grid misses a hundredth of the mass; normalising would hide that.
        """
        x, w = self._unnormalised
        mass, known = float(w.sum()), 1 - self.atom
        if not abs(mass - known) <= 0.01 * known:
            raise ValueError(
                f"the integrals over {self} can't be had: its density integrates to {mass:.3g} instead of {known:.3g}, "
                "since it has a spike that is too narrow for the grid"
            )
        return x, w * (known / mass)

    @cached_property
    def _cumulative(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ascending points, and the continuous part's mass up to each."""
        _, weights = self._quadrature
        cells, _ = self._places(np.arange(GRID + 1) * np.pi / GRID)  # the ends of the quadrature's cells
        mass = np.concatenate([[0.0], np.cumsum(weights)]).clip(0, 1 - self.atom)
        first = np.arange(len(self.support)) * GRID
        upto = np.concatenate([mass[start : start + GRID + 1] for start in first])
        return cells.ravel(), upto
