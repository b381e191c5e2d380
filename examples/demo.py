"""Watch the curvature of a small convolutional net (BatchNorm, Dropout) while it learns scikit-learn's digits.

    python examples/demo.py [--epochs 650] [--output demo_output]

One line of it is about the monitor: ``callbacks=[SpectrumMonitor(...)]``.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_rmt import SpectrumMonitor
from lightning_rmt.__main__ import main as lightning_rmt


class DigitsNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 4 * 4, 10)),
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)  # plain, so that lambda_max can be held against 2/lr


class ShiftedDigits(Dataset):
    """scikit-learn's 8 x 8 digits, shifted by up to one pixel and with a little noise, anew every time."""

    def __init__(self) -> None:
        data = load_digits()
        self.images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        self.labels = torch.tensor(data.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        image = torch.roll(self.images[index], (down, right), (1, 2))
        return image + 0.2 * torch.randn(image.shape), self.labels[index]


def train(output: Path, epochs: int, monitor: SpectrumMonitor | None, seconds: int = 90) -> pl.Trainer:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    pl.seed_everything(0)
    torch.set_num_threads(1)  # for a network this small, more threads only wait for each other
    trainer = pl.Trainer(
        max_epochs=epochs,
        max_time={"seconds": seconds},  # on a slow machine
        accelerator="cpu",
        default_root_dir=output,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[monitor] if monitor is not None else [],
    )
    trainer.fit(DigitsNet(), DataLoader(ShiftedDigits(), batch_size=64, shuffle=True))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=650)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    # 0.2 of a minute and a half: leave the default 0.05 in a real training
    trainer = train(args.output, args.epochs, SpectrumMonitor(max_overhead=0.2, custom_scalars=True))

    print()
    lightning_rmt(["plot", trainer.log_dir, "--output", str(args.output)])
    print(f"\nNow look at it:  tensorboard --logdir {args.output / 'lightning_logs'}")


if __name__ == "__main__":
    main()
