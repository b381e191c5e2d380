"""A user's first run, away from the checkout: train, watch, read TensorBoard back, draw the figures on the command line.

``every_python.py`` runs it in an environment that holds the package and what that depends on, nothing else, beside a copy
of ``typed_user_script.py``, which uses the rest of the API. The model is a linear regression on one batch, so the Hessian
is the data's at every step: 2 X^T X / n.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import lightning_rmt
from lightning_rmt import SpectrumMonitor

STEPS = 3


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(5, 1, bias=False)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def main() -> None:
    package = Path(lightning_rmt.__file__).parent
    check(package.is_relative_to(sys.prefix), f"the package is {package}, not the environment's")
    check((package / "py.typed").is_file(), "py.typed is missing")
    declared = importlib.metadata.version("lightning-rmt")
    check(declared == lightning_rmt.__version__, f"metadata says {declared}, the package {lightning_rmt.__version__}")

    X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        logger=TensorBoardLogger(".", name="run"),
        callbacks=[SpectrumMonitor(every_n_steps=1, on_error="raise")],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(X, X.sum(1, keepdim=True)), batch_size=64))

    truth = torch.linalg.eigvalsh(2 * X.double().T @ X.double() / 64)
    board = EventAccumulator(trainer.log_dir)
    board.Reload()
    for tag, value in {"rmt/lambda_max": truth[-1], "rmt/lambda_min": truth[0], "rmt/trace": truth.sum()}.items():
        logged = [event.value for event in board.Scalars(tag)]
        check(len(logged) == STEPS, f"{tag} was logged {len(logged)} times")
        error = max(abs(number / float(value) - 1) for number in logged)
        check(error < 1e-4, f"{tag} is off by {error:.1e} of {value:.6g}")
    check("rmt/density" in board.Tags()["histograms"], "no histogram of the density")
    check("rmt/spectrum_over_time" in board.Tags()["images"], "no figure of the spectrum over time")

    command = [sys.executable, "-m", "lightning_rmt", "plot", str(trainer.log_dir), "--output", "figures"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    drawn = list(Path("figures").rglob("spectrum_over_time.png"))
    check(len(drawn) == 1 and drawn[0].read_bytes().startswith(b"\x89PNG"), "the command line drew nothing")

    runpy.run_path("typed_user_script.py", run_name="__main__")


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
