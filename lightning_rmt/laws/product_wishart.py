"""The law of ``J J'`` for a product J of independent rectangular Gaussian matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import Law

#: Largest disagreement between the atom that the free cumulants imply and the observed mass at zero.
ATOM_TOLERANCE = 0.15
#: So far beyond equal ratios, in their squared sum, cumulants are still taken for those of equal ones: with a few thousand
#: eigenvalues and one probe the noise is 0.04.
EQUAL = 0.1


@dataclass(frozen=True)
class ProductWishart(Law):
    """The law of ``scale J J' / (N1 ... Nk)``, ``J = X1 ... Xk``, Xi of size ``N(i-1) x Ni`` with entries of variance 1.

    With ``u = z g(z) - 1`` and ``r_i = N0 / Ni`` the S-transforms of the factors give
    ``z u = scale (1 + u) (1 + r_1 u) ... (1 + r_k u)`` (Mueller 2002; Burda, Jarosz, Livan, Nowak and Swiech 2010,
    arXiv:1007.3594). Only the ratios of the dimensions matter, they needn't be integers. The mean is ``scale``, the second
    free cumulant ``scale^2 (r_1 + ... + r_k)``. One factor is the Marchenko-Pastur law.

    The physical root is told by its argument, not by the size of its imaginary part: for z in the support
    ``arg u = arg(1 + u) + sum_i arg(1 + r_i u)`` holds without a multiple of ``2 pi`` for exactly one root, since on every
    ray from zero the sum changes monotonically with ``|u|`` (as in the closed form of the Fuss-Catalan densities).

    Attributes:
        dims: ``(N0, N1, ..., Nk)``, positive, at least one factor.
        scale: mean of the law, positive.

    Raises:
        ValueError: fewer than two dimensions, or one of them or the scale isn't positive and finite.

    Example:
        >>> law = ProductWishart((1000, 500, 2000))
        >>> law.atom
        0.5
        >>> round(law.moment(1), 6), round(law.moment(2), 6)  # 1 + 1000/500 + 1000/2000
        (1.0, 3.5)
    """

    dims: tuple[float, ...]
    scale: float = 1.0

    limits: ClassVar[dict[str, str]] = {"1/dims[2]": "MarchenkoPastur"}  # of a fit, which puts the smaller ratio last

    def __post_init__(self) -> None:
        if len(self.dims) < 2 or not all(d > 0 and math.isfinite(d) for d in self.dims):
            raise ValueError(f"dims are two or more positive numbers (N0, N1, ..., Nk), got {self.dims}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale is positive and finite, got {self.scale}")

    @property
    def _ratios(self) -> NDArray[np.float64]:
        """``N0 / Ni`` for i = 0 to k, descending, shape (k + 1,)."""
        return np.sort(self.dims[0] / np.array(self.dims, dtype=np.float64))[::-1]

    @property
    def atom(self) -> float:
        """Mass at zero: the matrix has rank ``min_i Ni``."""
        return 1 - min(self.dims) / self.dims[0]

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, down to zero where the two smallest dimensions agree."""
        from scipy.optimize import brentq  # SciPy is slow to import

        r = self._ratios

        def slope(u: float) -> float:  # u d(ln z)/du, which ascends wherever it is defined
            return float((r * u / (1 + r * u)).sum() - 1)

        def z(u: float) -> float:
            return self.scale * float(np.prod(1 + r * u)) / u

        high = z(brentq(slope, 0.0, 2 / r[-1], xtol=1e-15))  # at 2 / r[-1] every term of the sum is 2/3 or more
        if r[0] - r[1] < 1e-9 * r[0]:
            return ((0.0, high),)
        # The lower edge sits between the first two poles of u, where the slope runs through all numbers.
        first, second = -1 / r[1], -1 / r[0]
        margin = 1e-6 * (second - first)
        return ((z(brentq(slope, first + margin, second - margin, xtol=1e-15)), high),)

    @property
    def _stretch(self) -> float:
        return float(len(self.dims))  # with all dimensions equal the density diverges like x^(-k/(k+1))

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density of the continuous part at ``x``, shape of ``x``; zero at the ends of the support."""
        points = np.asarray(x, dtype=np.float64)
        low, high = self.edges
        inside = (points > low) & (points < high)
        result = np.zeros_like(points)
        result[inside] = -self._transform(points[inside]).imag / (np.pi * points[inside])
        return result

    def _transform(self, z: NDArray[np.float64]) -> NDArray[np.complex128]:
        """``u(z + i0)`` on the support, shape (len(z),); zero where rounding hides its imaginary part."""
        r = self._ratios
        # In y = 1 + r_0 u the roots stay apart from rounding where the two largest ratios meet and z goes to zero.
        factors = np.ones(1)
        for ratio in r / r[0]:
            factors = np.convolve(factors, [ratio, 1 - ratio])
        coefficients = np.tile(factors, (len(z), 1))
        coefficients[:, -2] -= z / (self.scale * r[0])
        coefficients[:, -1] += z / (self.scale * r[0])
        companion = np.zeros((len(z), len(r), len(r)))
        companion[:, 0] = -coefficients[:, 1:] / coefficients[:, :1]
        companion[:, range(1, len(r)), range(len(r) - 1)] = 1
        y = np.linalg.eigvals(companion).astype(np.complex128)
        u = (y - 1) / r[0]
        turn = np.angle(1 + r * u[..., None]).sum(axis=-1) - np.angle(u)
        physical = (y.imag < 0) & (np.abs(turn) < np.pi)
        return np.where(physical, u, 0).sum(axis=-1)

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> ProductWishart:
        """The product of two factors with the first three free cumulants of the whole bulk.

        With two factors ``k1 = scale``, ``k2 / k1^2 = r1 + r2`` and ``k3 / k1^3 = (r1 + r2)^2 + r1 r2``, so the ratios are
        the roots of a quadratic; which of them comes first doesn't change the law. Where they are equal the roots are
        square roots of noise, so that no ratio is taken for larger than the mass at zero allows, ``1 / (1 - mass)``: there
        the first two cumulants and that mass decide. A law with more zeros than that is refused. Where the ratios come out
        equal, a fit's errors are those of their sum; how far apart they are isn't in them.

        Raises:
            NoFitError: the mean isn't positive, no positive ratios have these cumulants, or their law has another mass at
                zero than the bulk.
        """
        k = bulk.whole
        if k.k1 <= 0:
            raise NoFitError(f"a product of Wishart factors has a positive mean, the bulk's is {k.k1:.3g}")
        total = k.k2 / k.k1**2
        product = k.k3 / k.k1**3 - total**2
        if not (total > 0 and product > 1e-6 * total**2):
            raise NoFitError(
                "a product of two Wishart factors has k3 k1 > k2^2, "
                f"the bulk has {k.k3 * k.k1:.3g} and {k.k2**2:.3g}: at equality one factor is enough"
            )
        spread = total**2 / 4 - product
        if spread < -EQUAL * total**2:  # equal ratios sit at zero, where noise of either sign is expected
            raise NoFitError(
                f"no two real ratios have the sum {total:.3g} and the product {product:.3g} that the cumulants ask for"
            )
        first = total / 2 + math.sqrt(max(spread, 0.0))
        if bulk.zero_mass < 1:
            first = max(min(first, 1 / (1 - bulk.zero_mass)), total / 2)
        law = cls((1.0, 1 / first, 1 / (total - first)), k.k1)
        if abs(law.atom - bulk.zero_mass) > ATOM_TOLERANCE:
            raise NoFitError(
                f"the cumulants ask for the mass {law.atom:.3g} at zero, the bulk has {bulk.zero_mass:.3g} there"
            )
        return law

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix, ascending; the other dimensions keep their proportion to ``size``."""
        dims = [size, *(max(1, round(size * d / self.dims[0])) for d in self.dims[1:])]
        product = rng.standard_normal((size, dims[1]))
        for rows, columns in pairwise(dims[1:]):
            product = product @ rng.standard_normal((rows, columns)) / math.sqrt(rows)
        gram = product @ product.T if size <= dims[-1] else product.T @ product
        levels = np.linalg.eigvalsh(gram)[len(gram) - min(dims) :].clip(0) * (self.scale / dims[-1])
        return np.concatenate([np.zeros(size - min(dims)), levels])
