"""Curvature with known noise: the true matrix is diagonal, which no rule knows of."""

from __future__ import annotations

from functools import cache

import numpy as np
from known_spectra import hessian_like, marchenko_pastur, power_law, spectrum_of


def true_curvature(kind, n):
    """Eigenvalues of the true matrix."""
    return {
        "flat": lambda: np.concatenate([np.zeros(n - 3), [2.0, 4.0, 8.0]]),
        "bulk": lambda: np.concatenate([marchenko_pastur(n - 5), [4.0, 6.0, 8.0, 12.0, 20.0]]),
        "spikes": lambda: np.concatenate([marchenko_pastur(n - 10) / 4, np.geomspace(2, 30, 10)]),
        "power": lambda: 10 * power_law(n, 1.0),
        "network": lambda: hessian_like(n, np.random.default_rng(5)),
    }[kind]()


def goe_matrix(n, rng):
    """GOE(1): off-diagonal variance 1/n."""
    g = rng.standard_normal((n, n))
    return (g + g.T) / (2 * n) ** 0.5


def one_spike(theta, n, rng):
    """Diagonal and off-diagonal of a matrix with the law of GOE(1) plus theta in its first direction.

    Householder's reduction starts with that direction and leaves it alone, so the tridiagonal model has the same law.
    """
    diagonal = rng.normal(0, 2**0.5, n) / n**0.5
    diagonal[0] += theta
    return diagonal, np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1)) / n)


class Noisy:
    """One noisy matrix of known truth: its eigenvectors, and its spectrum as it is measured."""

    def __init__(self, truth, matrix, steps=100, seed=0, probes=4):
        self.truth = truth
        self.levels, self.vectors = np.linalg.eigh(matrix)
        self.spectrum = spectrum_of(self.levels, steps, probes, seed=seed)

    def step(self, damping, gradient):
        """``(H + damping)^-1 g``."""
        return self.vectors @ ((self.vectors.T @ gradient) / (self.levels + damping))


@cache
def wigner(kind, noise, n, seed=0):
    """The truth plus GOE(noise)."""
    truth = true_curvature(kind, n)
    matrix = np.diag(truth) + noise * goe_matrix(n, np.random.default_rng(seed))
    return Noisy(truth, matrix, seed=seed)


@cache
def covariance(kind, samples, n, seed=0):
    """Sample covariance of the truth."""
    truth = true_curvature(kind, n)
    x = np.sqrt(truth)[:, None] * np.random.default_rng(seed).standard_normal((n, samples))
    noisy = Noisy(truth, x @ x.T / samples, seed=seed)
    noisy.levels = noisy.levels.clip(0)
    noisy.spectrum = spectrum_of(noisy.levels, 100, 4, seed=seed)
    return noisy
