"""The statistics themselves, against published and closed-form values, and the shipped table against a new simulation."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe
from mapped_levels import bulk, semicircle_cdf
from scipy.stats import kstest

from lightning_rmt.levels import null, reference
from lightning_rmt.levels.dependence import combine_p_values, effective_number, index_correlation
from lightning_rmt.levels.long_range import number_variance, rigidity
from lightning_rmt.levels.spacings import anderson_darling, brody_exponent, spacing_ratios
from lightning_rmt.levels.unfolding import pooled_unfold, unfold


def exactly_unfolded(k, count, rng):
    """Spacings of windows of k GOE levels under the semicircle's distribution function, which needs no fit."""
    found = []
    while len(found) < count:
        levels = 1000 * semicircle_cdf(goe(1000, rng))
        found += [levels[start : start + k] for start in range(150, 850 - k, k)]
    return found[:count]


@pytest.fixture(scope="module")
def windows():
    return exactly_unfolded(100, 1500, np.random.default_rng(0))


def test_the_ratio_of_goe(windows):
    """T10: quantiles of the ratio."""
    ratios = np.array([spacing_ratios(window).mean() for window in windows])
    assert np.quantile(ratios, 0.01) == pytest.approx(0.458, abs=0.012)
    assert np.quantile(ratios, 0.99) == pytest.approx(0.601, abs=0.012)
    assert ratios.std() == pytest.approx(0.031, abs=0.003)
    assert ratios.mean() == pytest.approx(0.5307, abs=0.0035)


def test_distances_of_goe_from_the_surmise(windows):
    """T10: quantiles of distances."""
    spacings = [np.diff(window) for window in windows]
    distances = np.array([anderson_darling(s) for s in spacings])
    assert np.quantile(distances, 0.99) == pytest.approx(1.73, abs=0.25)
    surmise = [kstest(s / s.mean(), lambda x: 1 - np.exp(-np.pi * x**2 / 4)).statistic for s in spacings[:600]]
    assert 10 * np.quantile(surmise, 0.95) == pytest.approx(0.97, abs=0.05)


def test_brodys_exponent(windows):
    """T11: known exponents, and .957 for GOE."""
    rng = np.random.default_rng(0)
    assert brody_exponent(rng.weibull(1.5, 1000)) == pytest.approx(0.506, abs=0.15)
    assert brody_exponent(rng.weibull(1.3, 200_000)) == pytest.approx(0.3, abs=0.02)
    assert brody_exponent(rng.exponential(size=100_000)) == pytest.approx(0, abs=0.02)
    spacings = np.concatenate([np.diff(window) for window in windows])
    assert spacings.size > 1e5
    assert brody_exponent(spacings) == pytest.approx(0.957, abs=0.02)


def test_long_range_of_goe_and_of_independent_levels():
    rng = np.random.default_rng(0)
    rigid = [w - w[0] for w in exactly_unfolded(400, 60, rng)]
    assert np.mean([number_variance(w, 3.0) for w in rigid]) == pytest.approx(0.665, abs=0.03)
    assert np.mean([number_variance(w, 10.0) for w in rigid]) == pytest.approx(0.91, abs=0.1)
    assert np.mean([rigidity(w, 15.0) for w in rigid]) == pytest.approx(0.274, abs=0.02)
    loose = [np.cumsum(rng.exponential(size=400)) for _ in range(60)]
    assert np.mean([number_variance(w, 3.0) for w in loose]) == pytest.approx(3, abs=0.3)
    assert np.mean([rigidity(w, 15.0) for w in loose]) == pytest.approx(1, abs=0.1)


def test_rigidity_of_a_picket_fence():
    assert rigidity(np.arange(500) + 0.5, 15.0) == pytest.approx(1 / 12, rel=0.02)


def test_the_anderson_darling_statistic_is_the_textbooks():
    """Against the definition, an integral over the empirical distribution function."""
    spacings = np.random.default_rng(0).weibull(2, 40)
    s = np.sort(spacings) / spacings.mean()
    u = 1 - np.exp(-np.pi * s**2 / 4)
    grid = np.linspace(0, 1, 2_000_001)[1:-1]
    empirical = np.searchsorted(u, grid, side="right") / u.size
    integral = u.size * np.mean((empirical - grid) ** 2 / (grid * (1 - grid)))
    assert anderson_darling(spacings) == pytest.approx(integral, rel=1e-3)


@pytest.mark.parametrize("k", [50, 130, 400])
def test_a_new_simulation_agrees_with_the_table(k):
    count = 600 if k < 400 else 200
    found = null.simulate(k, count, np.random.default_rng(1))
    p = np.array([reference.p_value(distance, k) for distance in found["anderson_darling"]])
    assert kstest(p, "uniform").pvalue > 1e-3
    for name in set(found) - {"anderson_darling"}:
        known = reference.moments(name, k)
        assert found[name].mean() == pytest.approx(known.mean, abs=4 * known.sd / count**0.5)
        assert found[name].std() == pytest.approx(known.sd, rel=6 / (2 * count) ** 0.5)


def test_the_table_is_small_and_can_be_built_again():
    built = null.build(dict.fromkeys((25,), 2), sizes=(25, 400))
    assert built["quantiles"].shape == (2, len(reference.TAILS))
    assert np.isnan(built["rigidity"][0]).all()
    assert np.isfinite(built["rigidity"][1]).all()


def test_p_values_fall_and_end_at_the_smallest():
    p = [reference.p_value(distance, 100) for distance in np.linspace(0, 8, 200)]
    assert (np.diff(p) <= 0).all()
    assert p[0] == 1
    assert p[-1] == reference.SMALLEST_P
    with pytest.raises(ValueError, match="25 to 4096"):
        reference.p_value(1.0, 24)


def test_unfolded_spacings_have_mean_one_wherever_one_looks():
    spacings = unfold(np.exp(3 * bulk(400, np.random.default_rng(0))))
    assert spacings.mean() == pytest.approx(1)
    assert np.abs(spacings.reshape(-1, 57).mean(axis=1) - 1).max() < 0.1


def test_pooled_unfolding_of_independent_spectra():
    rng = np.random.default_rng(0)
    spectra = [goe(300, rng) for _ in range(40)]
    spacings = np.concatenate(pooled_unfold(spectra))
    assert len(pooled_unfold(spectra)) == 13
    assert spacings.mean() == pytest.approx(0.9997, abs=0.02)
    assert kstest(spacings, lambda x: 1 - np.exp(-np.pi * x**2 / 4)).statistic == pytest.approx(0.034, abs=0.015)
    assert kstest(spacings, lambda x: 1 - np.exp(-x)).statistic == pytest.approx(0.214, abs=0.03)
    with pytest.raises(ValueError, match="at least 3"):
        pooled_unfold(spectra[:2])


def test_pooled_unfolding_takes_copies_for_independent_levels():
    """Why it isn't used for batches of one model: where spectra share their levels, it sees steps of the copies."""
    levels = goe(300, np.random.default_rng(0))
    spacings = np.concatenate(pooled_unfold([levels] * 30))
    assert np.allclose(spacings, 1)


def test_correlation_between_spectra():
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=200), rng.normal(size=(6, 200))
    ranks = [np.arange(200)] * 6
    assert index_correlation(list(own), ranks) < 0.05
    assert index_correlation([common] * 6, ranks) == pytest.approx(1, abs=1e-6)
    assert index_correlation(list(own + common), ranks) == pytest.approx(0.5, abs=0.12)
    assert index_correlation([common], ranks[:1]) == 0
    shifted = [common[3:], common[:-5]]
    assert index_correlation(shifted, [ranks[0][3:], ranks[0][:-5]]) == pytest.approx(1, abs=0.02)
    assert index_correlation([common, common], [ranks[0], ranks[0] + 1000]) == 0
    assert effective_number([100] * 4, 0.0) == 400
    assert effective_number([100] * 4, 1.0) == pytest.approx(100)
    assert effective_number([], 0.0) == 0


def test_combined_p_values():
    assert combine_p_values([0.03]) == pytest.approx(0.03)
    assert combine_p_values([0.03] * 7) == pytest.approx(0.03)
    draws = np.random.default_rng(0).uniform(size=(4000, 20))
    combined = np.array([combine_p_values(row) for row in draws])
    assert kstest(combined, "uniform").pvalue > 1e-3
