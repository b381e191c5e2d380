"""An independent Lanczos in NumPy (float64, full reorthogonalisation) and operators with known spectra."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.spectrum import Spectrum

NOISE = 20 * np.finfo(np.float64).eps


def lanczos_of(eigenvalues, steps, seed=0, reorthogonalise=True):
    """Lanczos on diag(eigenvalues) from a Gaussian start: equal in law to Lanczos on any matrix with this spectrum."""
    diagonal = np.asarray(eigenvalues, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(diagonal.size)
    steps = min(steps, diagonal.size)
    basis = np.zeros((steps + 1, diagonal.size))
    basis[0] = start / np.linalg.norm(start)
    alpha, beta = np.zeros(steps), np.zeros(steps)
    scale = np.abs(diagonal).max()
    for j in range(steps):
        w = diagonal * basis[j]
        alpha[j] = basis[j] @ w
        w -= alpha[j] * basis[j] + (beta[j - 1] * basis[j - 1] if j else 0)
        if reorthogonalise:
            for _ in range(2):
                w -= basis[: j + 1].T @ (basis[: j + 1] @ w)
        beta[j] = np.linalg.norm(w)
        if beta[j] <= 1e-13 * scale or j + 1 == diagonal.size:
            beta[j] = 0.0
            return Tridiagonal(alpha[: j + 1], beta[: j + 1], reorthogonalise)
        basis[j + 1] = w / beta[j]
    return Tridiagonal(alpha, beta, reorthogonalise)


def spectrum_of(eigenvalues, steps, probes=1, seed=0, three_vector_extra=False):
    """Spectrum of diag(eigenvalues); probes after the first run without reorthogonalisation if asked."""
    runs = tuple(
        lanczos_of(eigenvalues, steps, 1000 * seed + p, reorthogonalise=p == 0 or not three_vector_extra)
        for p in range(probes)
    )
    return Spectrum(runs, len(eigenvalues), sum(run.steps for run in runs), NOISE)


@pytest.fixture(name="lanczos_of", scope="session")
def _lanczos_of():
    return lanczos_of


@pytest.fixture(name="spectrum_of", scope="session")
def _spectrum_of():
    return spectrum_of
