"""Laws beside the eigenvalues of their own simulated matrices."""

from __future__ import annotations

import numpy as np


def kolmogorov(law, eigenvalues):
    """Largest difference between the two distribution functions; zeros of the matrix are put at the law's atom."""
    x = np.sort(np.where(np.abs(eigenvalues) < 1e-9, law.atom_location, eigenvalues))
    below, upto = (np.searchsorted(x, x, side=side) / x.size for side in ("left", "right"))
    just_below = law.cdf(x) - law.atom * (x == law.atom_location)
    return max(np.abs(law.cdf(x) - upto).max(), np.abs(just_below - below).max())


def mean_moments(law, orders, size, draws, seed=0):
    """Moments of simulated matrices: mean over the draws, shape (len(orders),)."""
    rng = np.random.default_rng(seed)
    return np.mean([[np.mean(x**k) for k in orders] for x in (law.rvs(size, rng) for _ in range(draws))], axis=0)


def moments_of_cumulants(k1, k2, k3, k4):
    """Moments 1 to 4 of free cumulants 1 to 4 (Nica and Speicher 2006, lecture 11)."""
    return [
        k1,
        k2 + k1**2,
        k3 + 3 * k1 * k2 + k1**3,
        k4 + 4 * k1 * k3 + 2 * k2**2 + 6 * k1**2 * k2 + k1**4,
    ]


def check_the_parts_agree(law):
    """Density, distribution function, atom, edges, moments and quantiles say the same."""
    low, high = law.edges
    assert law.cdf(low - 1) == 0 or law.atom > 0
    assert np.isclose(law.cdf(max(high, law.atom_location) + 1e-9), 1)
    assert np.isclose(law.moment(0), 1)
    outside = np.array([low - 0.1 * (high - low), high + 0.1 * (high - low)])
    assert (law.density(outside) == 0).all()
    # The total mass of the density alone: the integrals of the base class are normalised and wouldn't notice.
    angle = (np.arange(4000) + 0.5) * np.pi / 4000
    mass = 0.0
    for a, b in law.support:
        x = (a + b) / 2 - (b - a) / 2 * np.cos(angle)
        mass += (law.density(x) * np.sin(angle)).sum() * (b - a) / 2 * np.pi / 4000
    assert np.isclose(mass, 1 - law.atom, atol=2e-4)
    grid = np.linspace(low, high, 7).reshape(7, 1)
    assert law.density(grid).shape == law.cdf(grid).shape == (7, 1)
    p = np.array([0.02, 0.3, 0.71, 0.99])
    upto = law.cdf(law.quantile(p))
    assert (upto >= p - 1e-9).all()
