"""Small networks with a loss, as data for every curvature test: a table of cases, and dense ground truths."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Pair = namedtuple("Pair", ["inputs", "target"])


@dataclasses.dataclass
class Case:
    """A model, its loss and its batches, with the number of samples in each batch."""

    model: nn.Module
    loss: Callable[[Any], Tensor]
    batches: list[Any]
    counts: list[int]
    smooth: bool = True

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def case(model, shape=(4,), classes=3, counts=(6,), loss=None, smooth=True, integers=0) -> Case:
    """A classification case in float64 with random data."""
    model = model.double()
    batches = []
    for count in counts:
        inputs = torch.randint(integers, (count, *shape)) if integers else torch.randn(count, *shape).double()
        batches.append((inputs, torch.randint(classes, (count,))))
    return Case(model, loss or (lambda batch: classify(model, batch)), batches, list(counts), smooth)


def mlp(activation=None, width=5):
    return nn.Sequential(nn.Linear(4, width), activation or nn.Tanh(), nn.Linear(width, 3))


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mean(1))


class Encoder(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation=activation, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, dropout=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout))
        self.second = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self.reentrant = reentrant

    def forward(self, x):
        h = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return self.head(self.second(h))


class CheckpointedAttention(Attention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.norm(self.embed(x)).mean(1))


class Partial(nn.Module):
    """With a frozen layer and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(torch.tanh(self.used(x)))))


def convolutional(norm, activation, pool=None):
    layers = [nn.Conv2d(1, 3, 3), norm(3), activation]
    return nn.Sequential(*layers, pool or nn.Identity(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.LazyLinear(3))


def image_case(norm=nn.BatchNorm2d, activation=None, pool=None, train=True, **kwargs) -> Case:
    model = convolutional(norm, activation or nn.Tanh(), pool)
    model(torch.randn(2, 1, 6, 6))  # sizes the lazy layer, and moves batch statistics away from 0 and 1
    return case(model.train(train), shape=(1, 6, 6), **kwargs)


def linear_loss_case() -> Case:
    """The loss is linear in the second layer's parameters, and not in the first's."""
    made = case(mlp())
    made.loss = lambda batch: made.model(batch[0]).mean()
    return made


def wholly_linear_case() -> Case:
    made = case(nn.Linear(4, 3))
    made.loss = lambda batch: made.model(batch[0]).mean()
    return made


def nested_case(kind: str) -> Case:
    made = case(mlp(), counts=(5, 2))

    @dataclasses.dataclass
    class Sample:
        scalar: Tensor
        inputs: Tensor
        target: Tensor

    wrap = {
        "dict": lambda x, y: {"meta": "text", "temperature": torch.tensor(1.0), "inputs": x, "target": y},
        "dataclass": lambda x, y: Sample(torch.tensor(1.0), x, y),
        "nested": lambda x, y: [{"inside": (None, [x])}, y],
        "named tuple": Pair,
    }[kind]
    unwrap = {
        "dict": lambda b: (b["inputs"], b["target"]),
        "dataclass": lambda b: (b.inputs, b.target),
        "nested": lambda b: (b[0]["inside"][1][0], b[1]),
        "named tuple": tuple,
    }[kind]
    made.batches = [wrap(*batch) for batch in made.batches]
    made.loss = lambda batch: classify(made.model, unwrap(batch))
    return made


CASES: dict[str, Callable[[], Case]] = {
    "mlp tanh": lambda: case(mlp()),
    "mlp relu": lambda: case(mlp(nn.ReLU()), smooth=False),
    "mlp inplace relu": lambda: case(mlp(nn.ReLU(inplace=True)), smooth=False),
    "mlp dropout": lambda: case(nn.Sequential(mlp(), nn.Tanh(), nn.Dropout(0.4), nn.Linear(3, 3))),
    "cnn batchnorm train": lambda: image_case(counts=(6, 4)),
    "cnn batchnorm eval": lambda: image_case(train=False),
    "cnn batchnorm relu": lambda: image_case(activation=nn.ReLU(), smooth=False),
    "cnn groupnorm gelu": lambda: image_case(lambda n: nn.GroupNorm(1, n), nn.GELU()),
    "cnn maxpool": lambda: image_case(pool=nn.MaxPool2d(2), smooth=False),
    "lstm": lambda: case(Recurrent(nn.LSTM), shape=(4, 3)),
    "gru": lambda: case(Recurrent(nn.GRU), shape=(4, 3)),
    "embedding layernorm": lambda: case(
        nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(12, 3)), shape=(4,), integers=5
    ),
    "sdpa": lambda: case(Attention(), shape=(3, 4)),
    "encoder gelu": lambda: case(Encoder("gelu"), shape=(3, 4)),
    "encoder relu": lambda: case(Encoder("relu"), shape=(3, 4), smooth=False),
    "checkpoint": lambda: case(Checkpointed(False)),
    "checkpoint dropout": lambda: case(Checkpointed(False, 0.3)),
    "checkpoint sdpa": lambda: case(CheckpointedAttention(), shape=(3, 4)),
    "tied": lambda: case(Tied(), shape=(4,), classes=6, integers=6),
    "frozen and unused": lambda: case(Partial()),
    "linear in some": linear_loss_case,
    "linear in all": wholly_linear_case,
    "uneven batches": lambda: case(mlp(), counts=(7, 1, 3)),
    "dict batch": lambda: nested_case("dict"),
    "dataclass batch": lambda: nested_case("dataclass"),
    "nested batch": lambda: nested_case("nested"),
    "named tuple batch": lambda: nested_case("named tuple"),
}


def build(name: str, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    made = CASES[name]()
    torch.manual_seed(seed + 1)  # so that a random loss draws the same in the operator and in its ground truth
    return made


def reseed(seed: int = 0) -> None:
    """Puts the generator where `build` left it."""
    torch.manual_seed(seed + 1)


def mean_loss(made: Case) -> Tensor:
    """The sample-weighted mean loss over the batches, written out."""
    return sum(n * made.loss(batch) for n, batch in zip(made.counts, made.batches, strict=True)) / sum(made.counts)


def dense_gradient(made: Case) -> Tensor:
    found = torch.autograd.grad(mean_loss(made), trainable(made), allow_unused=True)
    return flatten(made, found)


def dense_hessian(made: Case) -> Tensor:
    """Row by row from the definition, with zero rows for frozen and unused parameters."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        live = trainable(made)
        first = torch.autograd.grad(mean_loss(made), live, create_graph=True, allow_unused=True)
        gradient = flatten(made, first)
        rows = []
        for entry in gradient:
            second = (
                torch.autograd.grad(entry, live, retain_graph=True, allow_unused=True)
                if entry.requires_grad
                else [None] * len(live)
            )
            rows.append(flatten(made, second))
    return torch.stack(rows).detach()


def trainable(made: Case) -> list[Tensor]:
    return [p for p in made.parameters if p.requires_grad]


def flatten(made: Case, tensors) -> Tensor:
    given = iter(tensors)
    parts = []
    for p in made.parameters:
        tensor = next(given) if p.requires_grad else None
        parts.append(torch.zeros(p.numel(), dtype=p.dtype) if tensor is None else tensor.reshape(-1))
    return torch.cat(parts)


def functional_loss(made: Case) -> Callable[[Tensor], Tensor]:
    """The mean loss as a function of one flat vector, for torch.func."""
    named = dict(made.model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def loss_of(flat: Tensor) -> Tensor:
        values = {name: part.view(p.shape) for (name, p), part in zip(named.items(), flat.split(sizes), strict=True)}
        total = torch.zeros((), dtype=flat.dtype)
        for n, (inputs, target) in zip(made.counts, made.batches, strict=True):
            outputs = torch.func.functional_call(made.model, values, (inputs,))
            total = total + n * F.cross_entropy(outputs, target)
        return total / sum(made.counts)

    return loss_of


def flat_parameters(made: Case) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in made.parameters])
