from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, lanczos_of, spectrum_of, wishart

from lightning_rmt import Spectrum
from lightning_rmt.levels import edge_statistics
from lightning_rmt.spectra.levels import ritz_levels


@pytest.fixture(scope="module")
def goe_run():
    levels = np.sort(goe(2000, np.random.default_rng(0)))
    return levels, spectrum_of(levels, 400)


@pytest.mark.parametrize("side", ["high", "low"])
def test_certified_levels_are_the_outermost_eigenvalues(goe_run, side):
    """T9: none missing, each within its residual of the truth, or the rounding of it."""
    levels, spectrum = goe_run
    run = spectrum.spacing_run(side)
    assert run.size >= 25
    truth = levels[::-1] if side == "high" else levels
    spacing = abs(truth[0] - truth[run.size - 1]) / (run.size - 1)
    error = np.abs(run - truth[: run.size])
    assert error.max() < 0.02 * spacing
    found = ritz_levels(spectrum.runs[0], spectrum.noise)
    residuals = found.residuals[::-1] if side == "high" else found.residuals
    assert (error <= residuals[: run.size] + found.rounding).all()


def test_too_few_certified_levels(goe_run):
    reading = edge_statistics(goe_run[1], "high", exact_products=True)
    assert reading.verdict_kind == "insufficient"
    assert "certified at the upper end" in reading.verdict
    assert "50 needed; raise the number of steps" in reading.verdict
    assert reading.source == "edge_high"
    assert reading.p_value is None


@pytest.fixture(scope="module")
def wishart_run():
    rng = np.random.default_rng(1)
    return spectrum_of(np.append(wishart(1000, rng), [5.0, 6.5, 9.0]), 500)


def test_enough_of_them(wishart_run):
    reading = edge_statistics(wishart_run, "high", exact_products=True)
    assert reading.levels > 100
    assert abs(reading.z_goe) < 4
    assert reading.verdict_kind == "repel"
    assert any("outliers at the upper end" in note for note in reading.notes)


def test_counted_outliers_are_left_out():
    """A heavy head above levels with a soft edge: the gap rule counts it."""
    levels = np.append(wishart(1000, np.random.default_rng(1)), [30.0, 50.0, 90.0])
    spectrum = spectrum_of(levels, 500)
    assert spectrum.outliers.high.count == 3
    reading = edge_statistics(spectrum, "high", exact_products=True)
    assert reading.outliers == 3
    assert reading.levels == spectrum.spacing_run("high").size - 3


def test_independent_levels_at_an_edge():
    levels = np.sort(np.random.default_rng(2).pareto(2, 2000))
    reading = edge_statistics(spectrum_of(levels, 500), "high", exact_products=True)
    assert reading.levels >= 50
    assert reading.z_goe < -2


def test_inexact_products_are_refused(wishart_run):
    reading = edge_statistics(wishart_run, "high", exact_products=False)
    assert reading.verdict_kind == "insufficient"
    assert "products were not exact" in reading.verdict
    assert reading.spacing_ratio is None


def test_without_reorthogonalisation_there_is_no_level():
    run = lanczos_of(np.arange(1.0, 100.0), 50, reorthogonalise=False)
    spectrum = Spectrum((run,), 99, 50, 1e-15)
    assert spectrum.spacing_run("high").size == 0
    reading = edge_statistics(spectrum, "low", exact_products=True)
    assert "0 consecutive eigenvalues certified at the lower end" in reading.verdict


def test_an_early_breakdown():
    """T21: rank 5, 50 steps."""
    spectrum = spectrum_of(np.append(np.zeros(100), [1.0, 2.0, 3.0, 4.0, 5.0]), 50)
    assert spectrum.runs[0].steps == 6
    assert spectrum.weights.sum() == pytest.approx(1)
    reading = edge_statistics(spectrum, "high", exact_products=True)
    assert reading.verdict_kind == "insufficient"
    assert "50 needed" in reading.verdict


def test_another_side(goe_run):
    with pytest.raises(ValueError, match="side is 'high' or 'low'"):
        edge_statistics(goe_run[1], "top", exact_products=True)


def test_an_exhausted_run_gives_everything():
    levels = np.sort(np.random.default_rng(0).normal(size=120))
    spectrum = spectrum_of(levels, 120)
    assert spectrum.spacing_run("high").size == 120
