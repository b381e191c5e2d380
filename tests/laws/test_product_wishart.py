"""Products of Wishart factors: the law against simulated matrices, closed forms and recovered parameters."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_levels import bulk_of, kolmogorov, mass_error

from lightning_rmt.laws import ProductWishart
from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError

CASES = {
    "narrow middle": ((1000, 500, 2000), 0.5),
    "narrow end": ((1000, 2000, 400), 0.6),
    "hard edge": ((800, 800, 1600), 0.0),
    "hard edge and atom": ((2.0, 1.0, 1.0), 0.5),
    "all equal": ((1.0, 1.0, 1.0), 0.0),
    "three factors": ((1.0, 0.7, 2.0, 1.5), 0.3),
    "three equal factors": ((1.0, 1.0, 1.0, 1.0), 0.0),
    "nearly a hard edge": ((1.0, 0.99, 2.0), 0.01),
    "one factor": ((1.0, 2.0), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mass_and_the_first_moments_are_right(name):
    dims, atom = CASES[name]
    law = ProductWishart(dims, 3.0)
    assert law.atom == pytest.approx(atom)
    assert abs(mass_error(law)) < 1e-6
    assert law.moment(1) == pytest.approx(3)
    assert law.moment(2) == pytest.approx(9 * sum(dims[0] / d for d in dims))


@pytest.mark.parametrize("name", ["narrow middle", "narrow end", "hard edge", "three factors"])
def test_a_simulated_matrix_has_the_law(name):
    dims, atom = CASES[name]
    law = ProductWishart(dims)
    levels = law.rvs(2000, np.random.default_rng(0))
    assert (levels == 0).mean() == pytest.approx(atom, abs=1e-3)
    assert (np.diff(levels) >= 0).all()
    assert kolmogorov(levels, law) < 0.005


def test_the_levels_are_those_of_the_plain_product():
    rng = np.random.default_rng(3)
    j = rng.standard_normal((600, 300)) @ rng.standard_normal((300, 1200))
    levels = np.linalg.eigvalsh(j @ j.T) / (300 * 1200)
    levels[:300] = 0  # rounding
    assert kolmogorov(levels, ProductWishart((600, 300, 1200))) < 0.008


def test_one_factor_is_marchenko_and_pastur():
    law = ProductWishart((1.0, 2.0))
    low, high = (1 - 0.5**0.5) ** 2, (1 + 0.5**0.5) ** 2
    assert law.edges == pytest.approx((low, high), abs=1e-12)
    x = np.linspace(low, high, 50)[1:-1]
    np.testing.assert_allclose(law.density(x), np.sqrt((x - low) * (high - x)) / (np.pi * x), rtol=1e-9)


def test_equal_dimensions_are_fuss_and_catalan():
    law = ProductWishart((1, 1, 1))
    assert law.edges == pytest.approx((0, 27 / 4), abs=1e-12)
    assert [law.moment(k) for k in (1, 2, 3, 4)] == pytest.approx([1, 3, 12, 55], rel=1e-6)
    a = np.linspace(0.02, 1, 30) * np.pi / 3  # its closed form, Penson and Zyczkowski 2011 (arXiv:1103.3453)
    a = a[:-1]
    x = np.sin(3 * a) ** 3 / (np.sin(a) * np.sin(2 * a) ** 2)
    np.testing.assert_allclose(law.density(x), np.sin(a) ** 2 * np.sin(2 * a) / np.sin(3 * a) ** 2 / np.pi, rtol=1e-9)


def test_the_density_near_a_hard_edge_follows_its_power():
    x = np.array([1e-9, 1e-6])
    density = ProductWishart((1, 1, 1)).density(x)
    assert np.log(density[0] / density[1]) / np.log(x[0] / x[1]) == pytest.approx(-2 / 3, abs=2e-3)


def test_the_largest_imaginary_part_is_the_wrong_root_for_three_factors():
    """Negative control: above the edge of the law there is none, and yet the quartic has a complex pair."""
    law = ProductWishart((1, 1, 1, 1))
    x = law.edges[1] * 1.5
    roots = np.roots(np.array([1, 4, 6, 4 - x, 1]))
    assert np.abs(roots.imag).max() > 0.5
    assert law.density(x) == 0


def test_density_and_distribution_function_agree():
    law = ProductWishart((1, 0.5, 2))
    x = np.linspace(*law.edges, 200)[1:-1]
    step = 1e-3
    slope = (law.cdf(x + step) - law.cdf(x - step)) / (2 * step)
    np.testing.assert_allclose(slope[5:], law.density(x)[5:], atol=2e-4)
    assert law.cdf([-1e-9, 0, 100]) == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("dims", [(1000, 500, 2000), (1000, 2000, 400), (800, 800, 1600)])
def test_the_parameters_come_back(dims):
    levels = ProductWishart(dims, 2.0).rvs(2000, np.random.default_rng(1))
    fit = ProductWishart.from_bulk(bulk_of(levels))
    assert fit.scale == pytest.approx(2, rel=0.05)
    assert sorted(fit.dims[1:]) == pytest.approx(sorted(d / dims[0] for d in dims[1:]), rel=0.05)


@pytest.mark.parametrize(
    ("k", "zero", "reason"),
    [
        ((-1, 1, 1, 1), 0, "positive mean"),
        ((1, 1, 1, 1), 0, "one factor is enough"),
        ((1, 1, 2, 1), 0, "no two real ratios"),
        ((1, 2.5, 7.25, 1), 0, "mass 0.2 at zero"),
    ],
)
def test_bulks_of_other_families_are_refused(k, zero, reason):
    with pytest.raises(NoFitError, match=reason):
        ProductWishart.from_bulk(BulkMoments(FreeCumulantsOf(*k), FreeCumulantsOf(*k), zero))


@pytest.mark.parametrize("bad", [((1,),), ((1, 0),), ((1, -2, 3),), ((1, float("inf")),), ((1, 2), 0)])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        ProductWishart(*bad)
