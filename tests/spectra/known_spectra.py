"""Spectra that are known exactly, and an independent Lanczos in NumPy (float64) to measure them with.

Lanczos from a Gaussian start on any symmetric matrix is equal in law to Lanczos on the diagonal matrix of its
eigenvalues, so no test here needs a dense matrix.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.spectrum import Spectrum

NOISE = 20 * np.finfo(np.float64).eps


def lanczos_of(eigenvalues, steps, seed=0, reorthogonalise=True):
    """A run of the textbook recurrence on diag(eigenvalues), Gram-Schmidt twice if asked."""
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


def spectrum_of(eigenvalues, steps, probes=1, seed=0, reorthogonalise_all=True):
    """The measured spectrum of diag(eigenvalues)."""
    runs = tuple(
        lanczos_of(eigenvalues, steps, 1000 * seed + p, reorthogonalise=reorthogonalise_all or p == 0)
        for p in range(probes)
    )
    return Spectrum(runs, len(eigenvalues), sum(run.steps for run in runs), NOISE)


def semicircle_density(x):
    """Wigner's law on [-2, 2]."""
    return np.sqrt(np.clip(4 - np.square(x), 0, None)) / (2 * np.pi)


def semicircle(n):
    """Quantiles of the semicircle law: a spectrum with neither outliers nor randomness."""
    x = np.linspace(-2, 2, 20001)
    return np.interp((np.arange(n) + 0.5) / n, 0.5 + x * np.sqrt(4 - x**2) / (4 * np.pi) + np.arcsin(x / 2) / np.pi, x)


def marchenko_pastur_density(x, c=0.5):
    """Marchenko-Pastur law of ratio c < 1, mean 1."""
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    return np.sqrt(np.clip((high - x) * (x - low), 0, None)) / (2 * np.pi * c * np.where(x > 0, x, 1))


def marchenko_pastur(n, c=0.5):
    """Quantiles of the Marchenko-Pastur law."""
    x = np.linspace((1 - c**0.5) ** 2, (1 + c**0.5) ** 2, 40001)
    share = np.cumsum(marchenko_pastur_density(x, c))
    return np.interp((np.arange(n) + 0.5) / n, share / share[-1], x)


def goe(n, rng):
    """Eigenvalues of a GOE matrix, edges at -2 and 2 (Dumitriu and Edelman 2002)."""
    chi = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1)))
    return eigvalsh_tridiagonal(rng.normal(0, 2**0.5, n) / n**0.5, chi / n**0.5, lapack_driver="sterf")


def wishart(n, rng, c=0.5):
    """Eigenvalues of a white sample covariance of n variables and n / c samples."""
    dof = n / c
    diagonal = np.sqrt(rng.chisquare(dof - np.arange(n)))
    below = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1)))
    main = diagonal**2 + np.append(0, below**2)
    return eigvalsh_tridiagonal(main / dof, diagonal[:-1] * below / dof, lapack_driver="sterf")


def power_law(n, exponent):
    """1, 2^-e, 3^-e, ...: a heavy tail with no edge and no gap."""
    return np.arange(1.0, n + 1) ** -exponent


def repelling_power_law(n, exponent, rng):
    """A power law whose levels repel as those of the GOE do."""
    share = np.sort(goe(n, rng))
    share = np.clip(share, -2, 2)
    share = 0.5 + share * np.sqrt(4 - share**2) / (4 * np.pi) + np.arcsin(share / 2) / np.pi
    return (n * (1 - np.clip(share, 0, 1 - 1e-9)) + 0.3) ** -exponent


def group_above_power_law(n, exponent, lowest=5.0, growth=1.3, count=9):
    """A group of levels above a power law that begins at 1 and goes on as if the group were part of it.

    Beyond the group ``i log(l_i / l_{i+1})`` is the exponent, so that its gap measures ``count * log(lowest) / exponent``
    local spacings.
    """
    tail = ((count + 1) / np.arange(count + 1.0, n + 1)) ** exponent
    return np.append(tail, lowest * growth ** np.arange(count))


def hessian_like(n, rng):
    """60 % zeros, 10 % negative, a positive bulk, and ten outliers from 2 to 50."""
    zeros, negative = int(0.6 * n), int(0.1 * n)
    bulk = marchenko_pastur(n - zeros - negative - 10) / 2
    return np.concatenate([np.zeros(zeros), -0.05 * rng.chisquare(3, negative), bulk, 2 * 1.43 ** np.arange(10)])


def two_cut(n):
    """Two semicircles that don't touch."""
    return np.concatenate([semicircle(n // 2) - 4, semicircle(n // 2) + 4])


def clump():
    """Fourteen levels above one of multiplicity 64, above a tail."""
    tail = 10 ** np.random.default_rng(0).uniform(-4, -1, 2000)
    return np.concatenate([np.linspace(2, 9, 14), np.ones(64), tail])
