"""GOE levels under monotone maps of all kinds, and levels that aren't GOE."""

from __future__ import annotations

import numpy as np
from known_spectra import goe, marchenko_pastur_density
from scipy.special import ndtr
from scipy.stats import t as student


def semicircle_cdf(x):
    x = np.clip(x, -2, 2)
    return 0.5 + x * np.sqrt(4 - x**2) / (4 * np.pi) + np.arcsin(x / 2) / np.pi


def bulk(k, rng):
    """k consecutive levels from the middle of a larger GOE matrix."""
    n = max(int(1.6 * k), k + 60)
    start = (n - k) // 2
    return goe(n, rng)[start : start + k]


def uniform(k, rng):
    """GOE levels on (0, 1) of constant density."""
    levels = semicircle_cdf(bulk(k, rng))
    step = (levels[-1] - levels[0]) / (k - 1)
    return (levels - levels[0] + step / 2) / (levels[-1] - levels[0] + step)


def whole(k, rng):
    return goe(k, rng)


def marchenko_pastur_map(k, rng):
    x = np.linspace((1 - 0.5**0.5) ** 2, (1 + 0.5**0.5) ** 2, 20001)
    density = marchenko_pastur_density(x)
    total = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2))
    return np.interp(uniform(k, rng), total / total[-1], x)


def power_law_map(k, rng):
    """Levels that fall like a power of their rank, over four decades."""
    return (uniform(k, rng)[::-1] * k) ** (-4 / np.log10(k))


def log_uniform_map(k, rng):
    return 10 ** (4 * uniform(k, rng) - 4)


def heaps_map(k, rng):
    """Three log-normal heaps over six decades, as the Hessian of a trained network may have."""
    grid = np.linspace(-8, 3, 8001)
    share = 0.85 * ndtr((grid + 4) / 0.8) + 0.12 * ndtr((grid + 2) / 0.6) + 0.03 * ndtr(grid / 0.7)
    return 10 ** np.interp(uniform(k, rng), share, grid)


def two_signs_map(k, rng):
    return student.ppf(uniform(k, rng), 2)


def through_zero_map(k, rng):
    """Both signs over eight decades, without a hole at zero, as in an untrained network's Hessian."""
    return 1e-8 * np.sinh(np.log(2e8) * (2 * uniform(k, rng) - 1))


def steps_map(k, rng):
    """Log-uniform over nine decades but for three heaps that begin and end abruptly: no fit follows these."""
    grid = np.linspace(-9, 0, 9001)
    density = np.where(grid % 3 < 0.6, 12.0, 0.6)
    share = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2))
    return 10 ** np.interp(uniform(k, rng), share / share[-1], grid)


def two_signs_and_zeros(k, rng):
    return np.sort(np.append(two_signs_map(k, rng) + 0.4, np.zeros(k // 2)))


MAPS = {
    f.__name__: f
    for f in (
        bulk,
        whole,
        marchenko_pastur_map,
        power_law_map,
        log_uniform_map,
        heaps_map,
        two_signs_map,
        through_zero_map,
        two_signs_and_zeros,
    )
}


def poisson(k, rng):
    return np.cumsum(rng.exponential(size=k))


def two_blocks(k, rng):
    """k levels from the middle of two independent GOE spectra laid over each other."""
    both = np.sort(np.append(semicircle_cdf(goe(k, rng)), semicircle_cdf(goe(k, rng))))
    return both[k // 2 : k // 2 + k]
