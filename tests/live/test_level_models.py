"""Exact levels of modules that are hard to put into float64, or to differentiate, against their dense Hessians."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import Case, differences, train
from level_modules import Headed, Pooled, TinyGpt, agree, monitor, note, spied
from live_models import CLASSES, Classifier, Unlogged, images, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

HEAD = ["net.4.weight", "net.4.bias"]


@pytest.fixture(autouse=True)
def money_is_no_object(monkeypatch):
    monkeypatch.setattr("lightning_rmt.live.levels.TIME_SHARE", 1e6)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.head = nn.Linear(16, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:  # or torch warns that no gradient goes through
            x = x.detach().requires_grad_()
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


class Constants(nn.Module):
    """With tensors of its own making in the forward pass, of a fixed dtype and of the default one, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, CLASSES)
        self.scale = torch.linspace(0.5, 2, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x)) + torch.full((16,), 0.25, dtype=torch.float32) + torch.zeros(len(x), 1)
        return self.head(h * self.scale) @ torch.eye(CLASSES).to(h) + torch.tensor([0.5, 0.25, 0.0])


class FakeQuantised(nn.Module):
    """Integer weights with a scale, frozen, and a trained head: as adapters on quantised models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-7, 8, (16, 6), dtype=torch.int8))
        self.scales = nn.Parameter(torch.rand(16, 1).half() * 0.125, requires_grad=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype))))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)


class Twice(nn.Module):
    """One parameter under two names, in two modules, one of them transposed in use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12, bias=False), nn.Module()
        self.second.matrix = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)) @ self.second.matrix)


class LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(8, CLASSES)
        self.cell = parametrizations.weight_norm(nn.LSTM(6, 8, batch_first=True), "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embed(x))[0][:, -1])


MODELS = {
    "tied GPT, its head by the other name": (TinyGpt, tokens, "net.lm_head", ["net.wte.weight"]),
    "tied GPT, a layer": (TinyGpt, tokens, "net.blocks.1.out", ["net.blocks.1.out.weight", "net.blocks.1.out.bias"]),
    "checkpoint": (partial(Checkpointed, False), vectors, "net.body", ["net.body.0.weight", "net.body.0.bias"]),
    "constants": (Constants, vectors, "net.body", ["net.body.weight", "net.body.bias"]),
    "quantised and half": (FakeQuantised, vectors, "net.head", ["net.head.weight", "net.head.bias"]),
    "attention": (lambda: Pooled(Attending()), tokens, "*.in_proj_weight", ["net.layer.attention.in_proj_weight"]),
    "encoder": (lambda: Pooled(encoder()), tokens, "net.layer.linear2.weight", ["net.layer.linear2.weight"]),
    "encoder, evaluation": (lambda: Pooled(encoder().eval()), tokens, "net.embed", ["net.embed.weight"]),
    "twice": (Twice, vectors, "net.second.matrix", ["net.first.weight"]),
    "lstm, weight norm": (
        LastStep,
        tokens,
        "net.cell.parametrizations",
        ["net.cell.parametrizations.weight_hh_l0.original0", "net.cell.parametrizations.weight_hh_l0.original1"],
    ),
    "sparse embedding": (
        lambda: Pooled(nn.Tanh(), sparse=True),
        tokens,
        "net.embed",
        ["net.embed.weight"],
    ),
}


class Sgd(Classifier):
    """Without momentum, which sparse gradients have none of."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_the_block_is_the_dense_hessian_and_training_the_same(name, tmp_path):
    net, loader, pattern, names = MODELS[name]
    case = Case(name, lambda: Sgd(net()), loader, ignore=("Found .* in eval mode at the start of training",))
    watch = monitor(levels=[pattern])
    spy = spied(tmp_path, watch, case)
    agree(watch.reading.levels[0].eigenvalues, spy.levels(case.module(), watch.reading.step, names))
    assert differences(train(case, tmp_path, monitor(levels=[pattern])), train(case, tmp_path)) == []


def test_a_weight_with_a_largest_norm_is_taken_as_it_is(tmp_path):
    """Rescaling its rows is no part of the function that is differentiated."""
    case = Case("max norm", lambda: Sgd(Pooled(nn.Tanh(), max_norm=0.5)), tokens)
    watch = monitor(levels=["net.embed"])
    spy = spied(tmp_path, watch, case)
    agree(watch.reading.levels[0].eigenvalues, spy.levels(case.module(), watch.reading.step, ["net.embed.weight"]))
    assert differences(train(case, tmp_path, monitor(levels=["net.embed"])), train(case, tmp_path)) == []


def test_auto_takes_a_gpt_from_its_end_and_the_embedding_last(tmp_path):
    watch = monitor()
    train(Case("gpt", lambda: Sgd(TinyGpt()), tokens), tmp_path, watch)
    assert watch.reading.levels[0].name == "net.norm+net.blocks.1.mlp.2"


def test_the_head_beyond_a_reentrant_checkpoint(tmp_path):
    case = Case("reentrant", lambda: Sgd(Checkpointed(True)), vectors)
    watch = monitor(parameters=["net.head.*"])
    spy = spied(tmp_path, watch, case)
    block = watch.reading.levels[0]
    assert block.name == "net.head"
    agree(
        block.eigenvalues,
        spy.levels(Sgd(Checkpointed(False)), watch.reading.step, ["net.head.bias", "net.head.weight"]),
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_trainers_precision_is_none_of_the_blocks(precision, autocast, tmp_path):
    ignore = ("You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",)
    case = Case(precision, Headed, vectors, lambda: {"precision": precision}, ignore=ignore)
    watch = monitor(autocast=autocast)
    spy = spied(tmp_path, watch, case)
    agree(watch.reading.levels[0].eigenvalues, spy.levels(Headed(), watch.reading.step, HEAD[::-1]))
    assert differences(train(case, tmp_path, monitor(autocast=autocast)), train(case, tmp_path)) == []


@pytest.mark.parametrize("product", ["exact", "finite_difference"])
def test_a_compiled_module_is_seen_layer_by_layer(product, tmp_path):
    case = Case("compiled", lambda: Unlogged(Headed().net), vectors, compiled="aot_eager")
    control = train(case, tmp_path)
    watch = monitor(product=product)
    assert differences(train(case, tmp_path, watch), control) == []
    assert watch.reading.levels[0].name == "net.4"


class CastsItsLogits(Headed):
    """As language models do, so that the loss is in float32 under mixed precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_logits_in_float32_are_refused(tmp_path):
    case = Case("cast", CastsItsLogits, vectors)
    watch = monitor()
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert "the loss is computed in torch.float32 between the block and its value" in note(watch)


def test_a_penalty_on_a_list_of_parameters_is_refused(tmp_path):
    def penalised(module, batch):
        return F.cross_entropy(module(batch[0]), batch[1]) + sum(p.square().sum() for p in penalised.listed)

    class Lists(Headed):
        def __init__(self) -> None:
            super().__init__()
            penalised.listed = list(self.parameters())

    watch = monitor(loss_fn=penalised)
    train(Case("penalised", Lists, vectors), tmp_path, watch)
    assert "between the block" in note(watch) or "by another way" in note(watch)


def test_convolutions_and_batch_norm(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(128, CLASSES))
    case = Case("conv", lambda: Sgd(net), images)
    watch = monitor(levels=["net.[01]"])
    spy = spied(tmp_path, watch, case)
    names = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"]
    agree(watch.reading.levels[0].eigenvalues, spy.levels(case.module(), watch.reading.step, names))
