"""What is left without outliers and zeros, and the errors of its means."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import hessian_like, marchenko_pastur, semicircle, spectrum_of


def test_outliers_are_out_and_the_rest_has_mass_one():
    spectrum = spectrum_of(hessian_like(5000, np.random.default_rng(0)), 100, probes=2)
    bulk = spectrum.bulk
    assert bulk.outliers.size == 10
    assert bulk.size == 4990
    assert bulk.removed_mass == pytest.approx(10 / 5000)
    for x, w in zip(bulk.nodes, bulk.weights, strict=True):
        assert x.max() < 2
        assert w.sum() == pytest.approx(1)
    assert bulk.zero_mass == pytest.approx(0.6, abs=0.03)
    x, w = bulk.probe(0, zeros=False)
    assert w[bulk.is_zero(x)].sum() < 0.05  # what the continuous spectrum has there
    assert w.sum() == pytest.approx(1)
    assert bulk.pooled()[1].sum() == pytest.approx(1)
    assert (np.diff(bulk.pooled()[0]) >= 0).all()


def test_its_moments_are_those_of_the_free_cumulants():
    spectrum = spectrum_of(np.append(marchenko_pastur(3000), [8.0, 11.0, 15.0]), 80, probes=2)
    found = spectrum.free_cumulants()
    m1, m2 = spectrum.bulk.mean(lambda x: np.stack([x, x**2]))
    assert found.removed == 3
    assert m1 == pytest.approx(found.k1.mean)
    assert m2 - m1**2 == pytest.approx(found.k2.mean)
    error = np.sqrt(spectrum.bulk.covariance(lambda x: x[None, :])[0, 0])
    assert error == pytest.approx(found.k1.stderr, rel=0.05)


@pytest.mark.parametrize("probes", [1, 3])
def test_errors_of_means_are_calibrated(probes):
    eigenvalues = np.concatenate([np.zeros(1000), semicircle(1000) + 3])

    def functions(x):
        return np.stack([np.abs(x) < 0.5, x, np.cos(x)]).astype(float)

    truth = functions(eigenvalues).mean(axis=1)
    z = []
    for seed in range(60):
        bulk = spectrum_of(eigenvalues, 40, probes, seed=seed).bulk
        z.append((bulk.mean(functions) - truth) / np.sqrt(np.diag(bulk.covariance(functions))))
    assert np.sqrt(np.mean(np.square(z), axis=0)) == pytest.approx(1, abs=0.35)


def test_an_exactly_known_spectrum_has_no_errors():
    bulk = spectrum_of(np.linspace(-1, 1, 30), 40).bulk
    assert bulk.random_size == 0
    assert bulk.covariance(lambda x: x[None, :]) == 0
