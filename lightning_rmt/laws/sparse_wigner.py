"""The law of a sparse Wigner matrix, with a few entries per row however large it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.bulk import BulkMoments, NoFitError
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.product_wishart import ATOM_TOLERANCE

#: Above this many entries per row the law can't be told from a semicircle (its free kurtosis is below 0.03).
DENSE = 100.0

#: The matrices whose pooled levels stand in for the density, which has no closed form.
SIZE, DRAWS = 800, 20

#: Width of the kernel that smooths the levels, in units of the square root of a level over the scale.
BANDWIDTH = 0.02

#: Levels smaller than this are the atom's: rounding leaves them near 1e-16 of the largest.
ZERO = 1e-12


@dataclass(frozen=True)
class SparseWigner(Law):
    """The law of a Wigner matrix whose bonds were deleted at random until ``degree`` entries per row remained.

    Off the diagonal an entry is there with the probability ``c / n``, and is normal with the variance ``s^2 / c``, so the
    variance of the law is ``s^2`` whatever the degree c. Then ``m4 / m2^2 = 2 + 3 / c`` and the free kurtosis is ``3 / c``
    (with entries of +-1 it would be ``1 / c``, and the trees of the graph would have atoms off zero too). For large c
    it is the semicircle of radius ``2 s``.

    The atom is that of Bordenave, Lelarge and Salez (2011, Ann. Probab. 39, 1097): the share of vertices that a maximum
    matching leaves over (Karp and Sipser 1981). With q the smallest root of ``q = exp(-c exp(-c q))`` it is
    ``q + exp(-c q) + c q exp(-c q) - 1``. The density has no closed form. Ours is the smoothed histogram of the pooled
    levels of 20 simulated matrices of size 800 from a fixed seed (a second, kept per degree), good to 0.01 in the
    distribution function. There are no edges either: `support` ends where those levels do.

    Attributes:
        degree: c, the mean number of entries per row, above 0 and at most 100.
        scale: s, positive.

    Raises:
        ValueError: a parameter is out of its range.

    Example:
        >>> law = SparseWigner(1.0)
        >>> round(law.atom, 4)
        0.4559
        >>> law.moment(2), law.moment(4)
        (1.0, 5.0)
    """

    degree: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.degree <= DENSE:
            raise ValueError(f"degree is above 0 and at most {DENSE:g} (take a Semicircle beyond), got {self.degree}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale is positive and finite, got {self.scale}")

    @property
    def atom(self) -> float:
        """Mass at zero."""
        return _unmatched(self.degree)

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One interval, symmetric, that holds all but about ``1e-4`` of the mass: the law itself has no edges."""
        edge = float(_smoothed(self.degree)[0][-1]) ** 2 * self.scale
        return ((-edge, edge),)

    @property
    def _stretch(self) -> float:
        return 2.0  # the variable of the histogram; the density diverges at zero like powers of a logarithm

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density of the continuous part at ``x``, shape of ``x``, smoothed; its pole at zero is cut to a finite peak."""
        roots, of_root = _smoothed(self.degree)
        root = np.sqrt(np.abs(np.asarray(x, dtype=np.float64)) / self.scale)
        jacobian = 4 * self.scale * np.maximum(root, 1e-4)  # dx/d root, and a half on either side
        return np.asarray((1 - self.atom) * np.interp(root, roots, of_root, right=0.0) / jacobian)

    def moment(self, k: int) -> float:
        """``E[x^k]``, the atom included: exact up to the fifth, from the smoothed density beyond.

        Raises:
            ValueError: ``k`` is negative.
        """
        exact = {0: 1.0, 2: self.scale**2, 4: self.scale**4 * (2 + 3 / self.degree)}
        return exact.get(k, 0.0 if k > 0 and k % 2 else super().moment(k))

    @classmethod
    def from_bulk(cls, bulk: BulkMoments) -> SparseWigner:
        """The law with the second and fourth free cumulant of the whole bulk: ``k4 / k2^2 = 3 / c``, ``k2 = s^2``.

        The mass at zero isn't used and serves as the check; mean and skewness aren't either, they are zero in this law.

        Raises:
            NoFitError: ``k4`` isn't positive, or so small that the semicircle is as good, or the law has another mass at
                zero than the bulk.
        """
        k = bulk.whole
        if not (k.k2 > 0 and k.k4 > 3 / DENSE * k.k2**2):
            raise NoFitError(
                "a sparse Wigner law has a free kurtosis clearly above zero, the bulk has "
                f"k2 = {k.k2:.3g}, k4 = {k.k4:.3g}"
            )
        law = cls(3 * k.k2**2 / k.k4, math.sqrt(k.k2))
        if abs(law.atom - bulk.zero_mass) > ATOM_TOLERANCE:
            raise NoFitError(
                f"the cumulants ask for the mass {law.atom:.3g} at zero, the bulk has {bulk.zero_mass:.3g} there"
            )
        return law

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix of dimension ``size``, ascending.

        The number of entries is fixed to its mean (rounded): drawn, it would only make atom and variance fluctuate.
        """
        bonds = _bonds(size, self.degree)
        return _levels(size, rng.standard_normal(bonds) * (self.scale / math.sqrt(self.degree)), rng)


def _bonds(size: int, degree: float) -> int:
    """Entries below the diagonal of a matrix of this size."""
    return min(round(size * degree / 2), size * (size - 1) // 2)


def _levels(size: int, weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Ascending eigenvalues of a symmetric matrix with these entries at random places below the diagonal."""
    rows, columns = np.tril_indices(size, -1)
    places = rng.choice(len(rows), len(weights), replace=False)
    matrix = np.zeros((size, size))
    matrix[rows[places], columns[places]] = weights
    levels = np.asarray(np.linalg.eigvalsh(matrix))  # reads the lower triangle only
    levels[np.abs(levels) < ZERO * max(1e-300, float(np.abs(levels).max()))] = 0.0
    return levels


@lru_cache(maxsize=256)
def _unmatched(degree: float) -> float:
    """Share of the vertices that a maximum matching of the graph leaves over."""
    q, last = 0.0, -1.0
    for _ in range(100_000):  # from below to the smallest root; slowest at degree e, where the atom hardly depends on q
        if q - last < 1e-15:
            break
        q, last = math.exp(-degree * math.exp(-degree * q)), q
    other = math.exp(-degree * q)
    return min(1.0, max(0.0, q + other + degree * q * other - 1))


@lru_cache(maxsize=64)
def _smoothed(degree: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Square roots of the levels' sizes at scale 1, ascending from 0, and their smoothed density without the atom."""
    from scipy.special import ndtri  # SciPy is slow to import

    rng = np.random.default_rng(0)
    bonds = max(1, _bonds(SIZE, degree))
    # weights at the quantiles of the normal distribution, shuffled: the pool fluctuates less than with drawn ones
    weights = rng.permutation(ndtri((np.arange(DRAWS * bonds) + 0.5) / (DRAWS * bonds))) / math.sqrt(degree)
    levels = np.concatenate([_levels(SIZE, part, rng) for part in weights.reshape(DRAWS, bonds)])
    roots = np.sqrt(np.abs(levels[levels != 0]))
    step = BANDWIDTH / 10
    reach = 4 * BANDWIDTH
    cells = math.ceil((roots.max() + reach) / step)
    # both signs of the roots, so that the kernel doesn't lose mass at zero
    counts, _ = np.histogram(np.concatenate([roots, -roots]), bins=2 * cells, range=(-cells * step, cells * step))
    offsets = np.arange(-round(reach / step), round(reach / step) + 1) * step
    kernel = np.exp(-0.5 * (offsets / BANDWIDTH) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="same")[cells:] / (len(roots) * step)
    return np.concatenate([[0.0], (np.arange(cells) + 0.5) * step]), np.concatenate([density[:1], density])
