"""Wigner's semicircle law."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import Law


@dataclass(frozen=True)
class Semicircle(Law):
    """The law of a symmetric matrix with independent entries of variance ``(radius / 2)^2 / n`` (Wigner 1958).

    Its simulated matrix is a GOE matrix. In our normalisation GOE(s) has off-diagonal variance ``s^2 / n``, so the radius
    is ``2 s``.

    Attributes:
        radius: half the width of the support, positive.
        center: mean.

    Raises:
        ValueError: the radius isn't positive, or a parameter isn't finite.

    Example:
        >>> Semicircle(2.0).edges
        (-2.0, 2.0)
        >>> round(Semicircle(2.0).moment(4), 6)
        2.0
    """

    radius: float
    center: float = 0.0

    def __post_init__(self) -> None:
        if not (self.radius > 0 and math.isfinite(self.radius) and math.isfinite(self.center)):
            raise ValueError(
                f"a semicircle needs a positive radius and a finite center, got {self.radius}, {self.center}"
            )

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval."""
        return ((self.center - self.radius, self.center + self.radius),)

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x``, shape of ``x``."""
        u = (np.asarray(x, dtype=np.float64) - self.center) / self.radius
        return np.asarray(2 / (np.pi * self.radius) * np.sqrt((1 - u**2).clip(0)))

    def cdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Mass at or below ``x``, shape of ``x``."""
        u = ((np.asarray(x, dtype=np.float64) - self.center) / self.radius).clip(-1, 1)
        return np.asarray(0.5 + (u * np.sqrt(1 - u**2) + np.arcsin(u)) / np.pi)

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated GOE matrix, ascending, by its tridiagonal model (Dumitriu and Edelman 2002)."""
        from scipy.linalg import eigvalsh_tridiagonal  # SciPy is slow to import

        chi = np.sqrt(rng.chisquare(np.arange(size - 1, 0, -1)))
        scale = self.radius / 2 / math.sqrt(size)
        levels = eigvalsh_tridiagonal(rng.normal(0, math.sqrt(2), size) * scale, chi * scale, lapack_driver="sterf")
        return np.asarray(self.center + levels)

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> Semicircle:
        """The member with the mean and variance of the bulk without its atom at zero.

        Raises:
            NoFitError: the variance isn't positive.
        """
        if not bulk.continuous.k2 > 0:
            raise NoFitError(f"a semicircle has a positive variance, this bulk has {bulk.continuous.k2:.4g}")
        return cls(2 * math.sqrt(bulk.continuous.k2), bulk.continuous.k1)
