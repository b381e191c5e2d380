"""Fits to measured spectra: parameters, distances, their errors, and what is taken out first."""

from __future__ import annotations

import numpy as np
import pytest
from measured_cases import measured, product_wishart, quantiles, spectrum_of

from lightning_rmt.laws import MarchenkoPastur, NoFitError, RefinedWishartPlusWigner, Semicircle, WishartPlusWigner
from lightning_rmt.laws.parameters import parameters_of


@pytest.mark.parametrize(
    ("law", "tolerance"),
    [
        (Semicircle(2.0, center=1.0), (0.05, 0.05)),
        (MarchenkoPastur(0.5, scale=0.3), (0.05, 0.05)),
        (MarchenkoPastur(2.0, scale=3.0), (0.05, 0.05)),
        (WishartPlusWigner(0.5, 0.125), (0.10, 0.15, 0.05)),
        # its free cumulants below the fourth leave energy and phi to trade places
        (RefinedWishartPlusWigner(0.5, 0.5), (0.15, 0.25, 0.05)),
    ],
)
def test_parameters_are_recovered(law, tolerance):
    dense = isinstance(law, WishartPlusWigner | RefinedWishartPlusWigner)
    eigenvalues = quantiles(law, 10_000) if dense else law.rvs(10_000, np.random.default_rng(1))
    fit = type(law).fit(spectrum_of(eigenvalues, 60, probes=2, seed=1))
    for (name, truth), most in zip(parameters_of(law).items(), tolerance, strict=True):
        estimate = fit.parameters[name]
        assert estimate.mean == pytest.approx(truth, rel=most)
        assert abs(estimate.mean - truth) < 4 * estimate.stderr
    assert fit.word == "indistinguishable"


def test_parameters_of_a_simulated_sum_are_recovered():
    """T15."""
    fit = WishartPlusWigner.fit(measured(WishartPlusWigner(0.5, 0.125), n=1500, probes=4, seed=1))
    assert fit.parameters["scale"].mean == pytest.approx(1, rel=0.05)
    assert fit.parameters["phi"].mean == pytest.approx(0.5, rel=0.10)
    assert fit.parameters["energy"].mean == pytest.approx(0.125, rel=0.15)


@pytest.mark.parametrize(
    ("truth", "family"),
    [
        (MarchenkoPastur(0.5), MarchenkoPastur),
        (MarchenkoPastur(2.0), MarchenkoPastur),
        (WishartPlusWigner(0.5, 0.125), WishartPlusWigner),
        (WishartPlusWigner(0.5, 0.125), Semicircle),
    ],
)
def test_errors_are_those_over_start_vectors(truth, family):
    """Forty probes of one spectrum, one at a time: claimed and actual errors, of parameters and of the distance."""
    eigenvalues = quantiles(truth, 2000)
    fits = [family.fit(spectrum_of(eigenvalues, 60, seed=seed)) for seed in range(40)]
    found = np.array([[e.mean for e in fit.parameters.values()] for fit in fits])
    claimed = np.array([[e.stderr for e in fit.parameters.values()] for fit in fits])
    assert found.std(axis=0) / np.sqrt(np.mean(claimed**2, axis=0)) == pytest.approx(1, abs=0.35)
    if isinstance(truth, family):
        z = (found - list(parameters_of(truth).values())) / claimed
        assert (np.mean(np.abs(z) < 2, axis=0) >= 0.8).all()
    distances, errors = np.array([[fit.distance, fit.stderr] for fit in fits]).T
    ratio = distances.std() / np.sqrt(np.mean(errors**2))
    # A misfit has the error that it claims; at the floor, where distances can't become smaller, they scatter less.
    assert 0.5 < ratio < 1.35
    assert isinstance(truth, family) or ratio > 0.7


def test_the_error_with_several_probes():
    eigenvalues = quantiles(WishartPlusWigner(0.5, 0.125), 2000)
    fits = [Semicircle.fit(spectrum_of(eigenvalues, 50, probes=4, seed=seed)) for seed in range(16)]
    actual = np.std([fit.distance for fit in fits])
    assert 0.5 < actual / np.mean([fit.stderr for fit in fits]) < 1.6


def test_a_product_is_no_covariance_plus_wigner():
    """T15: a negative variance of the Wigner part is no member."""
    spectrum = spectrum_of(product_wishart(800, np.random.default_rng(0)), 100)
    with pytest.raises(NoFitError, match="nothing is left for a Wigner part"):
        WishartPlusWigner.fit(spectrum)


def test_outliers_and_zeros_are_taken_out_and_stated():
    rng = np.random.default_rng(0)
    bulk = MarchenkoPastur(0.5).rvs(8000, rng)
    outliers = 8 * 1.3 ** np.arange(9)
    fit = MarchenkoPastur.fit(spectrum_of(np.concatenate([np.zeros(11_991), bulk, outliers]), 100))
    assert fit.removed_outliers == 9
    assert fit.removed_outlier_mass == pytest.approx(9 / 20_000)
    assert fit.removed_zero_mass == pytest.approx(0.6, abs=0.02)
    assert fit.parameters["ratio"].mean == pytest.approx(0.5, rel=0.08)
    assert "without 9 outliers" in fit.verdict
    assert "at zero" in fit.verdict


def test_zeros_that_are_the_law_s_own_stay():
    fit = MarchenkoPastur.fit(measured(MarchenkoPastur(2.0), n=5000))
    assert fit.law.ratio == pytest.approx(2.0, rel=0.1)
    assert fit.removed_zero_mass == 0
    assert fit.word == "indistinguishable"


def test_the_fourth_free_cumulant_checks_what_the_fit_did_not_use():
    eigenvalues = quantiles(MarchenkoPastur(0.5), 5000)
    right = [MarchenkoPastur.fit(spectrum_of(eigenvalues, 60, seed=seed)).kurtosis_z for seed in range(20)]
    assert 0.5 < np.std(right) < 1.7
    assert np.abs(right).max() < 5
    wrong = Semicircle.fit(spectrum_of(eigenvalues, 60))
    assert wrong.kurtosis_z < -5
    assert "fourth free cumulant" in wrong.verdict


@pytest.mark.parametrize(
    ("eigenvalues", "steps", "reason"),
    [
        (np.linspace(-1, 1, 500), 6, "at least 8"),
        (np.zeros(100), 20, "at least 8"),
        (np.repeat([1.0, 2.0], 50), 20, "at least 8"),
        (np.append(np.zeros(90), np.arange(1.0, 6.0)), 20, "at least 8"),
    ],
    ids=["few steps", "zeros", "two values", "few values off zero"],
)
def test_a_bulk_that_no_law_can_be_fitted_to_is_refused(eigenvalues, steps, reason):
    with pytest.raises(NoFitError, match=reason):
        Semicircle.fit(spectrum_of(eigenvalues, steps))


def test_fits_scale_with_the_operator():
    """T23: scale."""
    eigenvalues = quantiles(WishartPlusWigner(0.5, 0.125), 1000)
    one, small = (WishartPlusWigner.fit(spectrum_of(c * eigenvalues, 60)) for c in (1.0, 1e-7))
    assert small.distance == pytest.approx(one.distance, rel=1e-4)
    assert small.stderr == pytest.approx(one.stderr, rel=1e-3)
    assert small.parameters["scale"].mean == pytest.approx(1e-7 * one.parameters["scale"].mean)
    assert small.parameters["energy"].stderr == pytest.approx(one.parameters["energy"].stderr, rel=1e-3)
