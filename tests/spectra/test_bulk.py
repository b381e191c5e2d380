"""What is left of a spectrum without outliers and zeros."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, marchenko_pastur, semicircle, spectrum_of


def test_nothing_is_taken_from_a_plain_bulk():
    bulk = spectrum_of(semicircle(2000), 50, probes=2).bulk
    assert bulk.outliers.size == bulk.removed_mass == bulk.zero_mass == bulk.zero_width == 0
    assert bulk.around_zero == (0.0, 0.0)
    assert bulk.size == 2000
    for nodes, weights in zip(bulk.nodes, bulk.weights, strict=True):
        assert (np.diff(nodes) > 0).all()
        assert weights.sum() == pytest.approx(1)
    assert not bulk.is_zero(np.zeros(1)).any()


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("reorthogonalise_all", [True, False])
def test_outliers_are_gone_from_every_probe(probes, reorthogonalise_all):
    levels = np.concatenate([goe(4000, np.random.default_rng(0)), [-4.0, 3.0, 5.0, 8.0]])
    bulk = spectrum_of(levels, 80, probes, reorthogonalise_all=reorthogonalise_all).bulk
    assert bulk.outliers == pytest.approx([-4, 3, 5, 8])
    assert bulk.size == 4000
    assert bulk.removed_mass == pytest.approx(4 / 4004)
    for nodes, weights in zip(bulk.nodes, bulk.weights, strict=True):
        assert np.abs(nodes).max() < 2.1
        assert weights.sum() == pytest.approx(1)


def test_zeros_beside_a_gap():
    bulk = spectrum_of(np.concatenate([np.zeros(6000), marchenko_pastur(4000)]), 100).bulk
    assert bulk.zero_mass == pytest.approx(0.6, abs=0.04)
    nodes, weights = bulk.probe(0, zeros=False)
    assert weights.sum() == pytest.approx(1)
    assert bulk.around_zero[0] < 2e-3
    assert float(weights @ nodes) == pytest.approx(1, rel=0.05)


def test_the_node_at_zero_stands_for_the_continuous_spectrum_around_it_too():
    """40 % zeros in the middle of a semicircle: without its share the zeros would be 1 % too many, in the mean of 20."""
    levels = np.concatenate([np.zeros(4000), semicircle(6000)])
    spectra = [spectrum_of(levels, 60, seed=seed) for seed in range(20)]
    with_all = np.mean([spectrum.zero_mass for spectrum in spectra])
    split = np.mean([spectrum.bulk.zero_mass for spectrum in spectra])
    assert with_all - 0.4 > 0.008
    assert abs(split - 0.4) < 0.5 * (with_all - 0.4)
    bulk = spectra[0].bulk
    nodes, weights = bulk.probe(0, zeros=False)
    assert 0 in nodes
    assert (np.diff(nodes) > 0).all()
    assert weights.sum() == pytest.approx(1)
    assert bulk.around_zero[0] + bulk.zero_mass == pytest.approx(spectra[0].zero_mass, rel=1e-6)


def test_nothing_is_left_of_zeros():
    bulk = spectrum_of(np.zeros(100), 20).bulk
    assert bulk.zero_mass == 1
    assert bulk.probe(0, zeros=False)[0].size == bulk.pooled(zeros=False)[0].size == 0


def test_pooled_probes():
    bulk = spectrum_of(semicircle(2000), 30, probes=3).bulk
    nodes, weights = bulk.pooled()
    assert nodes.size == 90
    assert (np.diff(nodes) >= 0).all()
    assert weights.sum() == pytest.approx(1)
    assert bulk.mean(lambda x: np.stack([x, x**2])) == pytest.approx([weights @ nodes, weights @ nodes**2])


def test_the_covariance_is_that_over_start_vectors():
    levels = np.concatenate([np.zeros(800), semicircle(1200) + 1])

    def functions(x):
        return np.stack([x, x**2, np.cos(x)])

    bulks = [spectrum_of(levels, 30, seed=seed).bulk for seed in range(60)]
    seen = np.cov(np.array([bulk.mean(functions) for bulk in bulks]).T)
    told = np.mean([bulk.covariance(functions) for bulk in bulks], axis=0)
    assert np.sqrt(np.diag(told)) == pytest.approx(np.sqrt(np.diag(seen)), rel=0.35)
    four = spectrum_of(levels, 30, probes=4).bulk.covariance(functions)
    assert np.diag(four) == pytest.approx(np.diag(told) / 4, rel=0.3)


def test_what_is_exact_has_no_error():
    bulk = spectrum_of(np.linspace(1, 2, 30), 30).bulk
    assert bulk.random_size == 0
    assert (bulk.covariance(lambda x: np.stack([x, x**2])) == 0).all()
