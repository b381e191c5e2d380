from __future__ import annotations

import numpy as np
import pytest
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_rmt.report.tensorboard import BINS, add_density, histogram_counts, histogram_grid, layout


def test_grid_is_128_equal_bins_with_the_spectrums_width_to_spare(any_reading):
    spectrum = any_reading.spectrum
    grid = histogram_grid(spectrum)
    assert len(grid) == BINS + 1 == 129
    assert all(type(edge) is float for edge in grid)
    widths = np.diff(grid)
    assert widths == pytest.approx(np.full(BINS, widths[0]), rel=1e-9)
    width = spectrum.lambda_max.value - spectrum.lambda_min.value
    assert grid[0] <= spectrum.lambda_min.value - 0.98 * width
    assert grid[-1] >= spectrum.lambda_max.value + 0.98 * width
    if grid[0] < 0 < grid[-1]:
        zero = np.searchsorted(grid, 0.0)
        assert (grid[zero] + grid[zero - 1]) / 2 == pytest.approx(0.0, abs=1e-9 * widths[0])


def test_counts_are_those_of_the_eigenvalues(exact, exact_eigenvalues):
    grid = histogram_grid(exact.spectrum)
    expected = 1e6 * np.histogram(exact_eigenvalues, grid)[0] / 12
    assert histogram_counts(exact.spectrum, grid) == pytest.approx(expected, abs=1e-3)


def test_mass_outside_goes_to_the_outer_bins(exact, exact_eigenvalues):
    counts = histogram_counts(exact.spectrum, np.linspace(-1.0, 1.0, BINS + 1).tolist())
    assert counts[0] == pytest.approx(1e6 / 12)  # -3
    assert counts[-1] == pytest.approx(4e6 / 12)  # 1.4, 2.6, 7, 40
    assert counts.sum() == pytest.approx(1e6)


def test_moments_written_beside_the_counts_are_those_of_the_histogram(trained):
    written = {}

    class Writer:
        def add_histogram_raw(self, tag, **values):
            written.update(values, tag=tag)

    grid = histogram_grid(trained.spectrum)
    add_density(Writer(), "rmt/density", trained.spectrum, grid, step=3)
    counts, limits = np.array(written["bucket_counts"]), np.array(written["bucket_limits"])
    middles = limits - (limits[1] - limits[0]) / 2
    assert written["num"] == pytest.approx(1e6)
    # The mean of all eigenvalues is trace / n; a histogram knows it to half a bin.
    assert written["sum"] / written["num"] == pytest.approx(
        trained.spectrum.trace.mean / trained.spectrum.size, abs=(limits[1] - limits[0]) / 2
    )
    assert written["sum_squares"] == pytest.approx(float(counts @ middles**2))
    assert (written["min"], written["max"], written["global_step"]) == (grid[0], grid[-1], 3)


def test_layout_matches_whole_tags_only():
    import re

    groups = layout("net.a")
    assert list(groups) == ["net.a: learning rate, batch, damping", "net.a: spectrum", "net.a: cost"]
    charts = {title: chart for group in groups.values() for title, chart in group.items()}
    assert next(iter(charts)).startswith("lambda_max lr, SGD limit 2(1+momentum)")
    kind, (largest, limit) = charts["lambda_max against 2/lr"]
    assert kind == "Multiline"
    assert re.match(largest, "net.a/lambda_max")
    assert not re.match(largest, "net.a/lambda_max_residual")
    assert not re.match(largest, "netXa/lambda_max")
    assert re.match(limit, "net.a/two_over_lr")
    tops = charts["largest eigenvalues"][1]
    assert sum(bool(re.match(tag, "net.a/top/1")) for tag in tops) == 1
    assert charts["trace, one standard error"] == ["Margin", ["net.a/trace", "net.a/trace_low", "net.a/trace_high"]]
    assert layout_pb2.Layout is not None
