"""A model that can't be probed: the error names the operation and the way out, which works, and the training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Case, differences, train
from live_models import Classifier, tokens
from real_models import BagOfWords, gpt2, text
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature.errors import CurvatureError, SecondDerivativeError


class Square(torch.autograd.Function):
    """A user's own kernel, which can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class RawSquare(torch.autograd.Function):
    """The same without the mark, and a kernel that writes through a pointer, as Triton's and CUDA's do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found = torch.empty_like(gradient)
        with torch.no_grad():
            torch.mul(2 * ctx.saved_tensors[0], gradient, out=found)
        return found


@torch.library.custom_op("unprobeable::square", mutates_args=())
def library_square(x: Tensor) -> Tensor:
    """The same as an operator of a library, whose backward is one without a derivative."""
    return x * x


@torch.library.custom_op("unprobeable::square_backward", mutates_args=())
def library_square_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return 2 * x * gradient


library_square.register_autograd(
    lambda ctx, gradient: library_square_backward(ctx.saved_tensors[0], gradient),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class OwnKernel(nn.Module):
    def __init__(self, square: Any = Square.apply, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.square = square
        self.words = nn.Embedding(10, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), activation(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.square(self.words(x).mean(1)))


BAG = Case("EmbeddingBag and ReLU", lambda: Classifier(BagOfWords(nn.ReLU)), tokens)
KERNEL = Case("own kernel and ReLU", lambda: Classifier(OwnKernel()), tokens)
RAW = Case("raw kernel and ReLU", lambda: Classifier(OwnKernel(RawSquare.apply)), tokens)
LIBRARY = Case("a library's kernel and ReLU", lambda: Classifier(OwnKernel(library_square)), tokens)
REENTRANT = Case("reentrant checkpoint", lambda: gpt2(reentrant=True), text)


def without_bag(module: Classifier, batch: Any) -> Tensor:
    return F.cross_entropy(module.net.head(module.net.bag.weight[batch[0]].mean(1)), batch[1])


def without_kernel(module: Classifier, batch: Any) -> Tensor:
    hidden = module.net.words(batch[0]).mean(1)
    return F.cross_entropy(module.net.head(hidden * hidden), batch[1])


def outputs(module: Classifier, batch: Any) -> Any:
    return module(batch[0]), lambda logits: F.cross_entropy(logits, batch[1])


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(**{"every_n_steps": 6, "lanczos_steps": 10, "levels": None, "figures_every": 0, **options})


UNPROBEABLE = (
    (BAG, r"second derivative of _embedding_bag_backward, and finite differences.*without _embedding_bag.*loss_fn="),
    (KERNEL, r"second derivative of Square .*once_differentiable.*, and finite differences.*without Square.*loss_fn="),
    (RAW, r"derivative of RawSquare .*leaves autograd.*, and finite differences.*without RawSquare.*loss_fn="),
    (LIBRARY, r"derivative of unprobeable.square_backward, and finite differences.*without unprobeable.*loss_fn="),
    (REENTRANT, r"reentrant activation checkpoint.*use_reentrant=False"),
)


@pytest.mark.parametrize(("case", "words"), UNPROBEABLE, ids=lambda value: str(value)[:20])
def test_the_error_names_the_operation_and_the_way_out(case, words, tmp_path):
    control = train(case, tmp_path)
    watch = monitor()
    with pytest.warns(UserWarning, match=words) as caught:
        prints = train(case, tmp_path, watch)
    assert differences(prints, control) == []
    ours = [str(w.message) for w in caught if "SpectrumMonitor" in str(w.message)]
    assert len(ours) == 1  # of two probes
    assert "the training is unaffected" in ours[0]
    assert watch.history == []
    with pytest.raises(CurvatureError, match=words):
        train(case, tmp_path, monitor(on_error="raise"))


def test_parameters_in_a_reentrant_checkpoint_alone(tmp_path):
    """Autograd then doesn't even enter the checkpoint, and says nothing."""
    with pytest.raises(CurvatureError, match="use_reentrant=False"):
        train(REENTRANT, tmp_path, monitor(parameters=["*.attn.*"], on_error="raise"))


@pytest.mark.parametrize("options", [{"product": "exact"}, {"curvature": "ggn", "outputs_fn": outputs}])
def test_what_else_asks_for_second_derivatives(options, tmp_path):
    words = r"_embedding_bag_backward.*product=\"auto\".*curvature=\"gradient_covariance\""
    with pytest.raises(SecondDerivativeError, match=words):
        train(BAG, tmp_path, monitor(on_error="raise", **options))


@pytest.mark.parametrize("square", [RawSquare.apply, library_square], ids=["raw kernel", "a library's"])
def test_smooth_ones_are_probed_by_differences_which_are_right(square, tmp_path):
    """Taken for exact, the raw kernel's Hessian would lack a term."""
    found = []
    for kernel in (square, torch.square):
        watch = monitor(on_error="raise")
        case = Case(
            "kernel", lambda kernel=kernel: Classifier(OwnKernel(kernel, nn.Tanh)), tokens, ignore=("SpectrumMon",)
        )
        train(case, tmp_path / str(len(found)), watch)
        found.append(watch.reading)
    assert [reading.product for reading in found] == ["finite_difference", "exact"]
    assert found[0].spectrum.lambda_max.value == pytest.approx(found[1].spectrum.lambda_max.value, rel=2e-3)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (BAG, {"loss_fn": without_bag}),
        (BAG, {"curvature": "gradient_covariance"}),
        (KERNEL, {"loss_fn": without_kernel}),
        (KERNEL, {"curvature": "gradient_covariance"}),
        (RAW, {"loss_fn": without_kernel}),
        (Case("checkpoint", lambda: gpt2(reentrant=False), text), {}),
    ],
    ids=[
        "bag, loss",
        "bag, covariance",
        "kernel, loss",
        "kernel, covariance",
        "raw kernel, loss",
        "checkpoint that isn't reentrant",
    ],
)
def test_the_ways_out_work(case, options, tmp_path):
    watch = monitor(on_error="raise", **options)
    train(case, tmp_path, watch)
    assert [entry.step for entry in watch.history] == [0, 6]
    assert watch.reading.spectrum.lambda_max.value > 0.0
