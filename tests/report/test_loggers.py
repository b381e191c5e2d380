from __future__ import annotations

import csv
import importlib
import io
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.loggers import LoggerReport
from lightning_rmt.report.scalars import scalars
from lightning_rmt.report.tensorboard import histogram_counts, histogram_grid

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


@pytest.fixture(params=NAMESPACES, scope="module")
def loggers(request):
    """The loggers module of either Lightning."""
    return importlib.import_module(f"{request.param}.loggers")


@pytest.fixture(scope="module")
def readings(trained, known):
    """An early one without an outlier count, and a later one with nine; their spectra have different widths."""
    return [replace(known("initial"), step=0, name="rmt"), replace(trained, step=120)]


def report_all(report, loggers, readings):
    history = []
    for reading in readings:
        history.append(HistoryEntry.from_reading(reading))
        report.log(loggers, reading, history)


def events(directory):
    accumulator = EventAccumulator(
        str(directory), size_guidance={"histograms": 0, "scalars": 0, "images": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def tensorboard(loggers, tmp_path):
    return loggers.TensorBoardLogger(tmp_path, name="tb", version=0)


def finish(logger):
    logger.finalize("success")


@pytest.fixture(scope="module")
def board(loggers, readings, tmp_path_factory):
    logger = tensorboard(loggers, tmp_path_factory.mktemp("board"))
    report_all(LoggerReport(figures_every=1, custom_scalars=True), [logger], readings)
    finish(logger)
    return events(logger.log_dir)


class TestTensorBoard:
    """Real event files, read back as TensorBoard reads them."""

    def test_scalars_come_back_at_the_readings_steps(self, board, readings):
        for reading in readings:
            for tag, value in scalars(reading).items():
                (event,) = [event for event in board.Scalars(tag) if event.step == reading.step]
                assert event.value == pytest.approx(value, rel=1e-6)  # event files keep float32
        assert [event.step for event in board.Scalars("rmt/outliers/count_high")] == [120]
        assert {event.step for tag in board.Tags()["scalars"] for event in board.Scalars(tag)} == {0, 120}

    def test_both_densities_come_back_exactly_on_the_first_readings_grid(self, board, readings):
        grid = histogram_grid(readings[0].spectrum)
        first, second = board.Histograms("rmt/density")
        for event, reading in ((first, readings[0]), (second, readings[1])):
            value = event.histogram_value
            assert event.step == reading.step
            assert list(value.bucket_limit) == grid[1:]
            assert list(value.bucket) == histogram_counts(reading.spectrum, grid).tolist()
            assert (value.min, value.max, len(value.bucket)) == (grid[0], grid[-1], 128)
            assert sum(value.bucket) == pytest.approx(1e6)

    def test_figures_come_back_as_pictures(self, board):
        for tag in ("rmt/spectrum", "rmt/spectrum_over_time"):
            pictures = board.Images(tag)
            assert [picture.step for picture in pictures] == [0, 120]
            for picture in pictures:
                image = Image.open(io.BytesIO(picture.encoded_image_string))
                assert image.format == "PNG"
                assert min(image.size) > 400
                assert np.asarray(image.convert("L")).std() > 10  # something is drawn

    def test_notes_say_why_a_number_is_missing(self, board, readings):
        (notes, *_) = board.Tensors("rmt/notes/text_summary")
        text = notes.tensor_proto.string_val[0].decode()
        assert "- rmt/outliers/count_high, rmt/bulk_edge_high: no outlier count" in text
        assert notes.step == 0

    def test_layout_is_written_once_and_its_margins_have_their_series(self, board):
        (written,) = board.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
        charts = {chart.title: chart for category in layout.category for chart in category.chart}
        assert list(charts["lambda_max against 2/lr"].multiline.tag) == ["rmt/lambda_max$", "rmt/two_over_lr$"]
        (margin,) = charts["trace, one standard error"].margin.series
        # TensorBoard refuses margins whose tags aren't at the same steps.
        steps = [[event.step for event in board.Scalars(tag)] for tag in (margin.value, margin.lower, margin.upper)]
        assert steps[0] == steps[1] == steps[2] == [0, 120]
        low, value, high = (board.Scalars(tag)[1].value for tag in (margin.lower, margin.value, margin.upper))
        assert high - value == pytest.approx(board.Scalars("rmt/trace_stderr")[1].value, rel=1e-3)
        assert value - low == pytest.approx(high - value, rel=1e-3)


def test_the_layout_is_opt_in_and_brings_the_margins_tags(loggers, trained, tmp_path):
    logger = tensorboard(loggers, tmp_path)
    report_all(LoggerReport(figures_every=0), [logger], [trained])
    finish(logger)
    board = events(logger.log_dir)
    assert "custom_scalars__config__" not in board.Tags()["tensors"]
    assert "rmt/trace_low" not in board.Tags()["scalars"]
    assert board.Tags()["images"] == []


def test_csv_gets_columns_that_appear_late(loggers, readings, tmp_path):
    logger = loggers.CSVLogger(tmp_path, name="csv", version=0)
    report_all(LoggerReport(), [logger], readings)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "120"]
    assert [row["rmt/outliers/count_high"] for row in rows] == ["", "9.0"]
    assert float(rows[1]["rmt/lambda_max"]) == pytest.approx(10.4)


def wandb_logger(loggers, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return loggers.WandbLogger(name="w", save_dir=tmp_path, offline=True)


def mlflow_logger(loggers, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return loggers.MLFlowLogger(experiment_name="e", tracking_uri=f"file:{tmp_path / 'mlruns'}")


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow", "ignore::DeprecationWarning:wandb")
def test_all_loggers_at_once(loggers, readings, tmp_path, monkeypatch):
    board, table = tensorboard(loggers, tmp_path), loggers.CSVLogger(tmp_path, name="csv", version=0)
    weights, flow = wandb_logger(loggers, tmp_path, monkeypatch), mlflow_logger(loggers, tmp_path, monkeypatch)
    report_all(LoggerReport(figures_every=1), [board, table, weights, flow], readings)
    for logger in (board, table, weights, flow):
        finish(logger)
    logged = dict(weights.experiment.summary)
    weights.experiment.finish()

    assert [event.step for event in events(board.log_dir).Scalars("rmt/lambda_max")] == [0, 120]
    assert (tmp_path / "csv" / "version_0" / "metrics.csv").exists()

    pictures = list(tmp_path.rglob("media/images/rmt/*.png"))
    assert len(pictures) == 6
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert logged["rmt/lambda_max"] == pytest.approx(10.4)
    assert logged["trainer/global_step"] == 120

    client, run = flow.experiment, flow.run_id
    history = client.get_metric_history(run, "rmt/lambda_max")
    assert [(metric.step, metric.value) for metric in history] == [
        (reading.step, pytest.approx(reading.spectrum.lambda_max.value)) for reading in readings
    ]
    assert [metric.step for metric in client.get_metric_history(run, "rmt/outliers/count_high")] == [120]
    artifacts = list(tmp_path.rglob("artifacts/rmt/spectrum*/step_*.png"))
    assert {path.name for path in artifacts} == {"step_00000000.png", "step_00000120.png"}
    assert len(artifacts) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in artifacts)


class Recorder:
    """A logger that takes scalars only."""

    group_separator = "/"

    def __init__(self, error=None):
        self.rows, self.error = [], error

    def log_metrics(self, metrics, step):
        if self.error:
            raise self.error
        self.rows.append((step, metrics))


def test_a_failing_logger_does_not_silence_the_others(readings):
    bad, good = Recorder(ConnectionError("server is down")), Recorder()
    with pytest.raises(ConnectionError, match="server is down"):
        LoggerReport().log([bad, good], readings[1], [])
    assert [step for step, _ in good.rows] == [120]


def test_only_rank_zero_writes(readings, monkeypatch):
    logger = Recorder()
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    LoggerReport().log([logger], readings[1], [])
    assert logger.rows == []
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    LoggerReport().log([logger], readings[1], [])
    assert len(logger.rows) == 1


def test_the_loggers_own_group_separator_is_used(readings):
    logger = Recorder()
    logger.group_separator = "-"
    LoggerReport().log([logger], readings[1], [])
    ((_, metrics),) = logger.rows
    assert metrics["rmt-outliers-count_high"] == 9
    assert not any("/" in tag for tag in metrics)


def test_nothing_but_finite_floats_is_ever_logged(any_reading):
    logger = Recorder()
    LoggerReport().log([logger], replace(any_reading, repeat_error=math.nan), [])
    ((_, metrics),) = logger.rows
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


class Board(Recorder):
    """Stands in for a TensorBoard logger, and notes what it is given."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.experiment = self

    def __getattr__(self, name):
        if name.startswith("add_"):
            return lambda *args, **kwargs: self.calls.append((name, args, kwargs))
        raise AttributeError(name)

    def steps(self, name, tag):
        calls = [(args, kwargs) for call, args, kwargs in self.calls if call == name and args[0] == tag]
        return [args[2] if len(args) > 2 else kwargs["global_step"] for args, kwargs in calls]


def test_figures_are_drawn_for_the_first_reading_and_every_kth(trained):
    board, report = Board(), LoggerReport(figures_every=3)
    report_all(report, [board], [replace(trained, step=step) for step in range(0, 70, 10)])
    assert board.steps("add_image", "rmt/spectrum") == [0, 30, 60]
    assert board.steps("add_image", "rmt/spectrum_over_time") == [0, 30, 60]
    assert board.steps("add_histogram_raw", "rmt/density") == list(range(0, 70, 10))
    report.log_figures([board], replace(trained, step=60), [])  # already there
    report.log_figures([board], replace(trained, step=65), [])
    assert board.steps("add_image", "rmt/spectrum") == [0, 30, 60, 65]


def test_a_sentence_is_written_once_however_its_numbers_change(trained, known):
    board, report = Board(), LoggerReport(figures_every=0)
    first = replace(known("initial"), step=1, name="rmt", notes=("Probing took 3.1 s.",))
    others = [
        replace(known("initial"), step=2, name="rmt", notes=("Probing took 4.25e-1 s.",)),
        replace(trained, step=3),
    ]
    report_all(report, [board], [first, *others, replace(first, step=4, notes=("Something else.",))])
    said = {args[2]: args[1] for name, args, _ in board.calls if name == "add_text"}
    assert "- Probing took 3.1 s." in said[1]
    assert 2 not in said
    assert "count_high" not in said.get(3, "")
    assert said[4] == "- Something else."


def test_q99_and_q01_are_different_things_to_say(reading_of):
    board = Board()
    reading = reading_of(np.random.default_rng(0).standard_normal(500), steps=6)
    LoggerReport(figures_every=0).log([board], reading, [])
    (text,) = [args[1] for name, args, _ in board.calls if name == "add_text"]
    assert "rmt/q99: known only" in text
    assert "rmt/q01: known only" in text


def test_without_tensorboard_sentences_go_to_the_log(known, caplog, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    reading = known("initial")
    with caplog.at_level(logging.INFO):
        LoggerReport().log([Recorder()], reading, [])
        assert "rmt, step 0: rmt/outliers/count_high" in caplog.text
        caplog.clear()
        LoggerReport(figures_every=0).log([Board()], reading, [])
        assert caplog.text == ""


def test_goes_on_after_a_resume_with_the_same_grid_and_silence(readings, tmp_path):
    first = LoggerReport(figures_every=2)
    report_all(first, [Board()], readings[:1])
    torch.save(first.state_dict(), tmp_path / "x.ckpt")
    resumed, board = LoggerReport(figures_every=2), Board()
    resumed.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True))
    report_all(resumed, [board], [replace(readings[0], step=60), readings[1]])
    (histogram, _) = [kwargs for name, _, kwargs in board.calls if name == "add_histogram_raw"]
    assert histogram["bucket_limits"] == histogram_grid(readings[0].spectrum)[1:]
    texts = [args[1] for name, args, _ in board.calls if name == "add_text"]
    assert not any("count_high" in text for text in texts)
    assert board.steps("add_image", "rmt/spectrum") == [120]  # the third reading of the run


def test_figures_every_must_not_be_negative():
    with pytest.raises(ValueError, match="figures_every"):
        LoggerReport(figures_every=-1)
