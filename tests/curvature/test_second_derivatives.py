"""A user's function whose second derivative autograd gets wrong is told from those that it gets right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rmt import Hessian
from lightning_rmt.curvature.second_derivatives import check_second_derivatives
from lightning_rmt.krylov.lanczos import start_vector


class FusedCrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass and saved, as fused losses do."""

    @staticmethod
    def forward(ctx, logits, target):
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(target, logits.shape[1])) / len(logits))
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient, None


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        return SwishBackward.apply(*ctx.saved_tensors, gradient)


class SwishBackward(torch.autograd.Function):
    """By hand as well, and right."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(x, gradient)
        s = x.sigmoid()
        return gradient * (s + x * s * (1 - s))

    @staticmethod
    def backward(ctx, again):
        x, gradient = ctx.saved_tensors
        s = x.sigmoid()
        first, second = s + x * s * (1 - s), s * (1 - s) * (2 + x * (1 - 2 * s))
        return again * gradient * second, again * first


class OwnRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class Rounded(torch.autograd.Function):
    """Straight through."""

    forward = staticmethod(lambda ctx, x: (4 * x).round() / 4)
    backward = staticmethod(lambda ctx, gradient: gradient)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def made(activation, loss=F.cross_entropy, dtype=torch.float32, trained=False):
    """A network with BatchNorm and dropout, its loss, which counts its evaluations, and its batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(6, 16), nn.BatchNorm1d(16), activation, nn.Dropout(0.2), nn.Linear(16, 16), activation),
        nn.Linear(16, 3),
    ).to(dtype)
    batches = [(torch.randn(32, 6, dtype=dtype), torch.randint(3, (32,))) for _ in range(2)]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40 if trained else 0):
        optimizer.zero_grad()
        F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
    calls = []

    def value(batch):
        calls.append(1)
        return loss(net(batch[0]), batch[1])

    return net, value, batches, calls


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh(), Apply(Swish.apply)], ids=["tanh", "own swish"])
def test_a_fused_loss_lacks_a_term_and_by_how_much(activation, keep_graphs, trained):
    net, loss, batches, _ = made(activation, FusedCrossEntropy.apply, trained=trained)
    torch.manual_seed(1)
    H = Hessian(loss, net.named_parameters(), batches, keep_graphs=keep_graphs)
    found = check_second_derivatives(H, loss, batches)
    torch.manual_seed(1)
    true = Hessian(lambda b: F.cross_entropy(net(b[0]), b[1]), net.named_parameters(), batches)
    v = start_vector(H, 0)
    assert found.missing
    assert "FusedCrossEntropy" in found.functions
    assert found.mismatch == pytest.approx(
        float((H.matvec(v) - true.matvec(v)).norm() / true.matvec(v).norm()), abs=0.01
    )
    assert found.mismatch > 0.15
    assert found.error < 0.01
    assert H.products == 2


@pytest.mark.parametrize("trained", [False, True])
def test_above_the_kinks_of_relu_a_fused_loss_is_seen(trained):
    net, loss, batches, _ = made(nn.ReLU(), FusedCrossEntropy.apply, trained=trained)
    found = check_second_derivatives(Hessian(loss, net.named_parameters(), batches), loss, batches)
    assert found.missing


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [Swish, OwnRelu, Rounded])
def test_correct_kinked_and_straight_through_functions_are_not_warned_of(function, dtype, trained):
    net, loss, batches, _ = made(Apply(function.apply), dtype=dtype, trained=trained)
    H = Hessian(loss, net.named_parameters(), batches)
    found = check_second_derivatives(H, loss, batches)
    assert found.functions == (function.__name__,)
    assert not found.missing
    if function is Swish:
        assert not found.doubt
        assert found.mismatch < 0.01
    if function is Rounded:  # nothing was crossed in double precision: differences agree with each other and not with H
        assert ("gradient isn't that of the loss" if dtype == torch.float64 else "kinks") in found.doubt


def test_what_it_takes():
    """Nothing without a function of one's own; two gradients, one at the point, and a product with a correct one."""
    for activation, evaluations, products in ((nn.SiLU(), 0, 0), (Apply(Swish.apply), 3, 1)):
        net, loss, batches, calls = made(activation)
        H = Hessian(loss, net.named_parameters(), batches)
        before, state = len(calls), torch.get_rng_state()
        found = check_second_derivatives(H, loss, batches)
        assert (len(calls) - before, H.products) == (evaluations * len(batches), products)
        assert (found is None) == (evaluations == 0)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_another_one_every_time_is_left_alone():
    net, plain, batches, calls = made(nn.Tanh(), FusedCrossEntropy.apply)
    loss = lambda batch: plain(batch) * (1 + len(calls))  # noqa: E731
    found = check_second_derivatives(Hessian(loss, net.named_parameters(), batches), loss, batches)
    assert not found.missing
    assert "isn't the same function" in found.doubt


def test_ranks_take_the_same_stages_and_the_worst_verdict():
    """Here all is well, and another rank says what it found: nothing to begin with, then a difference of 57 %."""
    net, loss, batches, _ = made(Apply(Swish.apply))
    for others, missing, mismatch in (([1, 3, 3, 2, 2, 10**6 - 570], True, 0.57), ([1, 1], False, float("nan"))):
        H = Hessian(loss, net.named_parameters(), batches)
        waiting = iter(others)
        found = check_second_derivatives(H, loss, batches, lambda mine, waiting=waiting: min(mine, next(waiting)))
        assert list(waiting) == []
        assert found.missing is missing
        assert found.mismatch == pytest.approx(mismatch, nan_ok=True)
    assert found.doubt == "it failed on another rank"
