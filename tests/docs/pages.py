"""What a page's code blocks find before the first one: a small model with data, real ones, in an empty directory.

A training that a page shows without an end is ended after a few steps by Lightning's own environment variables, which
give defaults for the Trainer's arguments; nothing is replaced.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from several_ranks import on_two_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import DampingController

STEPS = 12
TRAINER = {
    "MAX_STEPS": STEPS,
    "ACCELERATOR": "cpu",
    "ENABLE_PROGRESS_BAR": False,
    "ENABLE_MODEL_SUMMARY": False,
    "ENABLE_CHECKPOINTING": False,
}


class Classifier(pl.LightningModule):
    """Four classes in eight dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(data(), batch_size=32, shuffle=True)


class DiagonalFisher(torch.optim.Optimizer):
    """``w -= lr g / (v + damping)`` with the moving average v of the squared gradients: a damping to be set."""

    def __init__(self, parameters: Any, lr: float, damping: float) -> None:
        super().__init__(parameters, {"lr": lr, "damping": damping})

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    v = self.state[p].setdefault("v", p.grad**2)
                    v.lerp_(p.grad**2, 0.05)
                    p.sub_(group["lr"] * p.grad / (v + group["damping"]))
        return loss


class Damped(Classifier):
    """The same, trained by an optimizer with a damping."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DiagonalFisher(self.parameters(), lr=0.1, damping=0.01)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (512,), generator=generator)
    centres = torch.randn(4, 8, generator=generator)
    return TensorDataset(centres[labels] + torch.randn(512, 8, generator=generator), labels)


def begin(namespace: dict[str, Any]) -> None:
    """Fills a page's namespace; `end` undoes the rest."""
    patch, directory = pytest.MonkeyPatch(), tempfile.TemporaryDirectory()
    for name, value in TRAINER.items():
        patch.setenv(f"PL_TRAINER_{name}", str(value))
    patch.chdir(directory.name)
    torch.manual_seed(0)
    model = Classifier()
    batches = list(DataLoader(data(), batch_size=128))

    def loss(batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    namespace |= {
        "_patch": patch,
        "_directory": directory,
        "torch": torch,
        "pl": pl,
        "model": model,
        "MyModule": Classifier,
        "data": data(),
        "loss": loss,
        "my_loss": lambda module, batch: cross_entropy(module(batch[0]), batch[1]),
        "batches": batches,
        "curvature_batches": batches,
        "parameters": list(model.parameters()),
        "damped_module": Damped(),
        "optimizer": DiagonalFisher(model.parameters(), lr=0.1, damping=0.01),
    }


def begin_damping(namespace: dict[str, Any]) -> None:
    """For docs/damping.md, which begins in the middle of a training loop and goes on with pairs of batches."""
    begin(namespace)
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    batches, net = namespace["batches"], nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def loss(batch: Any) -> torch.Tensor:
        return cross_entropy(net(batch[0]), batch[1])

    first = loss(batches[0])
    first.backward()
    namespace |= {
        "DampingController": DampingController,
        "nn": nn,
        "model": net,
        "loss": loss,
        "optimizer": DiagonalFisher(net.parameters(), lr=0.1, damping=0.01),
        "batch": batches[0],
        "other_batch": batches[1],
        "loss_of_this_batch": first,
        "batches": list(itertools.pairwise(batches)),
    }


def end(namespace: dict[str, Any]) -> None:
    """Puts the environment back."""
    namespace["_patch"].undo()
    namespace["_directory"].cleanup()


def on_ranks(example: Any) -> None:
    """Runs a block in two processes."""
    code = compile("\n" * (example.line + example.parsed.line_offset) + str(example.parsed), example.path, "exec")
    namespace = example.namespace

    def run() -> None:
        exec(code, namespace)

    on_two_ranks(run, Path(namespace["_directory"].name))
