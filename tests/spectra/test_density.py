"""Density and distribution function against laws with known densities."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import (
    clump,
    hessian_like,
    lanczos_of,
    marchenko_pastur,
    marchenko_pastur_density,
    power_law,
    semicircle,
    semicircle_density,
    spectrum_of,
)
from scipy.stats import wasserstein_distance

from lightning_rmt.spectra.spectrum import Spectrum

BULKS = {
    "semicircle": (semicircle(20000), semicircle_density, np.linspace(-2.5, 2.5, 1001)),
    "marchenko-pastur": (marchenko_pastur(20000), marchenko_pastur_density, np.linspace(-0.3, 3.4, 1001)),
    "with outliers": (
        np.append(marchenko_pastur(19990), np.linspace(6, 60, 10)),
        marchenko_pastur_density,
        np.linspace(-0.3, 3.4, 1001),
    ),
}


@pytest.mark.parametrize("name", BULKS)
def test_the_density_is_the_law(name):
    """T24."""
    eigenvalues, law, x = BULKS[name]
    spectrum = spectrum_of(eigenvalues, 50, probes=4)
    error = np.trapezoid(np.abs(spectrum.density(x) - law(x)), x)
    assert error < 0.06


@pytest.mark.parametrize("name", BULKS)
def test_no_constant_width_would_do(name):
    # The control: the constants that other tools use, sigma^2 = 1e-5 and 1 % of the range.
    eigenvalues, law, x = BULKS[name]
    run = lanczos_of(eigenvalues, 50)
    for sigma in (1e-5**0.5, 0.01 * np.ptp(eigenvalues)):
        kernels = np.exp(-0.5 * ((x[:, None] - run.nodes) / sigma) ** 2) / (sigma * (2 * np.pi) ** 0.5)
        assert np.trapezoid(np.abs(kernels @ run.weights - law(x)), x) > 0.08


@pytest.mark.parametrize("reorthogonalise", [True, False])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        semicircle(2000),
        BULKS["with outliers"][0],
        power_law(2000, 1.0),
        hessian_like(2000, np.random.default_rng(0)),
        clump(),
    ],
    ids=["semicircle", "with outliers", "power law", "hessian-like", "clump"],
)
def test_density_and_atoms_make_one(eigenvalues, reorthogonalise):
    """T24."""
    spectrum = spectrum_of(eigenvalues, 60, probes=2, reorthogonalise_all=reorthogonalise)
    low, high = eigenvalues.min() - 1, 1.5 * eigenvalues.max() + 1
    # a grid that is dense where the nodes are
    x = np.unique(np.concatenate([np.linspace(low, high, 4001), *(n + w * k for n, w, k in _around(spectrum))]))
    total = np.trapezoid(spectrum.density(x), x) + sum(atom.mass for atom in spectrum.atoms)
    assert total == pytest.approx(1, abs=0.01)
    assert (spectrum.density(x) >= 0).all()


def _around(spectrum):
    for row in spectrum.nodes:
        width = np.maximum(np.gradient(row), 1e-12)
        for k in np.linspace(-5, 5, 41):
            yield row, width, k


def test_outliers_are_stems_and_not_smeared():
    spectrum = spectrum_of(BULKS["with outliers"][0], 50)
    assert [atom.location for atom in spectrum.atoms] == pytest.approx(np.linspace(6, 60, 10), rel=1e-6)
    assert [atom.mass for atom in spectrum.atoms] == pytest.approx([1 / 20000] * 10)
    assert spectrum.density(np.linspace(6, 60, 10)) == pytest.approx(np.zeros(10), abs=1e-12)


def test_a_degenerate_level_is_a_stem_with_its_mass():
    eigenvalues = np.append(semicircle(1800), np.full(200, 3.0))
    found = {round(atom.location, 6): atom.mass for atom in spectrum_of(eigenvalues, 60, probes=3).atoms}
    assert found[3.0] == pytest.approx(0.1, abs=0.02)


def test_a_semicircle_has_no_atoms():
    for steps in (10, 50, 150):
        assert spectrum_of(semicircle(2000), steps, seed=steps).atoms == ()


def test_a_spectrum_of_points_is_all_stems():
    for eigenvalues in (np.ones(20), np.zeros(20), np.array([2.0])):
        spectrum = spectrum_of(eigenvalues, 10)
        assert sum(atom.mass for atom in spectrum.atoms) == pytest.approx(1)
        assert spectrum.density(np.array([0.0, 1.0, 2.0])) == pytest.approx(np.zeros(3))
        assert spectrum.cdf(eigenvalues[0]) == 1
        assert spectrum.cdf(eigenvalues[0] - 1e-6) == 0


@pytest.mark.parametrize("name", ["semicircle", "marchenko-pastur"])
def test_the_density_band_covers_the_law(name):
    eigenvalues, law, x = BULKS[name]
    x = x[law(x) > 0]
    covered = []
    for seed in range(6):
        lower, upper = spectrum_of(eigenvalues, 60, seed=seed).density_band(x)
        covered.append(np.mean((lower <= law(x)) & (law(x) <= upper)))
        assert np.trapezoid(upper - lower, x) < 0.4  # of 1, so it isn't trivially wide
    assert np.mean(covered) > 0.9


def test_the_density_band_knows_what_smoothing_does():
    # So many eigenvalues and so few steps that the sampling error is nothing beside the resolution.
    x = np.linspace(-1.99, 1.99, 800)
    lower, upper = spectrum_of(semicircle(100_000), 30, probes=4).density_band(x)
    assert np.mean((lower <= semicircle_density(x)) & (semicircle_density(x) <= upper)) > 0.85
    assert np.trapezoid(upper - lower, x) < 0.15


def test_the_distribution_function_converges_with_the_steps():
    """T12: half the distance at twice the steps, up to the sampling's share; .511 and .512 here.

    Wasserstein distance to the truth in units of the range: about 0.31/m of quadrature and 0.41/sqrt(n) of sampling.
    """
    eigenvalues = semicircle(100_000)
    grid = np.linspace(-2.2, 2.2, 20001)
    truth = np.searchsorted(eigenvalues, grid, side="right") / eigenvalues.size
    step, smooth = [], []
    for steps in (25, 50, 100):
        spectrum = spectrum_of(eigenvalues, steps)
        step.append(wasserstein_distance(spectrum.nodes[0], eigenvalues, spectrum.weights[0]) / 4)
        smooth.append(np.trapezoid(np.abs(spectrum.cdf(grid) - truth), grid) / 4)
    assert step[1] < 9e-3
    assert step[2] < 5e-3
    assert step[1] / step[0] == pytest.approx(0.5, abs=0.04)
    assert step[2] / step[1] == pytest.approx(0.5, abs=0.04)
    # mid-weight interpolation is better still on a smooth bulk
    assert smooth[0] < 0.5 * step[0]
    assert smooth[2] < 0.7 * step[2]


def test_the_distribution_function_steps_at_an_atom():
    eigenvalues = hessian_like(20000, np.random.default_rng(0))
    spectrum = spectrum_of(eigenvalues, 100)
    grid = np.concatenate([np.linspace(-0.5, 2, 4001), np.linspace(2.1, 60, 2001)])
    truth = np.searchsorted(np.sort(eigenvalues), grid, side="right") / eigenvalues.size
    assert np.abs(spectrum.cdf(grid) - truth).max() < 0.02
    assert spectrum.cdf(0.0) - spectrum.cdf(-1e-3) > 0.55


def test_the_distribution_function_is_monotone_and_stays_in_its_band():
    for eigenvalues in (power_law(2000, 1.0), hessian_like(2000, np.random.default_rng(1)), clump()):
        spectrum = spectrum_of(eigenvalues, 60, probes=2, reorthogonalise_all=False)
        x = np.sort(
            np.concatenate([np.linspace(eigenvalues.min() - 1, eigenvalues.max() + 1, 301), spectrum.nodes.ravel()])
        )
        share = spectrum.cdf(x)
        assert (np.diff(share) >= -1e-12).all()
        assert share[0] == 0
        assert share[-1] == pytest.approx(1)
        lower, upper = spectrum.cdf_band(x)
        outside = (share < lower - 1e-6) | (share > upper + 1e-6)
        assert outside.mean() < 0.02


def test_ghosts_do_not_show_in_the_density():
    # A three-vector run splits converged levels into copies; widths from distances between copies would be spikes.
    eigenvalues = hessian_like(20000, np.random.default_rng(0))
    x = np.linspace(0.02, 2.5, 500)
    clean = Spectrum((lanczos_of(eigenvalues, 100, 0), lanczos_of(eigenvalues, 100, 1)), 20000, 200, 4e-15)
    ghosts = Spectrum((lanczos_of(eigenvalues, 100, 0), lanczos_of(eigenvalues, 100, 1, False)), 20000, 200, 4e-15)
    assert np.trapezoid(np.abs(clean.density(x) - ghosts.density(x)), x) < 0.05
    alone = Spectrum((lanczos_of(eigenvalues, 100, 1, False),), 20000, 100, 4e-15)
    assert np.trapezoid(np.abs(clean.density(x) - alone.density(x)), x) < 0.1
