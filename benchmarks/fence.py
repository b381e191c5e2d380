"""What the fence itself costs, in and out with nothing in between, around a ResNet-18 that a Trainer is training.

Run by hand: ``OMP_NUM_THREADS=1 python benchmarks/fence.py``. One thread; wall-clock and CPU time.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from itertools import pairwise
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from models import ResidualBlock
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt.live.fence import fence

TARGET = 2.0  # milliseconds


class ResNet18(pl.LightningModule):
    """He et al. 2016, table 1, for 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        blocks = [ResidualBlock(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, 1000)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores = self.head(self.blocks(self.stem(batch[0])).mean((2, 3)))
        loss = nn.functional.cross_entropy(scores, batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class TimesFence(pl.Callback):
    """Goes in and out where a monitor does. `first` is the fence that learns which parameters the step overwrites."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.first = 0.0
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for _ in range(self.repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            with fence(trainer, pl_module, seed=0):
                pass
            self.wall.append((time.perf_counter() - wall) * 1e3)
            self.cpu.append((time.process_time() - cpu) * 1e3)
        self.first = self.wall.pop(0)
        self.cpu.pop(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=500)
    times = TimesFence(parser.parse_args().repeats)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = ResNet18()
    data = TensorDataset(torch.randn(4, 3, 64, 64), torch.randint(1000, (4,)))
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(directory),
            callbacks=[times],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=4))
    parameters = sum(p.numel() for p in module.parameters())
    modules = sum(1 for _ in module.modules())
    print(f"ResNet-18: {parameters:,} parameters, {modules} modules; {platform.machine()}, torch {torch.__version__}")
    for name, values in (("wall-clock", times.wall), ("CPU", times.cpu)):
        print(
            f"{name:>10}: median {median(values):.2f} ms, min {min(values):.2f} ms, max {max(values):.2f} ms "
            f"({len(values)} times)"
        )
    print(f"first fence, which copies every parameter once: {times.first:.1f} ms")
    print(f"target: median below {TARGET:g} ms: {'met' if median(times.wall) < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
