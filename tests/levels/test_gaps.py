"""Spectra with gaps: several bulks, each of which repels, read as such, whatever lies between them."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, wishart

from lightning_rmt import level_statistics
from lightning_rmt.levels import cut
from lightning_rmt.levels.cut import cut_levels


def clusters(count, size, rng):
    return np.concatenate([goe(size, rng) + 12.0 * place for place in range(count)])


@pytest.mark.parametrize(("count", "size"), [(2, 150), (3, 100)])
def test_two_and_three_bulks_of_goe_levels_repel(count, size):
    """Rejected in 4 % of 50 spectra at a nominal 5 %, give or take 3."""
    found = [level_statistics(clusters(count, size, np.random.default_rng(seed))) for seed in range(50)]
    assert np.mean([each.p_value < 0.05 for each in found]) <= 0.14
    assert sum(each.verdict_kind == "repel" for each in found) >= 45
    assert {each.levels for each in found} == {count * size}


def test_negative_control_unfolded_across_the_gap_they_are_rejected(monkeypatch):
    monkeypatch.setattr(cut, "GAP", np.inf)
    found = [level_statistics(clusters(2, 150, np.random.default_rng(seed))) for seed in range(10)]
    assert all(each.p_value < 0.01 for each in found)


def test_one_bulk_is_one_run():
    for seed in range(20):
        levels = goe(600, np.random.default_rng(seed))
        positive = cut_levels(levels - levels[0] + 1.0, 0.0, 2.2e-16)
        assert [run.levels.size for run in positive.runs] == [600]


def test_a_gap_beside_a_handful_of_levels_makes_no_run_of_them():
    levels = np.concatenate([goe(300, np.random.default_rng(0)) + 10, [30.0, 30.1, 30.2]])
    found = cut_levels(levels, 0.0, 2.2e-16, keep_outliers=True)
    assert [run.levels.size for run in found.runs] == [303]


def test_copies_with_different_outliers_are_copies():
    """One more outlier would shift every rank by one, and copies would pass for independent spectra."""
    found = []
    for seed in range(30):
        levels = wishart(120, np.random.default_rng(seed), 0.5)
        found.append(level_statistics([np.append(levels, [10.0, 11.0, 13.0][:count]) for count in range(4)]))
    assert np.median([each.correlation for each in found]) > 0.95
    assert np.std([each.z_goe for each in found]) < 1.4  # 1.7 if they are taken for independent
