"""Measured spectra of laws: a simulated matrix, or quantiles of the law, seen through Lanczos."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "spectra"))  # known_spectra, as tests/spectra imports it

from known_spectra import lanczos_of, spectrum_of

__all__ = ["lanczos_of", "measured", "product_wishart", "quantiles", "spectrum_of"]


def quantiles(law, n):
    """A spectrum that is the law, without randomness."""
    return law.quantile((np.arange(n) + 0.5) / n)


def measured(law, n=2000, steps=100, probes=1, seed=0):
    """The measured spectrum of a simulated matrix."""
    return spectrum_of(law.rvs(n, np.random.default_rng(seed)), steps, probes, seed)


def product_wishart(n, rng):
    """Squared singular values of a product of two square matrices: heavy at both ends."""
    a, b = (rng.standard_normal((n, n)) / n**0.5 for _ in range(2))
    return np.linalg.eigvalsh(a @ (b @ b.T) @ a.T)
