"""Free cumulants of measured bulks."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import spectrum_of
from measured_laws import measured, quantiles
from simulation_cases import moments_of_cumulants

from lightning_rmt.laws.bulk import NoFitError
from lightning_rmt.laws.cumulants import Frame, free_cumulants_of, measured_moments
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.semicircle import Semicircle


def test_moments_and_free_cumulants_are_inverses():
    of = free_cumulants_of(*moments_of_cumulants(0.3, 1.2, -0.4, 0.9))
    assert (of.k1, of.k2, of.k3, of.k4) == pytest.approx((0.3, 1.2, -0.4, 0.9))


def test_nothing_cancels_far_from_zero():
    of = measured_moments(spectrum_of(quantiles(Semicircle(1e-3, 0.0), 1000) + 10, 40).bulk).moments().whole
    assert of.k2 == pytest.approx(2.5e-7, rel=0.1)
    assert abs(of.k4) < 0.3 * of.k2**2


def test_a_frame_gives_the_units_of_the_operator():
    x = np.random.default_rng(0).normal(3.0, 2.0, 1000)
    frame = Frame(2.5, 1.7)
    of, direct = frame.cumulants(frame.powers(x).mean(axis=1)), free_cumulants_of(*(np.mean(x**k) for k in range(1, 5)))
    assert (of.k1, of.k2, of.k3, of.k4) == pytest.approx((direct.k1, direct.k2, direct.k3, direct.k4), rel=1e-9)


def test_free_skewness_and_kurtosis():
    """T15."""
    for law, skew, kurtosis, off in (
        (Semicircle(2.0), 0.0, 0.0, (0.1, 0.1)),
        (MarchenkoPastur(0.5), 0.5**0.5, 0.5, (0.06, 0.12)),
    ):
        of = measured_moments(measured(law, 20000, 60).bulk).moments().whole
        assert of.k3 / of.k2**1.5 == pytest.approx(skew, abs=off[0])
        assert of.k4 / of.k2**2 == pytest.approx(kurtosis, abs=off[1])


def test_a_sparse_matrix_of_signs():
    """T15: degree 4 and entries +-1: a free kurtosis of 1/4. (The entries of `SparseWigner` are normal: 3/4.)"""
    n, rng = 1500, np.random.default_rng(0)
    upper = np.triu(rng.random((n, n)) < 4 / n, 1) * rng.choice([-1.0, 1.0], (n, n))
    of = measured_moments(spectrum_of(np.linalg.eigvalsh(upper + upper.T), 40, probes=8).bulk).moments().whole
    assert of.k4 / of.k2**2 == pytest.approx(0.25, abs=0.1)


def test_with_and_without_zeros():
    of = measured_moments(measured(PercolatedWigner(0.6), 20000, 60).bulk).moments()
    assert of.zero_mass == pytest.approx(0.4, abs=0.02)
    assert of.whole.k2 == pytest.approx(0.36, rel=0.05)
    assert of.continuous.k2 == pytest.approx(0.6, rel=0.05)
    assert abs(of.continuous.k4) < 0.1 * of.continuous.k2**2


def test_influences_are_derivatives():
    """Moving a little mass to one node moves the values as its influence says."""
    bulk = measured(MarchenkoPastur(3.0), 2000, 40).bulk
    moments = measured_moments(bulk)
    influence = moments.influences(bulk.nodes[0])
    assert influence.shape == (5, bulk.nodes[0].size)
    assert abs(influence[4] @ bulk.weights[0]) < 0.02
    values = moments.values[:4]
    off = ~bulk.is_zero(bulk.nodes[0])
    e, place = 1e-6, int(np.flatnonzero(off)[-1])
    weights = bulk.weights[0] * (1 - e)
    weights[place] += e
    moved = moments.frame.powers(bulk.nodes[0][off]) @ weights[off] / weights[off].sum()
    assert (moved - values) / e == pytest.approx(influence[:4, place], rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    ("levels", "steps", "message"),
    [
        (np.linspace(0, 1, 500), 5, "5 nodes off zero"),
        (np.full(100, 3.0), 20, "1 nodes off zero"),
        (np.repeat([1.0, 2.0, 3.0], 50), 20, "3 nodes off zero"),
    ],
)
def test_bulks_that_no_law_is_fitted_to(levels, steps, message):
    with pytest.raises(NoFitError, match=message):
        measured_moments(spectrum_of(levels, steps).bulk)
