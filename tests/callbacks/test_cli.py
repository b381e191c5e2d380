"""LightningCLI of both namespaces parses every argument of every callback, from a YAML file and from the command line."""

from __future__ import annotations

import inspect

import lightning.pytorch as lightning_pl
import lightning.pytorch.cli as lightning_cli
import pytest
import pytorch_lightning as pl
import pytorch_lightning.cli as pl_cli
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import DampingController, KroneckerDiagnostics, LocalLawDamping, SpectrumMonitor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*logging interval.*",
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",  # of how Lightning calls it
)

ARGUMENTS = {
    "every_n_steps": 2,
    "light_every_n_steps": 1,
    "max_overhead": 0.1,
    "curvature": "ggn",
    "lanczos_steps": 7,
    "probes": 2,
    "batches": 1,
    "loss_fn": "tests_of_cli.loss_fn",
    "outputs_fn": "tests_of_cli.outputs_fn",
    "parameters": ["net.*"],
    "levels": None,  # there are none of a ggn
    "blocks": ["net.*"],
    "noise": False,
    "batch_law_every": 2,
    "preconditioned": False,  # True doesn't go with batch_law_every
    "rank_weights": "samples",
    "microbatch": 2,
    "product": "exact",
    "autocast": True,
    "seed": 3,
    "name": "watch",
    "on_error": "raise",
    "figures_every": 0,
    "custom_scalars": True,
}


def loss_fn(module, batch):
    return module.training_step(batch, 0)


def outputs_fn(module, batch):
    return module.net(batch[0]), lambda outputs: (outputs**2).mean()


def module_class(base):
    class Module(base):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) ** 2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=2)

    return Module


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tests_of_cli", sys.modules[__name__])


def run(namespace, cli, tmp_path, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["train.py", "fit", *arguments])
    return cli.LightningCLI(
        module_class(namespace.LightningModule),
        trainer_defaults={
            "default_root_dir": str(tmp_path), "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False,
            "enable_checkpointing": False, "enable_model_summary": False,
        },
        save_config_callback=None,
        seed_everything_default=0,
    )  # fmt: skip


BOTH = pytest.mark.parametrize(
    ("namespace", "cli"), [(pl, pl_cli), (lightning_pl, lightning_cli)], ids=["pytorch_lightning", "lightning.pytorch"]
)


def test_every_argument_is_covered():
    assert set(ARGUMENTS) == set(inspect.signature(SpectrumMonitor).parameters)


@BOTH
def test_yaml(namespace, cli, tmp_path, monkeypatch):
    config = {"trainer": {"callbacks": [{"class_path": "lightning_rmt.SpectrumMonitor", "init_args": ARGUMENTS}]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    trainer = run(namespace, cli, tmp_path, monkeypatch, ["--config", str(path)]).trainer
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, SpectrumMonitor))
    assert watch.reading.name == "watch"
    assert watch.reading.curvature == "ggn"
    assert watch.reading.spectrum.products == 2 * 4
    assert watch.loss_fn is loss_fn
    assert [(entry.step, entry.speed) for entry in watch.history] == [
        *[(0, "full"), (1, "light")],
        *[(2, "full"), (3, "light")],
    ]


@BOTH
def test_command_line(namespace, cli, tmp_path, monkeypatch):
    arguments = ["--trainer.callbacks=SpectrumMonitor", "--trainer.callbacks.every_n_steps=3"]
    trainer = run(namespace, cli, tmp_path, monkeypatch, [*arguments, "--trainer.callbacks.lanczos_steps=2"]).trainer
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, SpectrumMonitor))
    assert [entry.step for entry in watch.history] == [0, 3]


@BOTH
@pytest.mark.parametrize(
    ("argument", "value"), [("every_n_steps", "often"), ("curvature", "fisher"), ("on_error", "x")]
)
def test_wrong_types_are_refused_by_the_parser(namespace, cli, tmp_path, monkeypatch, argument, value, capsys):
    with pytest.raises(SystemExit):
        run(
            namespace, cli, tmp_path, monkeypatch,
            ["--trainer.callbacks=lightning_rmt.SpectrumMonitor", f"--trainer.callbacks.{argument}={value}"],
        )  # fmt: skip
    assert argument in capsys.readouterr().err


KRONECKER = {
    "every_n_steps": 30, "factor_steps": 3, "held_out_steps": 8, "beta": 0.9, "parameters": ["net.*"], "max_dim": 64,
    "max_memory_mib": 3.5, "name": "watch", "on_error": "raise",
}  # fmt: skip


@BOTH
def test_kronecker_diagnostics(namespace, cli, tmp_path, monkeypatch):
    assert set(KRONECKER) == set(inspect.signature(KroneckerDiagnostics).parameters)
    config = {"trainer": {"callbacks": [{"class_path": "lightning_rmt.KroneckerDiagnostics", "init_args": KRONECKER}]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    trainer = run(namespace, cli, tmp_path, monkeypatch, ["--config", str(path)]).trainer
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, KroneckerDiagnostics))
    assert {argument: getattr(watch, argument) for argument in KRONECKER} == KRONECKER
    assert watch.reading.name == "watch"
    with pytest.raises(SystemExit):
        run(
            namespace, cli, tmp_path, monkeypatch,
            ["--trainer.callbacks=lightning_rmt.KroneckerDiagnostics", "--trainer.callbacks.beta=slow"],
        )  # fmt: skip


CONTROLLER = {
    "target": "lr", "method": "two-part", "every": 2, "init": 0.05, "bounds": [1e-3, 0.2], "rel_bounds": [1e-4, 10.0],
    "max_change": 1.5, "ema": 0.1, "deadband": [0.9, 1.1], "guard": 1.2, "guard_factor": 2.0, "guard_steps": "every",
    "rewind": 3.0, "mode": "control", "search": False,
}  # fmt: skip
DAMPING = {
    "controller": {"class_path": "lightning_rmt.DampingController", "init_args": CONTROLLER},
    "optimizer": 0, "loss_fn": "tests_of_cli.loss_fn", "seed": 4, "name": "watch", "on_error": "raise",
}  # fmt: skip


def from_yaml(namespace, cli, tmp_path, monkeypatch, **init_args):
    config = {"trainer": {"callbacks": [{"class_path": "lightning_rmt.LocalLawDamping", "init_args": init_args}]}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    trainer = run(namespace, cli, tmp_path, monkeypatch, ["--config", str(path)]).trainer
    return trainer, next(callback for callback in trainer.callbacks if isinstance(callback, LocalLawDamping))


@BOTH
def test_local_law_damping(namespace, cli, tmp_path, monkeypatch):
    """With a controller of its own, and every argument of that."""
    assert {*DAMPING, "mode", "target"} == set(inspect.signature(LocalLawDamping).parameters)
    assert set(CONTROLLER) == set(inspect.signature(DampingController).parameters)
    trainer, watch = from_yaml(namespace, cli, tmp_path, monkeypatch, **DAMPING)
    plain = {name: value for name, value in DAMPING.items() if name not in ("controller", "loss_fn")}
    assert {name: getattr(watch, name) for name in plain} == plain
    assert watch.loss_fn is loss_fn
    assert watch.controller.target == "lr"
    settings = vars(watch.controller.settings)
    assert settings == {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in CONTROLLER.items()
        if name != "target"
    }
    (rate,) = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert rate == watch.controller.damping != 0.1


@BOTH
def test_local_law_damping_in_short(namespace, cli, tmp_path, monkeypatch):
    _, watch = from_yaml(namespace, cli, tmp_path, monkeypatch, mode="suggest", target="lr")
    assert (watch.controller.mode, watch.controller.target) == ("suggest", "lr")
    with pytest.raises(SystemExit):
        run(
            namespace, cli, tmp_path, monkeypatch,
            ["--trainer.callbacks=lightning_rmt.LocalLawDamping", "--trainer.callbacks.mode=always"],
        )  # fmt: skip
