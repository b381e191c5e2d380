from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest

from lightning_rmt.report.batch_law_figure import batch_law_figure
from lightning_rmt.report.cumulant_figure import free_cumulant_figure
from lightning_rmt.report.figures import heat_map_figure, outliers_over_time_figure, pixels, spectrum_figure
from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.wording import law_name


def history_of(readings):
    return [HistoryEntry.from_reading(reading) for reading in readings]


@pytest.fixture(scope="session")
def run(known):
    """An unevenly spaced run: a reading without a count, three with nine outliers, one with a falling learning rate."""
    first = replace(known("initial"), step=0, learning_rate=0.11)
    later = [
        replace(known("trained"), step=step, learning_rate=lr) for step, lr in ((10, 0.11), (20, 0.11), (100, 0.25))
    ]
    return [first, *later]


# --- every figure, every kind of spectrum: readable ---------------------------------------------------------------


def boxes(texts, renderer):
    return [
        (text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text() and text.get_visible()
    ]


def drawn_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def assert_readable(figure):
    """Nothing sticks out of the figure, no two tick labels touch, and the legends cover no data."""
    pixels(figure)
    renderer, frame = figure.canvas.get_renderer(), figure.bbox
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *drawn_ticks(axes.yaxis), *axes.texts]
        texts += drawn_ticks(axes.xaxis) if axes.xaxis.get_tick_params().get("labelbottom", True) else []
    for legend in legends:
        texts += legend.get_texts()
    for words, box in boxes(texts, renderer):
        assert frame.x0 <= box.x0, f"{words!r} is cut off"
        assert box.x1 <= frame.x1, f"{words!r} is cut off"
        assert frame.y0 <= box.y0, f"{words!r} is cut off"
        assert box.y1 <= frame.y1, f"{words!r} is cut off"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = boxes(drawn_ticks(axis), renderer)
            for i, (words, box) in enumerate(labels):
                for other, other_box in labels[:i]:
                    assert not box.overlaps(other_box), f"tick labels {words!r} and {other!r} overlap"
        for legend in legends:
            box = legend.get_window_extent(renderer)
            inner = axes.get_window_extent(renderer)
            assert box.y0 >= inner.y1 - 1 or box.y1 <= inner.y0 + 1 or box.x0 >= inner.x1, "a legend covers the axes"
    title_parts = boxes(figure.texts, renderer) + [
        ("legend", legend.get_window_extent(renderer)) for legend in figure.legends
    ]
    for i, (words, box) in enumerate(title_parts):
        for other, other_box in title_parts[:i]:
            assert not box.overlaps(other_box), f"{words!r} and {other!r} overlap"


def test_spectrum_figure_is_readable(any_reading):
    assert_readable(spectrum_figure(any_reading))


def test_figures_over_time_are_readable(any_reading):
    (entry,) = history_of([any_reading])
    for steps in ((120,), (0, 7, 50_000, 123_456)):
        entries = [replace(entry, step=step) for step in steps]
        assert_readable(free_cumulant_figure(entries))
        assert_readable(heat_map_figure(entries))
        assert_readable(outliers_over_time_figure(entries))


def test_runs_of_few_and_of_many_readings_are_readable(run):
    entries = history_of(run)
    many = [replace(entries[min(i, 3)], step=300 * i) for i in range(150)]
    for history in (entries, many):
        assert_readable(heat_map_figure(history))
        assert_readable(outliers_over_time_figure(history))


# --- what they show -----------------------------------------------------------------------------------------------


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def all_words(figure):
    legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
    texts = [*figure.texts, *(text for legend in legends for text in legend.get_texts())]
    return " | ".join(text.get_text() for text in texts)


def test_outliers_are_stems_at_the_eigenvalues(trained):
    axes = spectrum_figure(trained).axes[0]
    stems = lines(axes)["outlier"]
    assert sorted(stems.get_xdata()) == pytest.approx(np.linspace(4.0, 10.4, 9))
    assert "certified eigenvalue" in lines(axes)


def test_without_a_count_there_are_no_stems_but_the_certified_eigenvalues_stay(known):
    figure = spectrum_figure(known("initial"))
    assert "outlier" not in lines(figure.axes[0])
    (levels,) = [collection for collection in figure.axes[0].collections if collection.get_label() == "_levels"]
    at = sorted(segment[0][0] for segment in levels.get_segments())
    assert at[-1] == pytest.approx(0.35)
    assert at[0] == pytest.approx(-0.1)
    assert "no outlier count" in all_words(figure)


def test_the_curve_is_the_spectrums_density_in_its_band(trained):
    axes = spectrum_figure(trained).axes[0]
    x, y = max((line.get_data() for line in axes.get_lines()), key=lambda data: len(data[0]))
    bottom = axes.get_ylim()[0]
    seen = y > bottom
    assert seen.sum() > 300
    assert y[seen] == pytest.approx(trained.spectrum.density(x)[seen])
    assert axes.get_yscale() == "log"
    assert "per unit eigenvalue" in axes.get_ylabel()
    assert y.max() < axes.get_ylim()[1]


def test_edges_and_the_stability_limit_are_lines_at_their_values(trained):
    at = lines(spectrum_figure(trained).axes[0])
    assert at["bulk edge 0.700"].get_xdata()[0] == pytest.approx(0.7)
    (limit,) = [line for label, line in at.items() if label.startswith("2/lr")]
    assert limit.get_xdata()[0] == pytest.approx(2 / 0.11)
    far = spectrum_figure(replace(trained, learning_rate=1e-4))
    assert "2/lr" not in all_words(far)
    assert far.axes[0].get_xlim()[1] < 100


def test_a_degenerate_eigenvalue_is_an_atom_with_its_share(known):
    figure = spectrum_figure(known("mostly zero"))
    atom = lines(figure.axes[0])["atom"]
    assert atom.get_xdata()[0] == pytest.approx(0.0, abs=1e-9)
    (text,) = [text.get_text() for text in figure.axes[0].texts]
    assert float(text.split(" %")[0]) == pytest.approx(60, abs=8)  # one probe's estimate
    assert figure.axes[0].get_xlabel() == "eigenvalue of the Gauss-Newton matrix"


def test_rounding_beside_an_atom_does_not_squeeze_the_curve(known):
    # A node of weight 1e-28 sits between the atom and the rest, where the density is 1e-22.
    low, high = spectrum_figure(known("mostly zero")).axes[0].get_ylim()
    assert low > 1e-4
    assert high < 1e2


def test_the_title_says_step_largest_eigenvalue_verdict_and_trace(trained):
    words = all_words(spectrum_figure(trained))
    trace = trained.spectrum.trace
    for part in ("step 120", "= 10.40", "9 outliers above (gap ×5.7)", f"trace {trace.mean:.2f} ± {trace.stderr:.2f}"):
        assert part in words


def test_an_unconverged_largest_eigenvalue_is_called_that(known):
    words = all_words(spectrum_figure(known("four steps")))
    assert "(not converged)" in words
    assert "±" in words.split("trace")[0]


def test_heat_map_shows_the_masses_of_each_reading_at_its_steps(run):
    history = history_of(run)
    axes, colours = heat_map_figure(history).axes
    mesh = axes.collections[0]
    cells = mesh.get_coordinates()[0, :, 0]
    assert list(cells) == [-2, 5, 15, 60, 102]  # halfway between 0, 10, 20 and 100, and a little out
    edges = mesh.get_coordinates()[:, 0, 1]
    shade = mesh.get_array()
    assert shade.shape == (edges.size - 1, 4)
    mass = 10.0 ** shade.filled(-np.inf)
    assert mass.sum(axis=0) == pytest.approx(np.ones(4), rel=1e-2)
    truth = np.array([10.4, 9.6, 8.8, 8.0, 7.2, 6.4, 5.6, 4.8, 4.0])
    above = edges[:-1] > 2.0
    counts = np.histogram(truth, edges)[0][above]
    assert mass[above, 1] * run[1].spectrum.size == pytest.approx(counts, abs=0.05)
    assert colours.get_ylabel().startswith("log")


def test_heat_map_marks_outliers_levels_and_the_limit(run):
    axes = heat_map_figure(history_of(run)).axes[0]
    marks = lines(axes)
    steps, values = marks["outlier"].get_data()
    assert {(step, round(value, 6)) for step, value in zip(steps, values, strict=True)} == {
        (step, round(value, 6)) for step in (10, 20, 100) for value in np.linspace(4.0, 10.4, 9)
    }
    assert 0 in marks["certified eigenvalue"].get_xdata()
    assert list(marks["2/lr"].get_ydata()) == pytest.approx([2 / 0.11] * 3 + [8.0])


def test_the_limit_is_that_of_the_optimizer(run):
    """With momentum 0.9 at 3.8 / lr, under its name; with Adam, whose limit isn't in these coordinates, nowhere."""
    history = [HistoryEntry.from_reading(replace(reading, sharpness_limit=3.8)) for reading in run]
    marks = lines(heat_map_figure(history).axes[0])
    assert list(marks["3.8/lr"].get_ydata()) == pytest.approx([3.8 / 0.11] * 3 + [15.2])
    assert "3.8/lr" in lines(outliers_over_time_figure(history).axes[0])
    changing = [replace(history[0], sharpness_limit=3.7), *history[1:]]
    assert lines(heat_map_figure(changing).axes[0])["stability limit"].get_ydata()[0] == pytest.approx(3.7 / 0.11)
    adam = [HistoryEntry.from_reading(replace(reading, sharpness_limit=None)) for reading in run]
    for figure in (
        heat_map_figure(adam),
        outliers_over_time_figure(adam),
        spectrum_figure(replace(run[-1], sharpness_limit=None)),
    ):
        assert "lr" not in all_words(figure)
    assert "3.8/lr = " in all_words(spectrum_figure(replace(run[-1], sharpness_limit=3.8, learning_rate=0.5)))


def test_a_repeated_step_is_drawn_once_with_its_last_reading(run):
    history = history_of(run)
    again = replace(history[0], step=10)
    repeated, once = heat_map_figure([*history, again]), heat_map_figure([history[0], again, *history[2:]])
    shades = [
        figure.axes[0].collections[0].get_array().filled(0.0) for figure in (repeated, once, heat_map_figure(history))
    ]
    assert np.array_equal(shades[0], shades[1])
    assert not np.array_equal(shades[0], shades[2])


def test_eigenvalues_over_time_follow_the_readings(run):
    levels, counts, trace = outliers_over_time_figure(history_of(run)).axes
    containers = {container.get_label(): container for container in levels.containers}
    x, y = containers[r"$\lambda_{\max}$"].lines[0].get_data()
    assert list(x) == [0, 10, 20, 100]
    assert list(y) == pytest.approx([0.35, 10.4, 10.4, 10.4])
    second = containers["2nd to 10th"].lines[0].get_ydata()
    assert list(second)[1:] == pytest.approx([9.6] * 3)
    edge = lines(levels)["bulk edge"].get_ydata()
    assert np.isnan(edge[0])
    assert list(edge[1:]) == pytest.approx([0.7] * 3)
    assert "2/lr" in lines(levels)
    above = lines(counts)["above the bulk"]
    assert (list(above.get_xdata()), list(above.get_ydata())) == ([10, 20, 100], [9, 9, 9])
    refused = [line for line in counts.get_lines() if line.get_marker() == "x"]
    assert all(line.get_ydata()[0] < 0 for line in refused)  # off the scale of counts: not a zero
    assert sorted(list(line.get_xdata()) for line in refused) == [[0], [0, 10, 20, 100]]
    bars = trace.containers[0]
    spectrum = run[1].spectrum
    (low, high) = bars.lines[2][0].get_segments()[1][:, 1]
    assert (low + high) / 2 == pytest.approx(spectrum.trace.mean)
    assert (high - low) / 2 == pytest.approx(spectrum.trace.stderr)


@pytest.mark.parametrize("draw", [heat_map_figure, outliers_over_time_figure])
def test_an_empty_history_is_refused(draw):
    with pytest.raises(ValueError, match="history is empty"):
        draw([])


# --- manners ------------------------------------------------------------------------------------------------------


def test_pixels_are_rgb(trained):
    image = pixels(spectrum_figure(trained))
    assert image.dtype == np.uint8
    assert image.shape == (506, 704, 3)
    assert (image[0, 0] == 255).all()


def test_no_global_state_is_touched(trained):
    before = dict(matplotlib.rcParams)
    pixels(spectrum_figure(trained))
    pixels(heat_map_figure(history_of([trained])))
    assert dict(matplotlib.rcParams) == before


def test_importing_the_report_imports_no_matplotlib_and_drawing_no_pyplot():
    code = """
import sys
import lightning_rmt.report.figures, lightning_rmt.report.loggers, lightning_rmt.report.files, lightning_rmt.report.table
assert not any(name.split(".")[0] in ("matplotlib", "torch", "pytorch_lightning", "lightning") for name in sys.modules)
import numpy as np
from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.reading import Reading
from lightning_rmt.spectra.spectrum import Spectrum
spectrum = Spectrum((Tridiagonal(np.zeros(30), np.r_[np.ones(29), 0.0]),), 100, 30, 4e-15)
reading = Reading(0, 0, spectrum, "hessian", "rmt", 1.0, 1)
lightning_rmt.report.figures.pixels(lightning_rmt.report.figures.spectrum_figure(reading))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_law_that_is_rejected_is_named_and_not_drawn(known):
    reading = known("trained")
    figure = spectrum_figure(reading)
    assert "every law is rejected; the nearest is" in all_words(figure)
    assert law_name(reading.laws.fits[0]) not in lines(figure.axes[0])


def test_the_spectrum_names_the_nearest_law_and_draws_it(known):
    figure = spectrum_figure(known("semicircle"))
    assert "bulk can't be told from semicircle at resolution" in all_words(figure)
    line = lines(figure.axes[0])["semicircle"]
    x, y = line.get_data()
    inside = np.abs(x) < 1.2
    assert y[inside] == pytest.approx(np.sqrt(4 - x[inside] ** 2) / (2 * np.pi), rel=0.08)


def test_free_cumulants_show_where_the_bulk_is_with_its_errors(known):
    (entry,) = history_of([known("semicircle")])
    axes = free_cumulant_figure([replace(entry, step=step) for step in (0, 10)]).axes[0]
    (container,) = axes.containers
    assert container.has_xerr
    assert container.has_yerr
    ((x, y), _) = axes.collections[-1].get_offsets()
    assert (x, y) == pytest.approx((0, 0), abs=0.1)


def test_growing_batches_are_drawn_with_the_map_and_the_isotropic_prediction(known, law):
    reading = replace(known("trained"), batch_law=law)
    figure = batch_law_figure(reading)
    assert_readable(figure)
    axes = figure.axes[0]
    lines = {line.get_linestyle(): line for line in axes.get_lines() if len(line.get_xdata()) == 200}
    x = lines["-"].get_xdata()
    np.testing.assert_allclose(lines["-"].get_ydata(), law.fits[-1].predict(x)[:, 0])
    np.testing.assert_allclose(lines["--"].get_ydata(), law.isotropic(1, x))
    squares = [line for line in axes.get_lines() if line.get_marker() == "s"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in squares] == [
        (reading.samples, pytest.approx(level.value)) for level in reading.spectrum.top[:2]
    ]
    sizes, means, _ = law.means()
    drawn = [line for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn[0].get_xdata(), sizes)
    np.testing.assert_allclose(drawn[0].get_ydata(), means[:, 0])
    no_noise = batch_law_figure(replace(reading, batch_law=replace(law, sample_noise=None)))
    assert not [line for line in no_noise.axes[0].get_lines() if line.get_linestyle() == "--"]
    with pytest.raises(ValueError, match="no fit of the outlier map"):
        batch_law_figure(known("trained"))
