"""The four models of the benchmark, each with one fixed batch. Attention is written out, so that every library can
differentiate it twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Case(NamedTuple):
    """A model in evaluation mode (PyHessian switches to it anyway), its batch and its criterion."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    criterion: nn.Module

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, with n = 3 blocks per stage."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        blocks = [ResidualBlock(a, b, 2 if a != b else 1) for a, b in pairwise(widths)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.inputs(x).split(width, dim=2)
        )
        scores = q @ k.transpose(2, 3) * (width // self.heads) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(3) @ v
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 128, length: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, 4) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))
        return logits.flatten(0, 1)


class LSTM(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(tokens))[0]).flatten(0, 1)


def _case(name: str, model: nn.Module, x: Tensor, y: Tensor) -> Case:
    return Case(name, model.eval(), (x, y), nn.CrossEntropyLoss())


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return _case("MLP", model, torch.randn(256, 784), torch.randint(10, (256,)))


def trained_mlp() -> Case:
    """The MLP after 20 steps of SGD on ten noisy clusters, where nine eigenvalues stand apart."""
    case = mlp()
    torch.manual_seed(1)
    y = case.batch[1]
    x = 0.3 * torch.randn(10, 784)[y] + torch.randn(len(y), 784)
    optimizer = torch.optim.SGD(case.parameters, lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        case.loss((x, y)).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return case._replace(name="trained MLP", batch=(x, y))


def resnet() -> Case:
    torch.manual_seed(0)
    model, x = ResNet20(), torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        for _ in range(10):  # the running statistics become those of the data
            model(x)
    return _case("ResNet-20", model, x, torch.randint(10, (64,)))


def gpt() -> Case:
    torch.manual_seed(0)
    text = torch.randint(128, (8, 65))
    return _case("GPT", GPT(), text[:, :-1].contiguous(), text[:, 1:].reshape(-1))


def lstm() -> Case:
    torch.manual_seed(0)
    text = torch.randint(64, (16, 33))
    return _case("LSTM", LSTM(), text[:, :-1].contiguous(), text[:, 1:].reshape(-1))


CASES: dict[str, Callable[[], Case]] = {"mlp": mlp, "resnet": resnet, "gpt": gpt, "lstm": lstm}
DESCRIPTIONS = {
    "mlp": "784-256-256-10, ReLU, batch 256",
    "resnet": "ResNet-20, batch 64 of 3x32x32, BatchNorm in evaluation mode",
    "gpt": "4 layers, d = 128, 4 heads, 64 tokens, batch 8, attention written out",
    "lstm": "embedding 64x128, one LSTM layer of 128, head; 32 tokens, batch 16",
}
