"""The law of Pennington and Bahri against simulated matrices, its threshold and its special cases."""

from __future__ import annotations

import numpy as np
import pytest
from simulation_cases import check_the_parts_agree, kolmogorov, mean_moments, moments_of_cumulants

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

PARAMETERS = [(0.25, 0.1), (0.75, 1.0), (2.0, 0.01), (4.0, 0.5)]


@pytest.mark.parametrize(("phi", "energy"), [*PARAMETERS, (0.25, 1e-4), (0.01, 5.0)])
def test_the_parts_agree(phi, energy):
    check_the_parts_agree(WishartPlusWigner(phi, energy, scale=0.3))


@pytest.mark.parametrize(("phi", "energy"), PARAMETERS)
def test_simulated_matrices_follow_it(phi, energy):
    """Two draws of n = 1000; the distance is that of their pooled eigenvalues."""
    law, rng = WishartPlusWigner(phi, energy, scale=1.3), np.random.default_rng(0)
    eigenvalues = np.concatenate([law.rvs(1000, rng) for _ in range(2)])
    assert kolmogorov(law, eigenvalues) < 0.005
    assert np.mean(eigenvalues < 0) == pytest.approx(law.index, abs=0.003)
    assert kolmogorov(WishartPlusWigner(phi, energy * 1.2, scale=1.3), eigenvalues) > 0.005


def test_it_is_the_sum_of_dense_matrices_in_the_stated_normalisation():
    n, phi, energy, rng = 800, 0.5, 0.3, np.random.default_rng(0)
    x, g = rng.standard_normal((n, round(n / phi))), rng.standard_normal((n, n))
    wigner = np.sqrt(2 * energy / n) * (g + g.T) / np.sqrt(2)
    assert np.var(wigner[np.triu_indices(n, 1)]) == pytest.approx(2 * energy / n, rel=0.02)
    eigenvalues = np.linalg.eigvalsh(x @ x.T / x.shape[1] + wigner)
    assert kolmogorov(WishartPlusWigner(phi, energy), eigenvalues) < 0.01


@pytest.mark.parametrize(("phi", "energy"), PARAMETERS)
def test_moments_are_those_of_the_free_cumulants(phi, energy):
    s = 1.3
    law = WishartPlusWigner(phi, energy, scale=s)
    truth = moments_of_cumulants(s, s**2 * (phi + 2 * energy), s**3 * phi**2, s**4 * phi**3)
    assert [law.moment(k) for k in range(1, 5)] == pytest.approx(truth, rel=1e-6)
    assert mean_moments(law, range(1, 5), 400, 5) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize(
    ("phi", "energy", "factor"),
    [(1 / 8, 0.075214, 0.11721), (1 / 4, 0.043510, 0.07483), (1 / 2, 0.011271, 0.03350), (2 / 3, 0.003103, 0.01839)],
)
def test_the_threshold(phi, energy, factor):
    critical = WishartPlusWigner(phi, 1.0).critical_energy
    assert critical == pytest.approx(energy, abs=1e-6)
    assert WishartPlusWigner(phi, 0.999 * critical).index == 0
    excess = np.array([1e-6, 1e-4, 0.02, 0.04, 0.08])
    index = np.array([WishartPlusWigner(phi, critical * (1 + e)).index for e in excess])
    ratio = index / excess**1.5
    assert ratio[0] == pytest.approx(WishartPlusWigner(phi, 1.0).threshold_factor, rel=1e-4)
    assert ratio[0] == pytest.approx(factor, abs=1e-5)
    slopes = np.diff(np.log(index)) / np.diff(np.log(excess))
    assert slopes[0] == pytest.approx(1.5, abs=1e-4)
    assert np.polyfit(np.log(excess[2:]), np.log(index[2:]), 1)[0] == pytest.approx(1.468, abs=0.006)


def test_the_threshold_near_one():
    for phi, ratio in ((0.9, 1.035), (0.99, 1.0033)):
        assert WishartPlusWigner(phi, 1.0).critical_energy / (2 / 27 * (1 - phi) ** 3) == pytest.approx(ratio, abs=1e-3)
    assert WishartPlusWigner(1.5, 1.0).critical_energy == WishartPlusWigner(1.5, 1.0).threshold_factor == 0


def test_its_special_cases():
    x = np.linspace(0.2, 2.8, 50)
    assert WishartPlusWigner(0.5, 1e-9).density(x) == pytest.approx(MarchenkoPastur(0.5).density(x), abs=1e-5)
    assert WishartPlusWigner(1e-9, 0.5).density(x) == pytest.approx(Semicircle(2.0, center=1.0).density(x), abs=1e-5)


def test_zeros_of_the_covariance_part_are_smeared():
    law = WishartPlusWigner(4.0, 0.02)
    assert law.atom == 0
    assert len(law.support) == 2
    assert law.cdf(law.support[0][1]) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (np.nan, 1, 1), (1, np.inf, 1)])
def test_impossible_parameters_are_refused(values):
    with pytest.raises(ValueError, match="positive and finite"):
        WishartPlusWigner(*values)


def bulk_of(k1, k2, k3):
    of = FreeCumulantsOf(k1, k2, k3, 0.0)
    return BulkMoments(of, of, 0.0)


def test_the_fit_inverts_the_free_cumulants():
    s, phi, energy = 2.0, 0.5, 0.3
    law = WishartPlusWigner.from_bulk(bulk_of(s, s**2 * (phi + 2 * energy), s**3 * phi**2))
    assert (law.phi, law.energy, law.scale) == pytest.approx((phi, energy, s))


@pytest.mark.parametrize(
    ("cumulants", "reason"),
    [((-1, 1, 1), "positive mean"), ((1, 1, -0.1), "third free cumulant"), ((1, 0.4, 0.25), "nothing is left")],
)
def test_what_it_cannot_be_is_refused(cumulants, reason):
    with pytest.raises(NoFitError, match=reason):
        WishartPlusWigner.from_bulk(bulk_of(*cumulants))
