"""The data and the networks of long_run.py: Python's manual for a character GPT, shifted digits for a CNN."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator
from functools import cache

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import IterableDataset

CONTEXT, WIDTH, HEADS, LAYERS = 32, 48, 4, 2


@cache
def manual() -> tuple[Tensor, int]:
    """The characters as numbers, shape (characters,), and how many kinds there are; all but ASCII is left out."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    letters, tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).unique(return_inverse=True)
    return tokens, len(letters)


class Snippets(IterableDataset):
    """``steps`` batches of 32 snippets, each with the same one character later."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        text, _ = manual()
        random = torch.Generator().manual_seed(1)
        for _ in range(self.steps):
            starts = torch.randint(len(text) - CONTEXT, (32, 1), generator=random)
            snippets = text[starts + torch.arange(CONTEXT + 1)]
            yield snippets[:, :-1], snippets[:, 1:]


class ShiftedDigits(IterableDataset):
    """``steps`` batches of 64 digits, each batch shifted by up to a pixel and with a little noise."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        labels = torch.tensor(data.target)
        random = torch.Generator().manual_seed(1)
        for _ in range(self.steps):
            rows = torch.randint(len(labels), (64,), generator=random)
            down, right = torch.randint(-1, 2, (2,), generator=random).tolist()
            batch = torch.roll(images[rows], (down, right), (2, 3))
            yield batch + 0.3 * torch.randn(batch.shape, generator=random), labels[rows]


class Block(nn.Module):
    """Causal self-attention and two layers, each behind a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.attend_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attend_norm(x)).unflatten(-1, (3, HEADS, -1))  # (batch, place, 3, head, feature)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.join(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x))


class GPT(nn.Module):
    """The usual one, small: the next character from up to 32 before it."""

    def __init__(self) -> None:
        super().__init__()
        letters = manual()[1]
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)
        for embedding in (self.letter, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, snippets: Tensor) -> Tensor:
        x = self.letter(snippets) + self.place(torch.arange(snippets.shape[1]))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)  # (batch, letter, place), as cross_entropy wants it


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
    )


class Training(pl.LightningModule):
    """A network with a learning rate that warms up over a twentieth of the steps and then falls as a cosine."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        super().__init__()
        self.net, self.optimizer, self.steps = net, optimizer, steps
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())
        if batch_idx % 50 == 0:
            self.logger.log_metrics({"train_loss": float(outputs["loss"])}, self.global_step - 1)

    def configure_optimizers(self) -> dict[str, object]:
        warm = max(1, self.steps // 20)

        def factor(step: int) -> float:
            done = (step - warm) / max(1, self.steps - warm)
            return (step + 1) / warm if step < warm else 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
