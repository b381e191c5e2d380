from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lightning_rmt.curvature.graph_memory import SECOND_ORDER_GROWTH, graph_bytes


def test_bytes_of_a_small_network_are_those_counted_by_hand():
    """Twice a linear layer with tanh, float64, batch of 5: what its backward pass needs."""
    first, second = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = first(x).tanh()  # saves x for the weight, tanh's result for itself and for the second layer
    loss = second(hidden).pow(2).sum()  # saves the outputs; the weights are there anyway
    parameters = [*first.parameters(), *second.parameters()]
    assert graph_bytes([loss], parameters) == 8 * (5 * 4 + 5 * 3 + 5 * 2)
    assert graph_bytes([loss], [*parameters, x]) == 8 * (5 * 3 + 5 * 2)
    assert graph_bytes([loss, hidden], parameters) == graph_bytes([loss], parameters)  # each storage once
    assert graph_bytes([loss], []) == 8 * (5 * 4 + 5 * 3 + 5 * 2 + 3 * 2)  # the second layer's weight
    assert graph_bytes([x]) == 0


def test_a_freed_graph_holds_nothing():
    x = torch.randn(3, requires_grad=True)
    loss = x.sin().sum()
    assert graph_bytes([loss]) == 12  # sin saves its input
    assert graph_bytes([loss], [x]) == 0
    loss.backward()
    assert graph_bytes([loss]) == 0


def test_checkpoints_are_not_run_again():
    calls = []

    def block(x):
        calls.append(1)
        return x.sin().cos().exp()

    x = torch.randn(100, requires_grad=True)
    y = checkpoint(block, x * 2, use_reentrant=False).sum()
    with_checkpoint, without = graph_bytes([y]), graph_bytes([block(x * 2).sum()])
    assert calls == [1, 1]
    assert with_checkpoint < 400 < 3 * 400 <= without < 3 * 400 + 16  # and a scalar


def test_a_function_of_ones_own():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x * 1
            ctx.save_for_backward(kept)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient * ctx.saved_tensors[0]

    assert graph_bytes([Square.apply(torch.randn(10, requires_grad=True)).sum()]) == 40


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(16 * 16 * 16, 10),
    )  # fmt: skip


def test_bytes_are_what_the_allocator_hands_out():
    torch.manual_seed(0)
    model, x, y = network(), torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    nn.functional.cross_entropy(model(x), y)  # warm up
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = nn.functional.cross_entropy(model(x), y)
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert graph_bytes([loss], [*model.parameters(), x]) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("training", [True, False])
def test_the_second_order_graph_is_foreseen(training):
    model, x, y = network().train(training), torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    first = graph_bytes([loss], parameters)
    second = graph_bytes(torch.autograd.grad(loss, parameters, create_graph=True), parameters)
    assert first < second < SECOND_ORDER_GROWTH * first
