"""All callbacks on one Trainer with the real loggers, offline or on a local folder: what they wrote, read back."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import DampingController, KroneckerDiagnostics, LocalLawDamping, SpectrumMonitor
from lightning_rmt.report.files import load_run

QUIET = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
STEPS = 24


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01, eps=1e-3)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * 8, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()), batch_size=8)


def fit(callbacks, directory, loggers=False, module=None, **options):
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=directory,
        logger=loggers,
        callbacks=callbacks,
        **QUIET,
        **options,
    )
    trainer.fit(module or Module(), data())
    return trainer


def monitor(**options):
    return SpectrumMonitor(**{"every_n_steps": 10, "lanczos_steps": 20, "levels": None, "on_error": "raise", **options})


def in_tensorboard(directory):
    board = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    return {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}


def in_csv(logger):
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {
        (tag, int(row["step"])): float(value) for row in rows for tag, value in row.items() if value and tag != "step"
    }


def in_mlflow(logger):
    tags = logger.experiment.get_run(logger.run_id).data.metrics
    history = [metric for tag in tags for metric in logger.experiment.get_metric_history(logger.run_id, tag)]
    return {(metric.key, metric.step): metric.value for metric in history}


def records_in(log):
    """Of a file in LevelDB's log format: blocks of 32 KiB, of pieces with checksum, length and kind; 7 bytes come first."""
    place, parts = 7, b""
    while place + 7 <= len(log):
        if (left := -place % 2**15) and left < 7:  # no room for another piece in this block
            place += left
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def in_wandb(directory):
    """From the file that ``wandb sync`` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.rglob("run-*.wandb")
    found = {}
    for data in records_in(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
            if len(item.nested_key) < 2
        }
        numbers = {tag: value for tag, value in row.items() if isinstance(value, (int, float))}
        found |= {(tag, row["trainer/global_step"]): float(value) for tag, value in numbers.items()}
    return {key: value for key, value in found.items() if not key[0].startswith("_")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(directory))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        loggers = [
            TensorBoardLogger(directory, name="board", version=0),
            CSVLogger(directory, name="csv", version=0),
            MLFlowLogger(experiment_name="e", tracking_uri=f"file:{directory / 'mlruns'}"),
            WandbLogger(name="w", save_dir=directory, offline=True),
        ]
        damping = DampingController("eps", every=5, mode="control", bounds=(1e-6, 10.0))
        watch = (
            monitor(),
            LocalLawDamping(damping, on_error="raise"),
            KroneckerDiagnostics(factor_steps=8, held_out_steps=8, on_error="raise"),
        )
        fit(list(watch), directory, loggers)
        board, table, flow, weights = loggers
        weights.experiment.finish()
        found = {
            "tensorboard": in_tensorboard(board.log_dir),
            "csv": in_csv(table),
            "mlflow": in_mlflow(flow),
            "wandb": in_wandb(directory),
        }
    return watch, found


pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:mlflow", "ignore::DeprecationWarning:wandb", "ignore:.*logging interval.*"
)
LOGGERS = ("tensorboard", "csv", "mlflow", "wandb")


@pytest.mark.parametrize("logger", LOGGERS)
def test_what_the_callbacks_found_is_what_was_written(run, logger):
    (spectrum, damping, factors), found = run
    written = found[logger]
    within = {"rel": 1e-6}  # event files keep float32
    assert [step for tag, step in written if tag == "rmt/lambda_max"] == [0, 10, 20]
    assert written["rmt/lambda_max", 20] == pytest.approx(spectrum.reading.spectrum.lambda_max.value, **within)
    assert written["rmt/noise_scale", 20] == pytest.approx(spectrum.reading.noise.mean, **within)
    last = max(step for tag, step in written if tag == "rmt/damping")
    assert written["rmt/damping", last] == pytest.approx(damping.controller.damping, **within)
    assert written["rmt/damping_control/heldout_ratio", last] == pytest.approx(damping.report.ratio, **within)
    layer = factors.reading.layers["net.0"]
    assert written["rmt/kronecker/net.0/rotation_gain", 15] == pytest.approx(layer.rotation_gain.mean, **within)


def test_every_chart_has_its_place_on_the_page_that_explains_them(run):
    page = (Path(__file__).parents[2] / "docs" / "charts.md").read_text(encoding="utf-8")
    codes = set(re.findall(r"`([^`\n]+)`", page))
    ending = re.compile(r"_(stderr|residual|low|high|left|right|held_out|floors|z|z_poisson|p_value|levels)$")
    named = {part for code in codes for part in re.split(r"[/, ]+", code)}
    named |= codes | {ending.sub("", name) for name in named}

    def explained(tag):
        leaf = re.sub(r"(?<=/)\d+$", "<i>", re.sub(r"(?<=/fit/)\w+$", "<law>", tag))
        leaf = "/".join(leaf.split("/")[-2:]) if leaf.endswith("<i>") else leaf.rsplit("/", 1)[-1]
        while leaf not in named and ending.search(leaf):
            leaf = ending.sub("", leaf)
        return leaf in named

    tags = {tag for tag, _ in run[1]["csv"] if tag.startswith("rmt/")}
    assert len(tags) > 80
    assert not explained("rmt/an_unexplained_chart_stderr")
    assert {tag for tag in tags if not explained(tag)} == set()


@pytest.mark.parametrize("logger", LOGGERS[1:])
def test_every_logger_has_the_same_numbers(run, logger):
    _, found = run
    own = {key: value for key, value in found[logger].items() if key[0].startswith("rmt/")}
    board = {key: value for key, value in found["tensorboard"].items() if key[0].startswith("rmt/")}
    assert len(board) > 150
    assert own == pytest.approx(board, rel=1e-6)


def test_without_a_logger_the_reading_goes_to_the_damping(tmp_path):
    """Which also sets Adam's eps; the readings are below the Trainer's root."""
    seen = []

    class Watched(Module):
        def on_train_batch_end(self, *_):
            seen.append(self.trainer.optimizers[0].param_groups[0]["eps"])

    spectrum = monitor()
    controller = DampingController("eps", every=5, mode="control", bounds=(1e-6, 10.0))
    watch = LocalLawDamping(controller, on_error="raise")
    fit([spectrum, watch], tmp_path, module=Watched())
    assert spectrum.reading.step == 20
    assert controller.state_dict()["local_law"] == pytest.approx(spectrum.reading.local_law_damping())
    assert seen[-1] == controller.damping
    assert seen[-1] != 1e-3
    assert [reading.step for reading in load_run(tmp_path)["rmt"]] == [0, 10, 20]


def test_several_monitors_are_each_what_they_are_alone(tmp_path):
    """Different matrices of different parameters, one name below the other: no tag is shared, and no file."""
    options = {
        "rmt": {"levels": ["net.0.*"]},
        "rmt/head": {"parameters": ["net.2.*"], "curvature": "gradient_covariance", "every_n_steps": 12},
    }
    together = {name: monitor(name=name, **values) for name, values in options.items()}
    logger = CSVLogger(tmp_path, name="csv", version=0)
    fit(list(together.values()), tmp_path, logger)
    tags = {}
    for name, values in options.items():
        alone, own = monitor(name=name, **values), CSVLogger(tmp_path, name=name.replace("/", "-"), version=0)
        fit([alone], tmp_path, own)
        assert (alone.reading.spectrum.nodes == together[name].reading.spectrum.nodes).all()
        tags[name] = {key for key in in_csv(own) if not key[0].endswith(("_seconds", "/overhead"))}
    assert not tags["rmt"] & tags["rmt/head"]
    assert tags["rmt"] | tags["rmt/head"] <= set(in_csv(logger))
    saved = load_run(logger.log_dir)
    assert {name: [reading.step for reading in readings] for name, readings in saved.items()} == {
        "rmt": [0, 10, 20],
        "rmt/head": [0, 12],
    }


@pytest.mark.parametrize("kind", [SpectrumMonitor, LocalLawDamping, KroneckerDiagnostics])
def test_two_of_one_kind_and_name_are_refused_by_the_trainer(kind, tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit([kind(), kind()], tmp_path)


@pytest.mark.parametrize("kind", [SpectrumMonitor, LocalLawDamping, KroneckerDiagnostics])
def test_names_of_one_folder_are_one_name(kind):
    for name in ("rmt/", "./rmt", "a//b"):
        with pytest.raises(ValueError, match="name becomes a tag prefix and a folder"):
            kind(name=name)


class TwoOptimizers(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch):
        return super().training_step(batch, 0)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[place].parameters(), 0.01, eps=1e-3) for place in (0, 2)]


def loss_of(module, batch):
    return module.loss(batch)


def test_two_dampings_of_two_optimizers(tmp_path):
    """Each sets its own, and writes under its own name."""
    both = [
        LocalLawDamping(
            DampingController("eps", every=4, mode="control", bounds=(1e-6, bound)),
            optimizer=place, loss_fn=loss_of, name=name, on_error="raise",
        )
        for place, name, bound in ((0, "body", 0.5), (1, "head", 2.0))
    ]  # fmt: skip
    logger = CSVLogger(tmp_path, name="csv", version=0)
    trainer = fit(both, tmp_path, logger, module=TwoOptimizers())
    found = in_csv(logger)
    dampings = [optimizer.param_groups[0]["eps"] for optimizer in trainer.optimizers]
    assert dampings == [watch.controller.damping for watch in both]
    assert dampings[0] != dampings[1]
    assert all(watch.controller.damping != 1e-3 and watch.report.ratio is not None for watch in both)
    for watch in both:
        last = max(step for tag, step in found if tag == f"{watch.name}/damping")
        assert found[f"{watch.name}/damping", last] == pytest.approx(watch.controller.damping)


def test_two_dampings_of_one_optimizer_give_way(tmp_path):
    """The second to notice that another one writes the same number says so once and only logs from there on."""
    both = [
        LocalLawDamping(DampingController("eps", every=4, mode="control", init=init, guard=None), name=name)
        for name, init in (("one", 1e-2), ("two", 1.0))
    ]
    with pytest.warns(RuntimeWarning, match="a scheduler or a callback changes it too") as caught:
        fit(both, tmp_path)
    assert len([warning for warning in caught if "only logs" in str(warning.message)]) == 1
    assert sorted(watch.controller.mode for watch in both) == ["control", "log"]
