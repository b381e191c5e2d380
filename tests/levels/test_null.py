"""The shipped table was made as ``null`` says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from lightning_rmt.levels import null, reference
from lightning_rmt.levels.spacings import anderson_darling
from lightning_rmt.levels.unfolding import unfold


def test_the_shipped_table_is_of_the_seed_and_the_number_of_windows_that_are_claimed():
    """Quantiles of all 20 000 windows of 25 levels, once more; from 200 levels on they are smoothed, and can't be."""
    k = 25
    rng = np.random.default_rng([null._SEED, k])
    distances = [anderson_darling(unfold(levels)) for levels in null.goe_windows(k, null._WINDOWS_OF[k], rng)]
    assert len(distances) == 20_000
    quantiles = np.quantile(distances, 1 - np.array(reference.TAILS))
    assert reference._table()["quantiles"][reference.SIZES.index(k)] == pytest.approx(quantiles, rel=1e-6)


def test_the_table_covers_its_sizes():
    table = reference._table()
    assert table["quantiles"].shape == (len(reference.SIZES), len(reference.TAILS))
    assert (np.diff(table["quantiles"], axis=1) > 0).all()
    long = np.array(reference.SIZES) >= reference.LONG_RANGE_LEVELS
    assert (np.isfinite(table["rigidity"]).all(axis=1) == long).all()


def test_a_window_is_consecutive_levels_from_the_middle():
    for k in (50, 400):
        windows = null.goe_windows(k, 5, np.random.default_rng(0))
        assert [window.size for window in windows] == [k] * 5
        assert all((np.diff(window) > 0).all() for window in windows)
        assert max(np.abs(window).max() for window in windows) < 1.5


@pytest.mark.parametrize("k", [70, 200])
def test_between_tabulated_sizes_the_p_value_is_uniform_too(k):
    distances = null.simulate(k + 13, 250, np.random.default_rng([2, k]))["anderson_darling"]
    assert kstest([reference.p_value(d, k + 13) for d in distances], "uniform").pvalue > 1e-3


def test_no_number_has_no_p_value():
    with pytest.raises(ValueError, match="not a number"):
        reference.p_value(float("nan"), 100)
