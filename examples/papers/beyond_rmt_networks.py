"""The networks of `beyond_rmt`, and how much of everything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from training import train_quietly

from lightning_rmt import Reading, SpectrumMonitor


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        matrix: size of the simulated matrices.
        draws: samples of every ensemble.
        width: of the MLP's layers; the CNN has a quarter as many channels.
        epochs: of the training, of 8 steps each.
        every: steps from one reading to the next.
        batches: of 256 digits, in a curvature.
        widths: of the hidden layer whose zeros are counted.
        samples: for that.
        passes: over them.
        evaluations: of a distance, for the nearest member of a family.
        networks: that are trained.
    """

    matrix: int = 1000
    draws: int = 4
    width: int = 32
    epochs: int = 101
    every: int = 400
    batches: int = 4
    widths: tuple[int, ...] = (6, 12, 20, 32)
    samples: int = 400
    passes: int = 101
    evaluations: int = 250
    networks: tuple[str, ...] = ("MLP", "CNN")


QUICK = Size(
    matrix=400,
    draws=1,
    width=16,
    epochs=16,
    every=120,
    batches=1,
    widths=(6, 14),
    samples=150,
    passes=21,
    evaluations=30,
    networks=("MLP",),
)
FULL = Size(
    matrix=3000, draws=20, width=256, epochs=1001, every=2000, batches=7, widths=(8, 16, 32, 48, 60), samples=1797
)


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    first, second = width // 4, width // 2
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * second, 10)),
    )


NETWORKS = {"MLP": mlp, "CNN": cnn}


def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target))


def watch(module: Classifier, loader: DataLoader, epochs: int, **monitor_options: Any) -> list[Reading]:
    """Trains under a SpectrumMonitor and loads what it saved."""
    monitor = SpectrumMonitor(noise=False, on_error="raise", figures_every=0, **monitor_options)
    return train_quietly(module, loader, [monitor], max_epochs=epochs)
