"""The law of a Wigner matrix some of whose rows and columns were deleted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.semicircle import Semicircle


@dataclass(frozen=True)
class PercolatedWigner(Law):
    """The law of ``D W D``, W a GOE(scale) matrix and D a diagonal of zeros and ones, with a share p of ones.

    That is site percolation, and it leaves an atom of ``1 - p`` at zero and a semicircle of radius ``2 scale sqrt(p)``.
    Bond percolation, which deletes single entries, leaves a plain semicircle unless few entries per row remain
    (`SparseWigner`). GOE(s) has off-diagonal variance ``s^2 / n``.

    Percolated Wigner matrices as laws of Hessians: Granziol 2020, arXiv:2006.07721.

    Attributes:
        p: share of the rows that stay, above 0 and at most 1.
        scale: of the full matrix, positive. The variance, the atom included, is ``(p scale)^2``.

    Raises:
        ValueError: p isn't in (0, 1], or the scale isn't positive and finite.

    Example:
        >>> law = PercolatedWigner(0.25, 2.0)
        >>> law.atom, law.edges
        (0.75, (-2.0, 2.0))
        >>> round(law.moment(2), 6)
        0.25
    """

    p: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p is a share above 0 and at most 1, got {self.p}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale is positive and finite, got {self.scale}")

    @property
    def _rest(self) -> Semicircle:
        """The continuous part, to mass 1."""
        return Semicircle(2 * self.scale * math.sqrt(self.p))

    @property
    def atom(self) -> float:
        """Mass at zero."""
        return 1 - self.p

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, symmetric."""
        return self._rest.support

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density of the continuous part at ``x``, shape of ``x``."""
        return self.p * self._rest.density(x)

    def cdf(self, x: ArrayLike) -> NDArray[np.float64]:
        """Mass at or below ``x``, shape of ``x``."""
        return np.asarray(self.p * self._rest.cdf(x) + (1 - self.p) * (np.asarray(x) >= 0))

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> PercolatedWigner:
        """The law with the bulk's mass at zero and the variance of the rest.

        Raises:
            NoFitError: the bulk has no mass at zero (then this is the semicircle), or nothing else.
        """
        if not 0 < bulk.zero_mass < 1:
            raise NoFitError(
                f"site percolation leaves a mass between 0 and 1 at zero, the bulk has {bulk.zero_mass:.3g}"
            )
        if not bulk.continuous.k2 > 0:
            raise NoFitError(f"a semicircle has a positive variance, the bulk off zero has {bulk.continuous.k2:.3g}")
        p = 1 - bulk.zero_mass
        return cls(p, math.sqrt(bulk.continuous.k2 / p))

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix of dimension ``size``, ascending.

        Exactly ``p size`` rows stay (rounded); drawing each row on its own would only make the atom fluctuate.
        """
        kept = max(1, round(self.p * size))
        levels = Semicircle(2 * self.scale * math.sqrt(kept / size)).rvs(kept, rng)
        return np.sort(np.concatenate([np.zeros(size - kept), levels]))
