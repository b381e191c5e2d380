"""Readings of operators whose spectra are known: a diagonal matrix is its own ground truth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from lightning_rmt.krylov.lanczos import lanczos, rounding_noise, start_vector
from lightning_rmt.local_law import BatchLaw
from lightning_rmt.reading import Reading
from lightning_rmt.spectra.moments import Estimate
from lightning_rmt.spectra.spectrum import Spectrum


class Diagonal:
    """diag(eigenvalues) as an operator."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, eigenvalues):
        self.eigenvalues = torch.as_tensor(np.asarray(eigenvalues, dtype=np.float64))
        self.size = self.eigenvalues.numel()

    def matmat(self, V):
        return V * self.eigenvalues


def diagonal_spectrum(eigenvalues, steps=100, probes=1, seed=0):
    operator = Diagonal(eigenvalues)
    runs = tuple(lanczos(operator, start_vector(operator, seed + i), steps) for i in range(probes))
    products = sum(run.steps for run in runs)
    return Spectrum(runs=runs, size=operator.size, products=products, noise=rounding_noise(torch.float64))


def trained_eigenvalues(size=3000, outliers=9, scale=1.0, seed=0):
    """A bulk with a heavy positive tail (i^-1) and a lighter negative one, most of it near zero; outliers from 4 to 10."""
    rng = np.random.default_rng(seed)
    positive = 0.7 / np.arange(1, size // 2 + 1)
    negative = -0.3 / np.arange(3, size // 4 + 3) ** 0.9
    near_zero = rng.normal(0, 0.002, size - positive.size - negative.size - outliers)
    return scale * np.concatenate([np.linspace(4, 10.4, outliers), positive, negative, near_zero])


def semicircle_eigenvalues(size=2000):
    """The quantiles of Wigner's semicircle on [-2, 2]."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    x = 2 * np.sin(angles)
    cdf = 0.5 + x * np.sqrt(4 - x**2) / (4 * np.pi) + np.arcsin(x / 2) / np.pi
    return np.interp((np.arange(size) + 0.5) / size, cdf, x)


def initial_eigenvalues(size=3000, seed=0):
    """Power-law tails on both sides and no gap anywhere."""
    rng = np.random.default_rng(seed)
    tails = [0.35 * np.arange(1, 300) ** -0.7, -0.1 * np.arange(1, 200) ** -0.6]
    return np.concatenate([*tails, rng.normal(0, 0.002, size - 498)])


def mostly_zero_eigenvalues(size=1000):
    """60 % zeros, the rest between 0.1 and 2.9."""
    return np.concatenate([np.zeros(6 * size // 10), np.linspace(0.1, 2.9, 4 * size // 10)])


def wide_eigenvalues(size=3000):
    """Heavy tails on both sides: five decades each to show."""
    tail = 3e4 * np.arange(1, size // 2 + 1) ** -2.0
    return np.concatenate([tail, -0.9 * tail])


CASES = {
    "initial": (initial_eigenvalues, {}, {"step": 0}),
    "trained": (trained_eigenvalues, {}, {"learning_rate": 0.11}),
    "three probes": (trained_eigenvalues, {"probes": 3}, {}),
    "semicircle": (semicircle_eigenvalues, {}, {"learning_rate": 0.6}),
    "mostly zero": (mostly_zero_eigenvalues, {}, {"curvature": "ggn", "learning_rate": None}),
    "tiny": (lambda: 1e-6 * trained_eigenvalues(), {}, {"curvature": "gradient_covariance"}),
    "huge": (lambda: 1e6 * trained_eigenvalues(), {}, {"step": 123456}),
    "negative": (lambda: -trained_eigenvalues(), {}, {}),
    "wide": (wide_eigenvalues, {}, {}),
    "four steps": (trained_eigenvalues, {"steps": 4}, {}),
    "all zero": (lambda: np.zeros(50), {}, {}),
    "one parameter": (lambda: np.array([3.0]), {}, {}),
}


@cache
def case(name):
    eigenvalues, how, changes = CASES[name]
    return make_reading(diagonal_spectrum(eigenvalues(), **how), **changes)


@pytest.fixture(params=CASES)
def any_reading(request):
    """One reading of each kind that a figure or a table must cope with."""
    return case(request.param)


@pytest.fixture(scope="session")
def known():
    """``known(name)`` is the reading of one of CASES, computed once."""
    return case


@pytest.fixture(scope="session")
def trained():
    """Exactly nine outliers from 4 to 10.4 above a bulk that ends at 0.7; no gap below."""
    return case("trained")


@pytest.fixture(scope="session")
def exact():
    """Twelve eigenvalues, all of them found exactly."""
    return make_reading(diagonal_spectrum(EXACT))


EXACT = np.array([-3.0, -0.5, -0.02, -0.003, 0.0011, 0.02, 0.13, 0.5, 1.4, 2.6, 7.0, 40.0])


@pytest.fixture(scope="session")
def exact_eigenvalues():
    return EXACT


@pytest.fixture(scope="session")
def reading_of():
    """``reading_of(eigenvalues, steps=100, **changes)``: a reading of a diagonal matrix."""

    def make(eigenvalues, steps=100, **changes):
        return make_reading(diagonal_spectrum(eigenvalues, steps), **changes)

    return make


@pytest.fixture(scope="session")
def law():
    """Two outliers on four groups of nested batches, with the noise of a single sample known."""
    rng, rows = np.random.default_rng(0), []
    for group in range(4):
        for size in (64, 32, 32, 16, 16, 16, 16):
            scale = size**-0.5
            rows.append((size, group, *(theta + 40 / theta / size + scale * rng.normal() for theta in (10.4, 9.6))))
    sizes, groups, *levels = np.array(rows).T
    return BatchLaw(sizes, np.stack(levels, axis=1), groups.astype(int), 5000.0, 0.0, Estimate(1.5, 0.1), 70.0)


def make_reading(spectrum, **changes):
    plain = Reading(
        step=120,
        epoch=1,
        spectrum=spectrum,
        curvature="hessian",
        name="rmt",
        seconds=1.5,
        samples=256,
        parameters=("weight",),
        learning_rate=0.1,
        symmetry_error=1e-7,
        repeat_error=0.0,
    )
    return replace(plain, **changes)
