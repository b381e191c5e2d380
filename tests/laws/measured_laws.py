"""Laws as measured by Lanczos: on their quantiles (no randomness but the start vector), or on a simulated matrix."""

from __future__ import annotations

import numpy as np
from known_spectra import spectrum_of


def quantiles(law, n):
    """The spectrum of a matrix that follows the law as closely as n levels can."""
    levels = law.quantile((np.arange(n) + 0.5) / n)
    return np.where(np.abs(levels - law.atom_location) < 1e-12, law.atom_location, levels)


def measured(law, n=10000, steps=100, probes=1, seed=0):
    return spectrum_of(quantiles(law, n), steps, probes=probes, seed=seed)


def simulated(law, n=1000, steps=100, probes=1, seed=0):
    return spectrum_of(law.rvs(n, np.random.default_rng(seed)), steps, probes=probes, seed=seed)
