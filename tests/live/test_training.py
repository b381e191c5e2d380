"""What is asked of real Trainers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_rmt.live.training import current_step, learning_rate, log_directory, seconds_left, total_steps

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*val_dataloader.*")


class Asks(pl.Callback):
    """Keeps the answers of every batch."""

    def __init__(self):
        self.steps, self.answers = [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(current_step(trainer))
        self.answers = {
            "total": total_steps(trainer), "left": seconds_left(trainer),
            "directory": log_directory(trainer), "lr": learning_rate(trainer),
        }  # fmt: skip


def ask(tmp_path, module=None, **kwargs):
    asks = Asks()
    options = {"max_epochs": 1, "limit_train_batches": 6, "limit_val_batches": 0, **kwargs}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[asks], enable_checkpointing=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module or BoringModel())
    return asks, trainer


@pytest.mark.parametrize(
    ("options", "steps", "total"),
    [
        ({}, [0, 1, 2, 3, 4, 5], 6),
        ({"accumulate_grad_batches": 4}, [0, 0, 0, 0, 1, 1], 2),
        ({"max_epochs": -1, "max_steps": 4}, [0, 1, 2, 3], 4),
        ({"max_epochs": 2, "max_steps": 3}, [0, 1, 2], 3),
    ],
)
def test_steps(tmp_path, options, steps, total):
    asks, _ = ask(tmp_path, logger=False, **options)
    assert asks.steps == steps
    assert asks.answers["total"] == total
    assert asks.answers["left"] == math.inf


def test_an_end_by_the_clock(tmp_path):
    asks, _ = ask(tmp_path, logger=False, max_epochs=-1, max_time={"seconds": 0.5})
    assert asks.answers["total"] == math.inf
    assert asks.answers["left"] < 0.5


def test_log_directory_is_the_runs_own(tmp_path):
    for logger in (True, CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")):
        asks, trainer = ask(tmp_path, logger=logger)
        assert Path(asks.answers["directory"]) == Path(trainer.loggers[0].log_dir)
    asks, _ = ask(tmp_path, logger=False)
    assert asks.answers["directory"] == str(tmp_path)


def test_largest_learning_rate(tmp_path):
    class Groups(BoringModel):
        def configure_optimizers(self):
            weight, bias = self.layer.parameters()
            return torch.optim.SGD([{"params": [weight], "lr": 0.01}, {"params": [bias], "lr": 0.03}], lr=0.1)

    assert ask(tmp_path, Groups(), logger=False)[0].answers["lr"] == 0.03


class Eta(pl.Callback):
    """Somebody's own, which shows the time that is left in its own way."""

    def time_remaining(self):
        return "1:20"


def test_only_the_trainers_own_timer_limits_the_time(tmp_path):
    asks, _ = ask(tmp_path, max_time={"minutes": 3})
    assert 170 < asks.answers["left"] <= 180
    eta = pl.Trainer(callbacks=[Eta()], default_root_dir=tmp_path, accelerator="cpu", logger=False, max_epochs=1)
    assert seconds_left(eta) == math.inf
