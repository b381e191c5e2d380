"""A fused loss of the user's own, whose Hessian lacks a term: the first probe says so, once, and training never notices."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import Case, differences, train
from live_models import CLASSES, Classifier, vectors
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor


class FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(logits))
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


class Scaled(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: 0.5 * x)
    backward = staticmethod(lambda ctx, gradient: 0.5 * gradient)


class Fused(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return FusedCrossEntropy.apply(self(batch[0]), batch[1])


def made(kind: type[Classifier], activation: type[nn.Module]) -> Classifier:
    return kind(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), activation(), nn.Dropout(0.1), nn.Linear(8, CLASSES)))


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(
        **{"every_n_steps": 6, "lanczos_steps": 10, "levels": None, "figures_every": 0, "on_error": "raise", **options}
    )


@pytest.mark.parametrize(("product", "every"), [("auto", 6), ("exact", 6), ("auto", 100)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_a_fused_loss_is_warned_of_once(activation, product, every, tmp_path):
    case = Case("fused", lambda: made(Fused, activation), vectors)
    control = train(case, tmp_path)
    watch = monitor(product=product, every_n_steps=every)
    words = r"lack a term: a product differs by \d+%.*FusedCrossEntropy.*loss_fn=.*finite_difference"
    with pytest.warns(UserWarning, match=words) as caught:
        prints = train(case, tmp_path, watch)
    assert differences(prints, control) == []
    assert len([w for w in caught if "lack a term" in str(w.message)]) == 1
    noted = [note for note in watch.reading.notes if "FusedCrossEntropy" in note]
    assert len(noted) == (every == 100)  # of the last reading, which is the first probe's or the second's


def test_the_ways_out_work(tmp_path):
    def composed(module: Classifier, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    case = Case("fused", lambda: made(Fused, nn.Tanh), vectors)
    found = []
    for options in ({"loss_fn": composed}, {"product": "finite_difference"}):
        watch = monitor(every_n_steps=100, **options)
        train(case, tmp_path / str(len(found)), watch)  # warnings are errors
        found.append(watch.reading.spectrum.lambda_max.value)
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_only_the_first_probe_pays_and_only_for_functions_of_ones_own(tmp_path):
    counts = []
    for function in (lambda x: 0.5 * x, Scaled.apply):
        evaluations: Counter[int] = Counter()

        def loss(module: Classifier, batch: Any, function=function, evaluations=evaluations) -> Tensor:
            evaluations[module.global_step] += 1
            return F.cross_entropy(function(module(batch[0])), batch[1])

        watch = monitor(loss_fn=loss, batches=2)
        train(Case("counted", lambda: made(Classifier, nn.Tanh), vectors), tmp_path / str(len(counts)), watch)
        counts.append(evaluations)
    plain, own = counts
    first, second = sorted(plain)
    assert own[first] - plain[first] == 3 * 2
    assert own[second] == plain[second]
