"""The refined law of Pennington and Bahri against simulated matrices, the paper's quartic and its threshold."""

from __future__ import annotations

import numpy as np
import pytest
from simulation_cases import check_the_parts_agree, kolmogorov, mean_moments, moments_of_cumulants

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

PARAMETERS = [(0.25, 0.7), (0.75, 1.0), (1.5, 0.1), (4.0, 1.0)]


def cumulants(phi, energy, sigma):
    jump = energy * phi**2 / 2
    return [sigma**j * phi ** (j - 1) + (jump ** (j / 2) / phi if j % 2 == 0 else 0) for j in range(1, 5)]


@pytest.mark.parametrize(("phi", "energy"), [*PARAMETERS, (2.5, 0.05), (0.1, 2.0)])
def test_the_parts_agree(phi, energy):
    check_the_parts_agree(RefinedWishartPlusWigner(phi, energy, sigma=0.4))


@pytest.mark.parametrize(("phi", "energy"), PARAMETERS)
def test_simulated_matrices_follow_it(phi, energy):
    """Two draws of n = 1000; the distance is that of their pooled eigenvalues."""
    law, rng = RefinedWishartPlusWigner(phi, energy, sigma=1.3), np.random.default_rng(0)
    eigenvalues = np.concatenate([law.rvs(1000, rng) for _ in range(2)])
    assert kolmogorov(law, eigenvalues) < 0.005
    assert np.mean(eigenvalues < -1e-9) == pytest.approx(law.index, abs=0.003)
    assert kolmogorov(RefinedWishartPlusWigner(phi, energy * 1.3, sigma=1.3), eigenvalues) > 0.005


def test_h1_has_the_moments_of_the_paper():
    """theory.md 5.4: m2 = energy phi / 2 and m4 = 2 m2^2 + energy^2 phi^3 / 4, here with phi = 1/4, energy = 1/2."""
    _, k2, _, k4 = cumulants(0.25, 0.5, 0.0)
    assert k2 == pytest.approx(0.0625)
    assert k4 + 2 * k2**2 == pytest.approx(0.008789, abs=1e-6)


@pytest.mark.parametrize(("phi", "energy"), PARAMETERS)
def test_moments_are_those_of_the_free_cumulants(phi, energy):
    law = RefinedWishartPlusWigner(phi, energy, sigma=1.3)
    truth = moments_of_cumulants(*cumulants(phi, energy, 1.3))
    assert [law.moment(k) for k in range(1, 5)] == pytest.approx(truth, rel=1e-6)
    assert mean_moments(law, range(1, 5), 400, 5) == pytest.approx(truth, rel=0.03)


def test_the_paper_s_quartic_holds():
    """Equation 30 in its printed form, at the transform that the density belongs to."""
    phi, energy, sigma = 0.5, 0.4, 1.2
    law = RefinedWishartPlusWigner(phi, energy, sigma)
    z = 1.0 + 0.3j
    x, w = law._quadrature
    g = np.sum(w / (z - x))
    right = (
        2 * (z - sigma * (1 - phi)) * g
        - phi * (2 * sigma * z + energy * (1 - phi)) * g**2
        - energy * phi**2 * (z + sigma * (phi - 2)) * g**3
        + z * energy * sigma * phi**3 * g**4
    )
    assert right == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize(("phi", "energy"), [(0.25, 0.6274170), (0.5, 0.0810367)])
def test_the_threshold(phi, energy):
    for sigma in (1.0, 0.7):
        critical = RefinedWishartPlusWigner(phi, 1.0, sigma).critical_energy
        assert critical == pytest.approx(sigma**2 * energy, abs=1e-6)
        assert RefinedWishartPlusWigner(phi, 0.999 * critical, sigma).index == 0
        near = [RefinedWishartPlusWigner(phi, critical * (1 + e), sigma).index for e in (1e-4, 1e-3)]
        assert np.log10(near[1] / near[0]) == pytest.approx(1.5, abs=1e-3)
    assert RefinedWishartPlusWigner(1.5, 1.0).critical_energy == 0


def test_the_threshold_near_one():
    phi = 0.999
    assert RefinedWishartPlusWigner(phi, 1.0).critical_energy == pytest.approx(8 / 27 * (1 - phi) ** 3, rel=0.01)


def test_with_many_small_parts_it_is_the_plain_law():
    # energy phi / 2 is the variance of H1; with phi -> 0 its higher free cumulants vanish and it becomes a Wigner matrix
    x = np.linspace(-1, 3, 40)
    refined = RefinedWishartPlusWigner(0.01, 100.0)
    assert refined.density(x) == pytest.approx(WishartPlusWigner(0.01, 0.25).density(x), abs=5e-3)
    assert np.abs(refined.density(x) - WishartPlusWigner(0.01, 0.3).density(x)).max() > 5e-3


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, -1), (np.nan, 1, 1)])
def test_impossible_parameters_are_refused(values):
    with pytest.raises(ValueError, match="positive and finite"):
        RefinedWishartPlusWigner(*values)


def test_the_fit_inverts_the_free_cumulants():
    of = FreeCumulantsOf(*cumulants(0.5, 0.3, 2.0))
    law = RefinedWishartPlusWigner.from_bulk(BulkMoments(of, of, 0.0))
    assert (law.phi, law.energy, law.sigma) == pytest.approx((0.5, 0.3, 2.0))
