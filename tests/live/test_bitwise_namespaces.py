"""The fence knows neither Lightning: the same module under `lightning.pytorch` and under `pytorch_lightning`."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from harness import digest
from live_models import vectors
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor


def trained(namespace: str, directory: Any, probe: Any) -> list[str]:
    """What is left of a training with dropout, batch statistics, logging and counting."""
    pl = importlib.import_module(namespace)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Dropout(0.2)]
            self.net = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
            self.n = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.n += 1
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log_dict({"loss": loss, "n": float(self.n)}, on_step=True, on_epoch=True)
            self.logger.experiment.add("direct", loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    class Rows(importlib.import_module(f"{namespace}.loggers.logger").Logger):
        name, version, save_dir = "rows", 0, str(directory)

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[Any] = []
            self.experiment = self

        def add(self, tag: str, value: Any) -> None:
            self.rows.append((tag, float(value)))

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            own = {key: value for key, value in metrics.items() if not key.startswith("rmt/")}
            self.rows += [(own, step)] if own else []

        def log_hyperparams(self, *_: Any) -> None: ...

    torch.manual_seed(1)
    module, logger = Module(), Rows()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=logger, log_every_n_steps=2, callbacks=probe, **quiet
    )
    trainer.fit(module, vectors())
    metrics = dict(trainer.callback_metrics)
    return [digest(value) for value in (module.state_dict(), module.n, logger.rows, metrics, torch.get_rng_state())]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_training_is_the_same_in_either_namespace(namespace, tmp_path):
    monitor = SpectrumMonitor(every_n_steps=3, lanczos_steps=4, on_error="raise")
    assert trained(namespace, tmp_path, [monitor]) == trained(namespace, tmp_path, [])
    assert monitor.history
