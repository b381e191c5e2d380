"""TensorBoard on a short run of examples/demo.py, in a headless Chromium: is there what a reader is told to look at?"""

from __future__ import annotations

import io
import os

import demo
import numpy as np
import pytest
import tensorboard_page
from matplotlib.image import imread
from playwright.sync_api import TimeoutError as NotThere
from tensorboard_page import FIRST, Board, browser_page, tensorboard

from lightning_rmt import SpectrumMonitor
from lightning_rmt.report.files import load_run
from lightning_rmt.report.scalars import scalars
from lightning_rmt.report.tensorboard import layout

pytestmark = pytest.mark.slow

EPOCHS = 5  # of 29 steps
FIGURES = ["rmt/spectrum", "rmt/spectrum_over_time", "rmt/free_cumulants"]


def required_browser():
    """A Chromium's path; without one the test is skipped, and in CI it fails."""
    browser = tensorboard_page.find_browser()
    if browser is None:
        words = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(words)
        pytest.skip(words)
    return browser


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_browser_ci_fails_and_a_developer_goes_on(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outcome, match="apt-get install chromium"):
        required_browser()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Readings of the watched run, and its TensorBoard and that of a run without a monitor as seen in the browser."""
    browser = required_browser()
    folder = tmp_path_factory.mktemp("demo")
    monitor = SpectrumMonitor(
        every_n_steps=60, light_every_n_steps=20, lanczos_steps=40, levels=None, custom_scalars=True
    )
    watched = demo.train(folder / "watched", EPOCHS, monitor)
    demo.train(folder / "plain", EPOCHS, None)
    with (
        tensorboard(folder / "watched") as address,
        tensorboard(folder / "plain") as plain_address,
        browser_page(browser, address, plain_address) as page,
    ):
        yield load_run(watched.log_dir)["rmt"], Board(page, address), Board(page, plain_address)


def test_the_time_series_end_with_the_numbers_that_were_measured(run):
    readings, board, _ = run
    shown = board.time_series([f"rmt/{tag}" for tag in FIRST])
    last = scalars(readings[-1])
    assert [tag for tag, number in shown.items() if number is None] == ["rmt/spectrum", "rmt/spectrum_over_time"]
    for tag in ("rmt/lambda_max", "rmt/sharpness_times_lr"):
        number, step = shown[tag]
        assert number == pytest.approx(last[tag], abs=1e-3)
        assert step == readings[-1].step == 140


def test_the_layout_draws_a_line_for_every_tag_that_was_logged(run):
    readings, board, _ = run
    logged = {tag for reading in readings for tag in scalars(reading)}
    charts = {title: chart for group in layout("rmt").values() for title, chart in group.items()}
    expected = {
        title: sum(tag.replace("\\", "").rstrip("$") in logged for tag in tags)
        for title, (kind, tags) in charts.items()
        if kind == "Multiline"
    }
    assert expected["lambda_max against 2/lr"] == 2
    assert expected["largest eigenvalues"] >= 3
    drawn = board.custom_scalars(list(charts))
    assert drawn.pop("trace, one standard error") >= 1
    assert drawn == expected


def test_the_figures_are_loaded_and_not_blank(run):
    _, board, _ = run
    pictures = board.images(FIGURES)
    assert list(pictures) == FIGURES
    for tag, (width, height, png) in pictures.items():
        assert width > 600, tag
        assert height > 400, tag
        seen = imread(io.BytesIO(png))[..., :3]
        assert np.unique((255 * seen).astype(int).reshape(-1, 3), axis=0).shape[0] > 50, tag


def test_there_is_one_histogram_for_every_full_reading(run):
    readings, board, _ = run
    full = sum(not reading.light for reading in readings)
    assert full == 3 < len(readings)
    assert board.histogram("rmt/density") == full


def test_the_notes_say_what_was_refused(run):
    _, board, _ = run
    assert "no outlier count" in board.notes("rmt/notes/text_summary")


def test_without_the_monitor_nothing_of_it_is_there(run):
    *_, plain = run
    assert plain.time_series(["train_loss"])["train_loss"] is not None
    looks = [
        lambda: plain.time_series([f"rmt/{tag}" for tag in FIRST]),
        lambda: plain.custom_scalars(["lambda_max against 2/lr"]),
        lambda: plain.images(FIGURES),
        lambda: plain.histogram("rmt/density"),
    ]
    plain.wait(1)
    for look in looks:
        with pytest.raises(NotThere):
            look()
