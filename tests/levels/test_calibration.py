"""Rates over many simulated spectra: a test at 5 % has to reject 5 % of GOE, and to see what it says that it sees."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from known_spectra import goe
from mapped_levels import MAPS, bulk, poisson, steps_map, two_blocks
from scipy.stats import kstest
from scipy.stats import norm as normal

from lightning_rmt import level_statistics
from lightning_rmt.levels.reference import p_value
from lightning_rmt.levels.spacings import anderson_darling
from lightning_rmt.levels.unfolding import unfold


@cache
def readings(make, k, count, seed=0):
    rng = np.random.default_rng([seed, k])
    return [level_statistics(make(k, rng)) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("k", [50, 100, 400])
def test_p_rejects_goe_at_its_nominal_rate(k):
    p = np.array([reading.p_value for reading in readings(bulk, k, 400)])
    assert 0.03 <= (p < 0.05).mean() <= 0.08
    assert (p < 0.01).mean() <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(MAPS) - {"bulk"}))
def test_p_rejects_mapped_goe_at_its_nominal_rate(name):
    p = np.array([reading.p_value for reading in readings(MAPS[name], 100, 400)])
    assert 0.03 <= (p < 0.05).mean() <= 0.08


@pytest.mark.parametrize(("k", "count", "low", "high"), [(50, 400, 0.03, 0.08), (400, 150, 0.01, 0.11)])
def test_p_rejects_a_power_law_of_goe_levels_at_its_nominal_rate(k, count, low, high):
    """Over four decades. With k = 50 an outlier that is counted leaves too few; that has to be rare."""
    p = np.array([reading.p_value for reading in readings(MAPS["power_law_map"], k, count)], dtype=float)
    assert np.isnan(p).mean() <= 0.01
    assert low <= (p < 0.05).mean() <= high


@pytest.mark.parametrize(("k", "count", "low", "high"), [(100, 200, 0.01, 0.09), (400, 120, 0.01, 0.11)])
def test_p_rejects_goe_levels_through_zero_over_eight_decades_at_its_nominal_rate(k, count, low, high):
    """Each side of zero is unfolded by itself; in one piece the spacings read as anything but GOE's."""
    found = readings(MAPS["through_zero_map"], k, count)
    p = np.array([reading.p_value for reading in found], dtype=float)
    assert np.isnan(p).mean() <= 0.02
    assert low <= (p < 0.05).mean() <= high
    assert np.mean([r.brody for r in found]) == pytest.approx(found[0].brody_goe[0], abs=0.04)
    levels = [MAPS["through_zero_map"](k, np.random.default_rng(seed)) for seed in range(20)]
    in_one_piece = [p_value(anderson_darling(unfold(one)), k) for one in levels]
    assert np.mean(np.array(in_one_piece) < 0.05) > 0.7


def test_what_cannot_be_unfolded_has_no_p_value_and_keeps_its_ratio():
    k = 400
    found = readings(steps_map, k, 20)
    assert {r.p_value for r in found} == {r.brody_goe for r in found} == {r.number_variance for r in found} == {None}
    assert {r.verdict_kind for r in found} == {"repel"}
    assert all("the mean spacing varies over" in r.notes[-1] for r in found)
    spacings = [unfold(steps_map(k, np.random.default_rng(seed))) for seed in range(20)]
    assert np.mean([p_value(anderson_darling(s), k) < 0.05 for s in spacings]) > 0.9  # what would have been said


def test_independent_levels_and_even_densities_keep_their_p_value():
    for make in (poisson, two_blocks, bulk):
        assert all(r.p_value is not None for r in readings(make, 400, 20))


def test_the_ratio_of_a_power_law_is_little_biased():
    """Known limit of a ratio without unfolding: the fewer the levels over four decades, the more."""
    z = np.array([reading.z_goe for reading in readings(MAPS["power_law_map"], 50, 400)], dtype=float)
    assert -0.8 < np.nanmean(z) < -0.3
    assert (np.abs(z) > 2.576).mean() <= 0.05


def test_p_over_the_bulk_of_one_matrix():
    """T3: 600 levels of 1000, 100 matrices."""
    p = np.array([r.p_value for r in readings(lambda _, rng: goe(1000, rng)[200:800], 600, 100)])
    assert 0.005 <= (p < 0.05).mean() <= 0.12
    assert (p < 0.001).mean() <= 0.02


def test_negative_control_scipys_p_value_never_rejects():
    """Mean and correlation of spacings aren't those of independent draws: at a nominal 5 %, none or nearly none."""
    rng = np.random.default_rng(0)
    p = [kstest(unfold(bulk(100, rng)), lambda x: 1 - np.exp(-np.pi * x**2 / 4)).pvalue for _ in range(300)]
    assert (np.array(p) < 0.05).mean() <= 0.005


def test_z_is_a_z_score():
    z = np.array([reading.z_goe for reading in readings(bulk, 100, 400)[:300]])
    assert abs(z.mean()) < 4 / 300**0.5
    assert z.std() == pytest.approx(1, abs=4 / 600**0.5)
    z = np.array([reading.z_poisson for reading in readings(poisson, 100, 300)])
    assert abs(z.mean()) < 4 / 300**0.5
    assert z.std() == pytest.approx(1, abs=4 / 600**0.5)


@pytest.mark.parametrize("make", [bulk, poisson])
def test_the_standard_error_is_that_of_the_ratio(make):
    found = readings(make, 100, 400 if make is bulk else 300)[:300]
    spread = np.std([reading.spacing_ratio for reading in found])
    assert np.mean([reading.stderr for reading in found]) == pytest.approx(spread, rel=4 / 600**0.5 + 0.03)
    center = {bulk: 0.5307, poisson: 0.3863}[make]
    z = np.array([(reading.spacing_ratio - center) / reading.stderr for reading in found])
    assert z.std() == pytest.approx(1, abs=0.1)


def test_negative_control_independent_ratios_would_make_z_too_wide():
    found = readings(bulk, 100, 400)[:300]
    naive = np.array([(reading.spacing_ratio - 0.5307) / (0.254 / 98**0.5) for reading in found])
    assert naive.std() > 1.1


def test_negative_control_the_table_for_independent_draws_never_rejects():
    rng = np.random.default_rng(0)
    distances = np.array([anderson_darling(unfold(bulk(100, rng))) for _ in range(300)])
    assert (distances > 2.49).mean() < 0.01  # the textbook's critical value at 5 %


@pytest.mark.parametrize(("k", "poisson_power", "blocks_power"), [(50, 0.95, 0.6), (100, 0.99, 0.88), (200, 1.0, 0.97)])
def test_power(k, poisson_power, blocks_power):
    p = np.array([reading.p_value for reading in readings(poisson, k, 100)])
    assert (p < 0.01).mean() >= poisson_power
    p = np.array([reading.p_value for reading in readings(two_blocks, k, 100)])
    assert (p < 0.01).mean() >= blocks_power


def test_the_ratio_finds_what_it_says_it_finds():
    """Mixtures of GOE and independent spectra aren't needed: the promise is about the normal distribution of the ratio."""
    found = readings(bulk, 100, 400)[:300]
    promised = found[0].detectable
    shifted = np.array([reading.z_goe for reading in found]) - promised / (0.308 / 98**0.5)
    assert (shifted < -normal.ppf(0.995)).mean() == pytest.approx(0.95, abs=0.05)


def perturbed(k, count, size, rng):
    """Spectra of one GOE matrix with independent perturbations."""

    def draw():
        matrix = rng.normal(size=(k, k))
        return (matrix + matrix.T) / (2 * k) ** 0.5

    common = draw()
    return [np.linalg.eigvalsh(common + size * draw()) for _ in range(count)]


BATCHES = 8
POOLS = {
    "independent": lambda k, rng: [goe(k, rng) for _ in range(BATCHES)],
    "identical": lambda k, rng: [goe(k, rng)] * BATCHES,
    "a little perturbed": lambda k, rng: perturbed(k, BATCHES, 0.03, rng),
    "more perturbed": lambda k, rng: perturbed(k, BATCHES, 0.1, rng),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooled_spectra_are_as_good_as_they_are_different(name):
    rng = np.random.default_rng(1)
    found = [level_statistics(POOLS[name](60, rng)) for _ in range(120)]
    z = np.array([reading.z_goe for reading in found])
    assert 0.85 <= z.std() <= 1.15
    p = np.array([reading.p_value for reading in found])
    assert (p < 0.05).mean() <= 0.05 + 4 * (0.05 / 120) ** 0.5


def test_negative_control_copies_pooled_as_if_independent():
    rng = np.random.default_rng(1)
    ratios = np.array([level_statistics(goe(60, rng)).spacing_ratio for _ in range(120)])
    naive = (ratios - 0.5307) / (0.308 / (58 * BATCHES) ** 0.5)
    assert naive.std() > 2
