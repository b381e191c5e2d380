"""Where a density lives, when its transform is known as ``z(G)``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Roots of a polynomial count as real where their imaginary part is below this share of them.
REAL = 1e-7


def intervals(
    slope: ArrayLike,
    z_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    density: Callable[[ArrayLike], ArrayLike],
) -> tuple[tuple[float, float], ...]:
    """Intervals on which the density is positive.

    An edge is a point where two branches of G meet: ``z'(G) = 0`` for a real G. Not every such point lies on the branch
    that is the law's, so each gap between neighbours is asked for its density.

    Args:
        slope: coefficients, highest first, of a polynomial in G whose real roots are the zeros of z'.
        z_of: z as a function of G.
        density: the law's density.
    """
    coefficients = np.trim_zeros(np.asarray(slope, dtype=np.float64), "f")
    roots = np.roots(coefficients)
    real = roots.real[(np.abs(roots.imag) <= REAL * np.abs(roots)) & (roots != 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        points = z_of(real)
    points = np.unique(points[np.isfinite(points)])
    width = float(points[-1] - points[0])
    points = points[np.append(True, np.diff(points) > 1e-12 * width)]
    filled = np.asarray(density((points[:-1] + points[1:]) / 2)) > 1e-9 / width
    found: list[tuple[float, float]] = []
    for low, high, full in zip(points[:-1], points[1:], filled, strict=True):
        if full and found and found[-1][1] == low:
            found[-1] = (found[-1][0], float(high))
        elif full:
            found.append((float(low), float(high)))
    return tuple(found)
