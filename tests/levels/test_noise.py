"""Rounding noise is GOE: without the cut, anything reads as GOE."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import wishart

from lightning_rmt import level_statistics
from lightning_rmt.levels.cut import cut_levels
from lightning_rmt.levels.spacings import spacing_ratios


@pytest.fixture(scope="module", params=[np.float32, np.float64])
def deficient(request):
    """Eigenvalues of a sample covariance of 1200 variables and 400 samples, as eigvalsh gives them."""
    samples = np.random.default_rng(0).normal(size=(1200, 400)) / 20
    return np.linalg.eigvalsh((samples @ samples.T).astype(request.param))


def test_the_null_space_is_dropped(deficient):
    """T6: a sample covariance of rank 400 in 1200 variables."""
    reading = level_statistics(deficient)
    assert reading.dropped == 800
    assert reading.levels == 400
    assert reading.spacing_ratio == pytest.approx(0.53, abs=0.06)
    assert reading.verdict_kind == "repel"
    assert "800 levels within" in reading.notes[0]


def test_negative_control_the_null_space_alone_reads_as_goe(deficient):
    """T6: the trap."""
    assert spacing_ratios(deficient[:800].astype(np.float64)).mean() == pytest.approx(0.53, abs=0.05)


@pytest.fixture(scope="module")
def noisy():
    """Independent levels over nine decades, stirred by noise of norm 1e-6."""
    rng = np.random.default_rng(0)
    levels = np.sort(10 ** rng.uniform(-9, 0, 1000))
    noise = rng.normal(size=(1000, 1000))
    noise += noise.T
    return np.linalg.eigvalsh(np.diag(levels) + noise * (1e-6 / np.linalg.norm(noise, 2)))


def test_stirred_levels_are_dropped(noisy):
    """T7: independent levels with noise."""
    reading = level_statistics(noisy, noise=1e-6)
    assert reading.spacing_ratio < 0.45
    assert reading.dropped > 400
    assert reading.verdict_kind == "no_repulsion"
    assert reading.noise_to_spacing < 1 / 30


def test_negative_control_stirred_levels_repel(noisy):
    """T7: the trap."""
    stirred = noisy[np.abs(noisy) < 5e-7]
    assert spacing_ratios(stirred).mean() > 0.49
    assert level_statistics(noisy).spacing_ratio > level_statistics(noisy, noise=1e-6).spacing_ratio + 0.03


def test_no_spacing_reaches_across_the_hole():
    rng = np.random.default_rng(0)
    levels = np.sort(np.concatenate([-wishart(60, rng), np.zeros(30), wishart(100, rng)]))
    cut = cut_levels(levels, 0.0, 2.2e-16)
    assert [run.levels.size for run in cut.runs] == [60, 100]
    assert cut.zeros == 30
    reading = level_statistics(levels)
    parts = np.concatenate([spacing_ratios(levels[:60]), spacing_ratios(levels[-100:])])
    assert reading.spacing_ratio == pytest.approx(parts.mean(), abs=1e-12)
    assert reading.effective_ratios == 58 + 98


def test_short_runs_are_counted():
    levels = np.concatenate([-np.arange(10.0, 0.0, -1), np.zeros(5), np.arange(1.0, 101.0)])
    reading = level_statistics(levels)
    assert (reading.unused, reading.dropped, reading.levels) == (10, 5, 100)


def test_an_atom_away_from_zero_is_left_out():
    """Weight decay shifts a null space; so far as spacings go it is the same."""
    rng = np.random.default_rng(0)
    levels = np.sort(np.append(np.full(100, 1e-2), wishart(200, rng))) + 0.0
    cut = cut_levels(levels, 0.0, 2.2e-16)
    assert cut.crowded >= 100
    assert cut.degenerate == 0


def test_a_single_degenerate_pair_is_collapsed():
    levels = np.sort(np.append(np.arange(1.0, 201.0), 77.0))
    reading = level_statistics(levels)
    assert (reading.degenerate, reading.levels) == (1, 200)
    assert reading.spacing_ratio == pytest.approx(1)


def test_the_norm_and_size_of_the_whole_count_for_a_window():
    levels = 1e-3 * np.arange(1.0, 101.0)
    assert level_statistics(levels, norm=1.0, size=10**4).dropped == 0
    assert level_statistics(levels, norm=1e12, size=10**4).dropped > 0
