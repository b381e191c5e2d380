"""The law of Marchenko and Pastur."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError
from lightning_rmt.laws.law import Law

#: The zeros are taken for the law's own where they are as many as the rest would have, to so many standard errors of their
#: mass. Those of the rest's ratio are about twice as large, and come on top.
OWN_ZEROS = 5.0


@dataclass(frozen=True)
class MarchenkoPastur(Law):
    """The law of ``scale X X' / m``, X of size n x m with independent entries of mean 0 and variance 1, ``n / m = ratio``.

    Marchenko and Pastur 1967. All free cumulants are known: ``k_j = ratio^(j - 1) scale^j``. There is an atom at zero where
    there are fewer samples than dimensions.

    Attributes:
        ratio: dimension over samples, positive.
        scale: mean of the eigenvalues, zeros included, positive.

    Raises:
        ValueError: a parameter isn't positive and finite.

    Example:
        >>> MarchenkoPastur(0.25).edges
        (0.25, 2.25)
        >>> MarchenkoPastur(4.0).atom
        0.75
        >>> round(MarchenkoPastur(0.5, scale=2.0).moment(2), 6)  # scale^2 (1 + ratio)
        6.0
    """

    ratio: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.ratio > 0 and self.scale > 0 and math.isfinite(self.ratio) and math.isfinite(self.scale)):
            raise ValueError(
                f"a Marchenko-Pastur law needs a positive ratio and a positive scale, got {self.ratio}, {self.scale}"
            )

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, beside the atom."""
        root = math.sqrt(self.ratio)
        return ((self.scale * (1 - root) ** 2, self.scale * (1 + root) ** 2),)

    @property
    def atom(self) -> float:
        """Share of zeros, ``1 - 1 / ratio`` above ratio 1."""
        return max(0.0, 1 - 1 / self.ratio)

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x`` without the atom, shape of ``x``."""
        points = np.asarray(x, dtype=np.float64)
        low, high = self.edges
        inside = (points > low) & (points < high)
        safe = np.where(inside, points, (low + high) / 2)
        value = np.sqrt((high - safe) * (safe - low)) / (2 * np.pi * self.ratio * self.scale * safe)
        return np.where(inside, value, 0.0)

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix, ascending, by its bidiagonal model (Dumitriu and Edelman 2002).

        Above ratio 1 the number of samples is the integer next to ``size / ratio``; below it needn't be an integer.
        """
        samples = size / self.ratio if self.ratio <= 1 else max(round(size / self.ratio), 1)
        rank = size if self.ratio <= 1 else int(samples)
        levels = wishart_levels(rank, max(samples, size), rng) * (self.scale / samples)
        return np.concatenate([np.zeros(size - rank), levels])

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> MarchenkoPastur:
        """The member with this mean and variance: ``ratio = k2 / k1^2``, ``scale = k1``.

        They are those of the whole bulk where its zeros are as many as that member has, and else those of the bulk without
        them: a ratio above 1 can't be told from a ratio below 1 beside zeros that have another cause, but where the
        numbers agree the law explains both.

        Raises:
            NoFitError: the mean isn't positive.
        """
        rest = cls._with_cumulants(bulk.continuous)
        if bulk.zero_mass > 0 and abs(1 - rest.ratio - bulk.zero_mass) <= OWN_ZEROS * bulk.zero_error:
            whole = cls._with_cumulants(bulk.whole)
            return whole if whole.atom > 0 else rest
        return rest

    @classmethod
    def _with_cumulants(cls, of: FreeCumulantsOf) -> MarchenkoPastur:
        if not of.k1 > 0:
            raise NoFitError(f"a sample covariance matrix has a positive mean eigenvalue, this bulk has {of.k1:.4g}")
        if not of.k2 > 0:
            raise NoFitError(f"a Marchenko-Pastur law has a positive variance, this bulk has {of.k2:.4g}")
        return cls(of.k2 / of.k1**2, of.k1)


def wishart_levels(rank: int, freedom: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Eigenvalues of X X', X of size rank x freedom with independent standard normal entries, ascending.

    By the bidiagonal model, in which ``freedom >= rank`` needn't be an integer.
    """
    from scipy.linalg import eigvalsh_tridiagonal  # SciPy is slow to import

    diagonal = np.sqrt(rng.chisquare(freedom - np.arange(rank)))
    below = np.sqrt(rng.chisquare(np.arange(rank - 1, 0, -1)))
    main = diagonal**2 + np.append(0.0, below**2)
    levels = eigvalsh_tridiagonal(main, diagonal[:-1] * below, lapack_driver="sterf")
    return np.asarray(levels.clip(0))
