"""The law of ``X W X'`` for a Gaussian X and a Wigner matrix W."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.product_wishart import ATOM_TOLERANCE, ProductWishart


@dataclass(frozen=True)
class ProductWigner(Law):
    """The law of ``X W X'``, X of size ``n x k`` with entries of variance ``1 / n``, W a GOE(scale) matrix of size k.

    GOE(s) has off-diagonal variance ``s^2 / k`` in its own dimension. A free compound Poisson law of rate ``c = k / n``:
    its R-transform is ``c E[w / (1 - g w)]`` over the semicircle of W. Hence
    ``(s g h)^2 - h + 1 = 0`` with ``h = 1 + (z g - 1) / c``, and in ``u = z g - 1``
    ``z^2 u = c s^2 (1 + u)^2 (1 + u / c)^2``: the squares of its eigenvalues have the law of `ProductWishart` with the
    dimensions ``(1, 1, c, c)`` and mean ``c s^2``, whose density is on the right branch everywhere. (The root of
    largest imaginary part isn't.)

    Products of Wigner and Wishart matrices as laws of Hessians: Granziol 2020, arXiv:2006.07721.

    Attributes:
        ratio: ``c = k / n``, positive; below 1 there is an atom of ``1 - c``.
        scale: ``s``, positive. The second free cumulant is ``c s^2``, the fourth ``2 c s^4``.

    Raises:
        ValueError: a parameter isn't positive and finite.

    Example:
        >>> law = ProductWigner(0.25, 2.0)
        >>> law.atom
        0.75
        >>> round(law.moment(2), 6)
        1.0
    """

    ratio: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.ratio > 0 and self.scale > 0 and math.isfinite(self.ratio) and math.isfinite(self.scale)):
            raise ValueError(f"ratio and scale are positive and finite, got {self.ratio}, {self.scale}")

    @property
    def _squares(self) -> ProductWishart:
        """The law of the squared eigenvalues."""
        return ProductWishart((1.0, 1.0, self.ratio, self.ratio), self.ratio * self.scale**2)

    @property
    def atom(self) -> float:
        """Mass at zero: the matrix has rank ``min(n, k)``."""
        return max(0.0, 1 - self.ratio)

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, symmetric."""
        edge = math.sqrt(self._squares.edges[1])
        return ((-edge, edge),)

    @property
    def _stretch(self) -> float:
        return 2.0  # at ratio 1 the density diverges like |x|^(-1/2)

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density of the continuous part at ``x``, shape of ``x``; at ratio 1 its pole at zero is cut to a finite peak."""
        points = np.asarray(x, dtype=np.float64)
        squares = self._squares
        size = np.maximum(np.abs(points), 1e-9 * math.sqrt(squares.edges[1]))
        return np.asarray(size * squares.density(size**2))  # half of 2 |x| rho(x^2) on either side

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> ProductWigner:
        """The law with the second and fourth free cumulant of the whole bulk: ``k4 / k2^2 = 2 / c``, ``k2 = c s^2``.

        The mass at zero isn't used and serves as the check; mean and skewness aren't either, they are zero in this law.

        Raises:
            NoFitError: ``k4`` isn't positive, or the law has another mass at zero than the bulk.
        """
        k = bulk.whole
        if not (k.k2 > 0 and k.k4 > 0):
            raise NoFitError(f"X W X' has positive second and fourth free cumulants, the bulk {k.k2:.3g}, {k.k4:.3g}")
        ratio = 2 * k.k2**2 / k.k4
        law = cls(ratio, math.sqrt(k.k2 / ratio))
        if abs(law.atom - bulk.zero_mass) > ATOM_TOLERANCE:
            raise NoFitError(
                f"the cumulants ask for the mass {law.atom:.3g} at zero, the bulk has {bulk.zero_mass:.3g} there"
            )
        return law

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix of dimension ``size``, ascending; ``k = ratio size``, rounded."""
        k = max(1, round(self.ratio * size))
        x = rng.standard_normal((size, k)) / math.sqrt(size)
        w = rng.standard_normal((k, k))
        w = (w + w.T) * (self.scale / math.sqrt(2 * k))
        if k < size:  # the eigenvalues other than zero are those of L' W L with X' X = L L'
            lower = np.linalg.cholesky(x.T @ x)
            return np.sort(np.concatenate([np.zeros(size - k), np.linalg.eigvalsh(lower.T @ w @ lower)]))
        return np.asarray(np.linalg.eigvalsh(x @ w @ x.T))
