"""The Marchenko-Pastur law against its closed forms and simulated matrices."""

from __future__ import annotations

import numpy as np
import pytest
from simulation_cases import check_the_parts_agree, kolmogorov, mean_moments, moments_of_cumulants

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 1.25, 4.0])
def test_the_parts_agree(ratio):
    check_the_parts_agree(MarchenkoPastur(ratio, scale=0.7))


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 2.0])
def test_simulated_matrices_follow_it(ratio):
    law = MarchenkoPastur(ratio, scale=1.5)
    assert kolmogorov(law, law.rvs(2000, np.random.default_rng(0))) < 0.005


def test_another_ratio_is_seen():
    eigenvalues = MarchenkoPastur(0.5).rvs(2000, np.random.default_rng(0))
    assert kolmogorov(MarchenkoPastur(0.53), eigenvalues) > 0.005


def test_the_fast_simulation_has_the_law_of_the_plain_matrix():
    rng = np.random.default_rng(0)
    for ratio in (0.5, 2.0):
        x = rng.standard_normal((400, round(400 / ratio)))
        plain = np.linalg.eigvalsh(x @ x.T / x.shape[1])
        fast = MarchenkoPastur(ratio).rvs(400, rng)
        assert (np.abs(plain) < 1e-9).sum() == (fast == 0).sum()
        assert np.sort(plain) == pytest.approx(fast, abs=0.15)
        assert np.abs(np.sort(plain) - fast).mean() < 0.02


@pytest.mark.parametrize("ratio", [0.3, 2.0])
def test_moments_are_those_of_the_free_cumulants(ratio):
    law = MarchenkoPastur(ratio, scale=1.5)
    truth = moments_of_cumulants(*(ratio ** (j - 1) * 1.5**j for j in range(1, 5)))
    assert [law.moment(k) for k in range(1, 5)] == pytest.approx(truth, rel=1e-6)
    assert mean_moments(law, range(1, 5), 1000, 5) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize(("ratio", "scale"), [(0, 1), (-1, 1), (0.5, 0), (np.nan, 1), (0.5, np.inf)])
def test_impossible_parameters_are_refused(ratio, scale):
    with pytest.raises(ValueError, match="positive ratio and a positive scale"):
        MarchenkoPastur(ratio, scale)


def bulk_of(k1, k2, zero_mass=0.0):
    whole = FreeCumulantsOf(k1, k2, 0.0, 0.0)
    m1, m2 = k1 / (1 - zero_mass), (k2 + k1**2) / (1 - zero_mass)
    return BulkMoments(whole, FreeCumulantsOf(m1, m2 - m1**2, 0.0, 0.0), zero_mass, 0.01)


def test_its_own_zeros_belong_to_it():
    own = MarchenkoPastur.from_bulk(bulk_of(1.5, 2.25 * 4, zero_mass=0.75))
    assert (own.ratio, own.scale) == pytest.approx((4.0, 1.5))
    # As many zeros as no ratio explains: the law is that of the rest.
    other = MarchenkoPastur.from_bulk(bulk_of(1.5, 2.25 * 4, zero_mass=0.5))
    assert other.atom == pytest.approx(1 - 1 / other.ratio)
    assert other.scale == pytest.approx(3.0)


def test_a_negative_mean_is_refused():
    with pytest.raises(NoFitError, match="positive mean"):
        MarchenkoPastur.from_bulk(bulk_of(-0.1, 1.0))
