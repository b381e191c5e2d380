"""Wasserstein-1 distances against SciPy's, and the floor below which they mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
from measured_cases import quantiles, spectrum_of
from scipy.stats import wasserstein_distance

from lightning_rmt.laws import (
    MarchenkoPastur,
    PercolatedWigner,
    ProductWigner,
    ProductWishart,
    Semicircle,
    SparseWigner,
    WishartPlusWigner,
)
from lightning_rmt.laws.distance import comparison, law_distance, resolution_floor


@pytest.mark.parametrize("law", [Semicircle(1.8), MarchenkoPastur(0.5, scale=1.1), MarchenkoPastur(3.0)])
def test_the_distance_is_the_usual_one(law):
    bulk = spectrum_of(MarchenkoPastur(3.0).rvs(2000, np.random.default_rng(0)), 50).bulk
    at = comparison(law, bulk)
    nodes, weights = bulk.pooled(at.zeros)
    expected = wasserstein_distance(nodes, quantiles(law, 200_001), u_weights=weights)
    if not at.zeros:
        assert law.atom == 0
    assert law_distance(law, bulk, at) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "law_of",
    [
        lambda number: MarchenkoPastur(number(2)),
        lambda number: ProductWishart((number(1), number(0.5), number(2))),
        lambda number: ProductWigner(number(0.4)),
        lambda number: PercolatedWigner(number(0.5)),
        lambda number: SparseWigner(number(2)),
    ],
)
def test_parameters_may_be_numpy_scalars(law_of):
    bulk = spectrum_of(MarchenkoPastur(2.0).rvs(300, np.random.default_rng(0)), 30).bulk
    plain, numpy = comparison(law_of(float), bulk), comparison(law_of(np.float64), bulk)
    assert plain.zeros is numpy.zeros is True
    np.testing.assert_array_equal(plain.x, numpy.x)


def test_a_shift_is_its_own_distance():
    bulk = spectrum_of(quantiles(Semicircle(2.0), 2000), 60).bulk
    far = Semicircle(2.0, center=10.0)
    nodes, weights = bulk.pooled()
    assert law_distance(far, bulk, comparison(far, bulk)) == pytest.approx(10 - weights @ nodes, rel=1e-4)


@pytest.mark.parametrize("steps", [50, 100])
def test_without_sampling_error_the_floor_is_that_of_the_quadrature(steps):
    """Of a huge matrix: the quadrature is nearly the law's own."""
    law = Semicircle(2.0)
    bulk = spectrum_of(quantiles(law, 60_000), steps).bulk
    floor = resolution_floor(bulk, zeros=False, left=1.0)
    assert floor == pytest.approx(0.33 * 4 / steps, rel=0.15)
    assert law_distance(law, bulk, comparison(law, bulk)) == pytest.approx(floor, rel=0.3)


@pytest.mark.parametrize(("n", "steps", "probes"), [(2000, 50, 1), (2000, 100, 2), (10_000, 100, 1)])
@pytest.mark.parametrize("law", [Semicircle(2.0), MarchenkoPastur(0.5), WishartPlusWigner(0.5, 0.125)])
def test_a_fit_of_the_right_family_is_at_the_floor(law, n, steps, probes):
    eigenvalues = quantiles(law, n)
    fits = [type(law).fit(spectrum_of(eigenvalues, steps, probes, seed=seed)) for seed in range(3)]
    assert 0.6 < np.mean([fit.relative for fit in fits]) < 1.25
