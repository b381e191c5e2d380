"""What the papers' networks share: the data, the LightningModule, and a Trainer that watches it. Trains in float32."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import Hessian, Reading, SpectrumMonitor

Data = tuple[Tensor, Tensor]


def digits(device: torch.device | str = "cpu") -> Data:
    """scikit-learn's 1797 digits: pixels from 0 to 1, shape (1797, 64), and classes."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32, device=device), torch.tensor(y, device=device)


def diabetes() -> Data:
    """scikit-learn's 442 patients: ten standardised features, and the standardised progression, shape (442, 1)."""
    x, y = load_diabetes(return_X_y=True)
    x, y = (np.asarray(a, dtype=np.float64) for a in (x, y))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y[:, None], dtype=torch.float32)


class Supervised(pl.LightningModule):
    """A network, its loss, and an optimizer."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizer: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())

    def hessian(self, data: Data) -> Hessian:
        """Of the mean loss over all of ``data``."""
        return Hessian(lambda batch: self.loss(self.net(batch[0]), batch[1]), self.parameters(), [data])


def train_quietly(
    module: pl.LightningModule, loader: DataLoader, callbacks: Sequence[pl.Callback] = (), **limits: int
) -> list[Reading]:
    """Trains with a real Trainer that says nothing, in a folder that is gone afterwards.

    Args:
        module: what is trained; on a GPU, if there is one.
        loader: its data.
        callbacks: with a `SpectrumMonitor` among them there is a logger.
        limits: ``max_epochs`` and the like.

    Returns:
        The readings that monitors saved, in their order.
    """
    watched = any(isinstance(callback, SpectrumMonitor) for callback in callbacks)
    logging.disable(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            for words in (".*many workers.*", ".*logging interval.*", ".*GPU available.*", ".*LeafSpec.*"):
                warnings.filterwarnings("ignore", words)
            trainer = pl.Trainer(
                **limits,
                accelerator="auto" if torch.cuda.is_available() else "cpu",
                devices=1,
                logger=CSVLogger(folder) if watched else False,
                callbacks=list(callbacks),
                default_root_dir=folder,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            trainer.fit(module, loader)
            return [Reading.load(path) for path in sorted(Path(folder).rglob("*.npz"))]
    finally:
        logging.disable(logging.NOTSET)


def fit(
    module: Supervised, data: Data, *, epochs: int, batch: int = 64, seed: int = 0, **monitor: Any
) -> Reading | None:
    """Trains with a Trainer; with arguments for a `SpectrumMonitor`, reads the spectrum at the end of the last epoch.

    Args:
        module: what is trained.
        data: all of it, on the CPU.
        epochs: passes through it, in shuffled batches; what doesn't fill one is left out.
        batch: samples in one.
        seed: of the order.
        monitor: arguments of the monitor; ``batches`` to collect before the end is one of them.

    Returns:
        The reading, or None without a monitor.
    """
    loader = DataLoader(
        TensorDataset(*data), batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed)
    )
    watch = None
    if monitor:
        steps = epochs * len(loader)
        last_window = steps - monitor.get("batches", 1)  # probes follow the windows that open at its multiples
        watch = SpectrumMonitor(every_n_steps=last_window or steps, on_error="raise", **monitor)
    train_quietly(module, loader, [watch] if watch else [], max_epochs=epochs)
    return watch.reading if watch else None
