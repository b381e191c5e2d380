"""Unfolding of several runs, at any scale, and in the mean counting function of other spectra."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe
from mapped_levels import bulk, uniform
from scipy.stats import kstest

from lightning_rmt import level_statistics
from lightning_rmt.levels import reference
from lightning_rmt.levels.spacings import anderson_darling
from lightning_rmt.levels.unfolding import SHORTEST_OF_SEVERAL, pooled_unfold, unfold


def in_runs(size, count, rng):
    """GOE levels in runs, with an atom of six levels between each and the next."""
    parts = []
    for i in range(count):
        parts += [uniform(size, rng) * size + i * (size + 4) + 1, np.full(6, (i + 1) * (size + 4) - 1.0)]
    return np.concatenate(parts[:-1])


def distances_of_runs(size, count, spectra):
    rng = np.random.default_rng([size, count])
    return [anderson_darling(np.concatenate([unfold(bulk(size, rng)) for _ in range(count)])) for _ in range(spectra)]


def rejected(size, count, spectra):
    p = [reference.p_value(distance, size * count) for distance in distances_of_runs(size, count, spectra)]
    return np.mean(np.array(p) < 0.05)


def test_runs_that_are_used_together_keep_the_rate():
    assert rejected(SHORTEST_OF_SEVERAL, 10, 120) <= 0.05 + 4 * (0.05 / 120) ** 0.5


def test_negative_control_many_runs_of_twenty_reject_goe():
    assert rejected(20, 20, 100) > 0.15


def test_several_short_runs_have_a_ratio_and_no_p_value():
    reading = level_statistics(in_runs(25, 8, np.random.default_rng(0)))
    assert reading.levels == 200
    assert reading.spacing_ratio == pytest.approx(0.53, abs=4 * 0.308 / 184**0.5)
    assert reading.p_value is reading.brody is reading.anderson_darling is None
    assert "200 levels are in the ratio but not in the distribution of spacings" in " ".join(reading.notes)
    assert "Anderson-Darling" not in reading.verdict


def test_a_short_run_beside_a_long_one_is_in_the_ratio_only():
    rng = np.random.default_rng(0)
    levels = in_runs(150, 1, rng)
    short = in_runs(25, 1, rng)
    both = np.concatenate([levels, np.full(6, levels[-1] + 2), levels[-1] + 3 + short])
    reading, alone = level_statistics(both), level_statistics(levels)
    assert (reading.levels, alone.levels) == (175, 150)
    assert reading.anderson_darling == pytest.approx(alone.anderson_darling)
    assert reading.spacing_ratio != alone.spacing_ratio
    assert reading.brody_goe[1] == pytest.approx(alone.brody_goe[1], rel=0.05)


@pytest.mark.parametrize("scale", [1e300, 1e-300, -1.0, -1e300])
def test_a_narrow_band_of_one_sign_at_any_scale(scale):
    """Differences of logarithms would cancel: at 1e300 they came in steps of half a spacing."""
    levels = 1 + 1e-11 * goe(300, np.random.default_rng(0))
    scaled = np.sort(scale * levels)
    first, second = level_statistics(levels), level_statistics(scaled)
    assert first.levels == second.levels > 50
    assert second.p_value == pytest.approx(first.p_value, rel=0.05)
    assert second.brody == pytest.approx(first.brody, abs=0.01)


def surmise(x):
    return 1 - np.exp(-np.pi * np.square(x) / 4)


def test_pooled_unfolding_of_independent_levels():
    """40 x 300 independent levels, 13 spectra unfolded by 27: distances .235 and .029 (theory.md 2.4)."""
    rng = np.random.default_rng(0)
    spacings = np.concatenate(pooled_unfold([np.sort(rng.uniform(size=300)) for _ in range(40)]))
    assert spacings.mean() == pytest.approx(1, abs=0.02)
    assert kstest(spacings, surmise).statistic == pytest.approx(0.235, abs=0.03)
    # a spacing below 1 / 27 is counted as none: the resolution is in the distance
    assert kstest(spacings, lambda x: 1 - np.exp(-x)).statistic == pytest.approx(0.029, abs=0.015)


def test_pooled_unfolding_of_levels_out_of_order():
    with pytest.raises(ValueError, match=r"spectrum 1: expected ascending"):
        pooled_unfold([np.arange(5.0), np.arange(5.0)[::-1], np.arange(5.0)])
