"""The law of two coupled networks: a Wigner matrix plus another one on a block of the coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.laws.law import Law


@dataclass(frozen=True)
class BlockSemicircle(Law):
    """The law of ``b M + A``, ``A`` zero but for its first ``kappa n`` coordinates, where it is ``b1 M1 - x1``.

    M (size n) and M1 (size ``kappa n``) are independent GOE matrices of radius ``sqrt(2)`` each in its own dimension, that
    is with off-diagonal variance ``1 / (2 n)`` and ``1 / (2 kappa n)``. It is the Hessian of the spin-glass model of a
    generative adversarial network (Baskerville, Keating, Mezzadri and Najnudel 2022, arXiv:2101.02524), up to a shift:
    ``fraction`` is kappa, the discriminator's share of the parameters, ``coupling`` is b, ``block`` is b1, ``shift`` is x1.

    With ``a = b^2 / 2`` and ``e = b1^2 / 2`` the blocks' transforms solve ``g1 = 1 / (z + x1 - a g - e g1)``,
    ``g2 = 1 / (z - a g)``, ``g = kappa g1 + (1 - kappa) g2`` (a block Dyson equation). It says that the law is the free
    convolution of A's with a semicircle: for ``w = z - a g(z)``, ``w + a G_A(w) = z``, which has one solution in the
    upper half-plane where there is density and none elsewhere (Biane 1997, Indiana Univ. Math. J. 46, 705). ``w`` is
    a root of a quartic; of two complex pairs the physical one has the semicircle's ``e |g1|^2 < 1``. The largest
    imaginary part is the wrong choice. The edges are the images of the w with ``G_A'(w) = -1 / a``.

    There is no fit. Without a shift the odd cumulants vanish and three parameters would have to be read from two numbers,
    ``k2 = a + kappa e`` and k4. With a shift there are four equations for four parameters, but the coupling only
    enters k2, so that it is what k3 and k4 leave unexplained, and small errors of theirs move all four.

    Attributes:
        fraction: share of the coordinates in the block, between 0 and 1.
        coupling: b, positive.
        block: b1, not negative.
        shift: x1, the block's mean is ``-shift``.

    Raises:
        ValueError: a parameter is out of its range or not finite.

    Example:
        >>> law = BlockSemicircle(0.5, 1.0, 1.0, 4.0)
        >>> [(round(low, 3), round(high, 3)) for low, high in law.support]
        [(-5.778, -2.366), (-0.925, 1.057)]
        >>> round(law.moment(1), 6)  # -kappa x1
        -2.0
    """

    fraction: float
    coupling: float
    block: float
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is a share between 0 and 1, got {self.fraction}")
        if not (self.coupling > 0 and math.isfinite(self.coupling)):
            raise ValueError(f"coupling is positive and finite, got {self.coupling}")
        if not (self.block >= 0 and math.isfinite(self.block)):
            raise ValueError(f"block isn't negative, and finite, got {self.block}")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift is finite, got {self.shift}")

    def _transform_of_a(self, w: float) -> tuple[float, float]:
        """``G_A`` and its derivative at a real w off the support of A."""
        e, t = self.block**2 / 2, w + self.shift
        g1 = 2 / (t + math.copysign(math.sqrt(max(t**2 - 4 * e, 0.0)), t))
        slope = g1 / min(2 * e * g1 - t, -1e-300) if t > 0 else g1 / max(2 * e * g1 - t, 1e-300)
        kappa = self.fraction
        return kappa * g1 + (1 - kappa) / w, kappa * slope - (1 - kappa) / w**2

    @cached_property
    def support(self) -> tuple[tuple[float, float], ...]:
        """One or two intervals."""
        from scipy.optimize import brentq, minimize_scalar  # SciPy is slow to import

        a, radius = self.coupling**2 / 2, math.sqrt(2) * self.block

        def excess(w: float) -> float:  # of the integral of 1/(w - t)^2 over A's law; positive where there is density
            return -self._transform_of_a(w)[1] - 1 / a

        def edge(inner: float, outer: float) -> float:
            # Between A's support at `inner`, where the integral is infinite, and `outer`, where it is below 1/a.
            near = inner + 1e-13 * (outer - inner)
            w = brentq(excess, near, outer, xtol=1e-15) if excess(near) > 0 else near
            return float(w + a * self._transform_of_a(w)[0])

        parts = [(-self.shift - radius, -self.shift + radius), (0.0, 0.0)]
        (_, first), (second, _) = sorted(parts)
        low, high = min(parts[0][0], 0.0), max(parts[0][1], 0.0)
        reach = 1.001 * math.sqrt(a)  # beyond it 1/(w - t)^2 < 1/a for every t
        outer = edge(low, low - reach), edge(high, high + reach)
        if first < second:  # the integral is convex in the gap, so it falls below 1/a on one interval or not at all
            gap = second - first
            middle = minimize_scalar(
                excess,
                bounds=(first + 1e-12 * gap, second - 1e-12 * gap),
                method="bounded",
                options={"xatol": 1e-9 * gap},
            ).x
            if excess(middle) < 0:
                return ((outer[0], edge(first, middle)), (edge(second, middle), outer[1]))
        return (outer,)

    @property
    def _stretch(self) -> float:
        return 2.0  # with a small coupling the coordinates outside the block make a narrow peak near zero

    def density(self, x: ArrayLike) -> NDArray[np.float64]:
        """Density at ``x``, shape of ``x``."""
        points = np.asarray(x, dtype=np.float64)
        inside = np.any([(points > low) & (points < high) for low, high in self.support], axis=0)
        result = np.zeros_like(points)
        result[inside] = self._subordination(points[inside]).imag * 2 / (np.pi * self.coupling**2)
        return result

    def _subordination(self, x: NDArray[np.float64]) -> NDArray[np.complex128]:
        """``w(x + i0)`` on the support, shape (len(x),); zero where rounding hides its imaginary part."""
        a, e, kappa = self.coupling**2 / 2, self.block**2 / 2, self.fraction
        ones, zeros = np.ones_like(x), np.zeros_like(x)
        # g1 = -A(w) / (a kappa w), A(w) = w^2 - x w + (1 - kappa) a, in e g1^2 - (w + x1) g1 + 1 = 0
        quadratic = np.stack([ones, -x, (1 - kappa) * a * ones])
        rest = e * quadratic + a * kappa * np.stack([ones, self.shift * ones, zeros])
        coefficients = np.zeros((5, len(x)))
        for i in range(3):
            coefficients[i : i + 3] += quadratic[i] * rest
        coefficients[2] += (a * kappa) ** 2
        companion = np.zeros((len(x), 4, 4))
        companion[:, 0] = (-coefficients[1:] / coefficients[0]).T
        companion[:, [1, 2, 3], [0, 1, 2]] = 1
        w = np.linalg.eigvals(companion).astype(np.complex128)
        size = np.abs(w**2 - x[:, None] * w + (1 - kappa) * a)
        physical = (w.imag > 0) & (math.sqrt(e) * size < a * kappa * np.abs(w))
        return np.where(physical, w, 0).sum(axis=-1)

    def rvs(self, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Eigenvalues of one simulated matrix of dimension ``size``, ascending; the block's size is rounded."""
        inner = min(max(round(self.fraction * size), 1), size - 1)
        matrix = self.coupling * _goe(size, rng)
        matrix[:inner, :inner] += self.block * _goe(inner, rng) - self.shift * np.eye(inner)
        return np.asarray(np.linalg.eigvalsh(matrix))


def _goe(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A GOE matrix whose spectrum has the radius ``sqrt(2)``."""
    matrix = rng.standard_normal((size, size))
    return (matrix + matrix.T) / (2 * math.sqrt(size))
