"""The Hessian in less memory is the same matrix, or refused."""

from __future__ import annotations

import gc
import weakref

import curvature_cases as cases
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_rmt.curvature import fitting
from lightning_rmt.curvature.errors import GraphTooLargeError, NotAMeanError
from lightning_rmt.curvature.fitting import fitting_hessian, hessian_in_pieces
from lightning_rmt.curvature.graph_memory import SECOND_ORDER_GROWTH
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov.collectives import OtherRankFailedError

MEANS = ["mlp tanh", "cnn batchnorm eval", "lstm", "sdpa", "uneven batches", "tied", "frozen and unused", "checkpoint"]
NESTED = ["dict batch", "dataclass batch", "nested batch", "named tuple batch"]


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("name", MEANS + NESTED)
def test_in_pieces_it_is_the_same_matrix(name, samples):
    made = cases.build(name)
    whole = Hessian(made.loss, made.parameters, made.batches)
    pieces = hessian_in_pieces(made.loss, made.parameters, made.batches, samples)
    V = torch.randn(3, whole.size, dtype=whole.dtype)
    assert float((whole.matmat(V) - pieces.matmat(V)).norm()) <= 1e-12 * float(whole.matmat(V).norm() + 1)
    assert torch.allclose(whole.gradient, pieces.gradient, rtol=1e-11, atol=1e-14)
    assert pieces.loss_value == pytest.approx(whole.loss_value, rel=1e-12)
    assert pieces.samples == whole.samples
    assert pieces.used == whole.used
    assert pieces.graph_bytes() == 0 < whole.graph_bytes()


def test_weights_that_the_loss_returns_are_kept():
    """A mean over valid tokens can't be cut, unless the loss says how many there were."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double()
    y = torch.tensor([0, 1, -100, -100, -100, 3])

    def loss(batch):
        return cross_entropy(net(batch[0]), batch[1])

    def weighted(batch):
        valid = (batch[1] != -100).sum()
        return cross_entropy(net(batch[0]), batch[1], reduction="sum") / valid.clamp_min(1), valid.clamp_min(1e-9)

    with pytest.raises(NotAMeanError, match="valid tokens"):
        hessian_in_pieces(loss, net.parameters(), [(x, y)], 3)
    whole = Hessian(loss, net.parameters(), [(x, y)])
    pieces = hessian_in_pieces(weighted, net.parameters(), [(x, y)], 2)
    V = torch.randn(2, whole.size).double()
    torch.testing.assert_close(pieces.matmat(V), whole.matmat(V), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["cnn batchnorm train", "mlp dropout"])
def test_a_loss_that_mixes_samples_or_draws_is_refused(name):
    made = cases.build(name)
    with pytest.raises(NotAMeanError, match=r"batch normalisation in training mode, dropout.*finite differences"):
        hessian_in_pieces(made.loss, made.parameters, made.batches, 2)


def test_near_a_minimum_the_pieces_large_gradients_set_the_scale():
    """The whole gradient is a sum that nearly cancels: its rounding is not a different loss."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 1), torch.randn(64, 3), torch.randn(64, 1)
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(64, 1)], 1), y).solution
        net.weight.copy_(solution[:3].T)
        net.bias.copy_(solution[3])
    loss = lambda batch: nn.functional.mse_loss(net(batch[0]), batch[1])  # noqa: E731
    assert hessian_in_pieces(loss, net.parameters(), [(x, y)], 5).gradient.norm() < 1e-5


def rungs(limit_of):
    """What is chosen where the graphs may take ``limit_of`` the forecasts (largest batch, all batches)."""
    made = cases.build("uneven batches")
    batches = made.batches[::-1]  # 3, 1 and 7 samples
    whole = Hessian(made.loss, made.parameters, batches)
    found, words = fitting_hessian(made.loss, made.parameters, batches, limit_of(whole.graph_bytes()))
    V = torch.randn(2, whole.size, dtype=whole.dtype)
    assert torch.allclose(found.matmat(V), whole.matmat(V), rtol=1e-10, atol=1e-13)
    return words


def test_the_first_form_that_fits_is_taken():
    assert rungs(lambda kept: None) == ""
    assert rungs(lambda kept: 100 * kept) == ""
    assert rungs(lambda kept: int(1.95 * kept)).startswith("one batch's graph at a time")
    assert rungs(lambda kept: int(1.4 * kept)).startswith("pieces of 4 of 7 samples")
    tight = rungs(lambda kept: int(0.7 * kept))
    assert tight.startswith(("pieces of 2", "pieces of 1"))
    assert "because the second-order graphs take about" in tight
    with pytest.raises(GraphTooLargeError) as caught:
        rungs(lambda kept: 10)
    assert caught.value.limit == 10 < caught.value.needed


@pytest.mark.parametrize("name", ["cnn batchnorm train", "mlp dropout"])
def test_a_loss_that_cannot_be_cut_is_measured_on_fewer_samples(name):
    made = cases.build(name)
    kept = Hessian(made.loss, made.parameters, made.batches[:1]).graph_bytes()
    cases.reseed()
    found, words = fitting_hessian(made.loss, made.parameters, made.batches[:1], int(0.8 * kept))
    assert "samples only, because the second-order graphs take about" in words
    assert words.endswith("and the batches can't be cut")
    assert 0 < found.samples < made.counts[0]
    assert found.graph_bytes() <= 0.8 * kept


def test_the_limit_is_looked_at_before_the_graph_is_built(monkeypatch):
    made = cases.build("mlp tanh")
    built = []
    differentiate = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: built.append(1) or differentiate(*a, **k))
    with pytest.raises(GraphTooLargeError):
        Hessian(made.loss, made.parameters, made.batches, memory_limit=1)
    assert built == []
    assert SECOND_ORDER_GROWTH > 1


def test_frozen_weights_that_are_there_anyway_do_not_count():
    """A small adapter on a large frozen network."""
    torch.manual_seed(0)
    frozen, adapter = nn.Linear(300, 300), nn.Linear(300, 3)
    first = nn.Parameter(torch.zeros(300))
    frozen.requires_grad_(False)
    loss = lambda batch: cross_entropy(adapter(frozen(batch[0] + first).tanh()), batch[1])  # noqa: E731
    batch, trained = (torch.randn(8, 300), torch.randint(3, (8,))), [first, *adapter.parameters()]
    counted = Hessian(loss, trained, [batch]).graph_bytes()
    resident = Hessian(loss, trained, [batch], resident=frozen.parameters()).graph_bytes()
    assert counted - resident >= 4 * 300 * 300
    limit = 10 * resident
    assert fitting_hessian(loss, trained, [batch], limit, frozen.parameters())[1] == ""
    assert fitting_hessian(loss, trained, [batch], 4 * 300 * 300 * 8, frozen.parameters())[1] == ""


class PartOfGraph:
    pass


class Holds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, part):
        ctx.part = part
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(), None


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_an_attempt_held_is_gone_before_the_next(error, monkeypatch):
    torch.manual_seed(0)
    net, x, y = nn.Linear(3, 2).double(), torch.randn(8, 3).double(), torch.randint(2, (8,))
    parts: list[weakref.ref] = []
    alive = []

    def loss(batch):
        alive.append(sum(part() is not None for part in parts))
        part = PartOfGraph()
        parts.append(weakref.ref(part))
        value = cross_entropy(Holds.apply(net(batch[0]), part), batch[1])
        if len(batch[0]) == 8 and len(parts) == 1:
            raise error
        return value

    gc.collect()
    gc.disable()
    try:
        found, words = fitting_hessian(loss, net.parameters(), [(x, y)])
    finally:
        gc.enable()
    assert words == (
        "pieces of 4 of 8 samples, one piece's graph at a time, built anew in every product, because memory ran out while "
        "graphs were built"
    )
    assert max(alive) == 0
    assert found.samples == 8


def test_other_errors_are_not_tried_again():
    calls = []

    def loss(batch):
        calls.append(1)
        raise KeyError("no such key")

    with pytest.raises(KeyError):
        fitting_hessian(loss, [torch.ones(2, requires_grad=True)], [torch.ones(4)])
    assert calls == [1]


def test_pieces_without_weights_would_be_seen(monkeypatch):
    """The control: pieces of 4 and 3 samples that weigh the same are another matrix."""
    made = cases.build("uneven batches")
    monkeypatch.setattr("lightning_rmt.curvature.evaluation.sample_count", lambda batch: 1)
    with pytest.raises(NotAMeanError, match="the loss is another one"):
        hessian_in_pieces(made.loss, made.parameters, made.batches[:1], 4)
    assert fitting.hessian_in_pieces is hessian_in_pieces


@pytest.mark.parametrize("kind", ["a hidden state beside the batch", "a fixed number of samples"])
def test_a_batch_whose_pieces_do_not_work_is_measured_on_fewer_samples_or_says_that_memory_is_short(kind):
    """What goes wrong with a piece is no reason to give: whole batches work in training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    x, y = torch.randn(16, 3).double(), torch.randint(2, (16,))

    def loss(batch):
        if kind == "a fixed number of samples":
            return cross_entropy(net(batch[0]).view(16, 2), batch[1])
        return cross_entropy(net(batch[0]) + batch[2].sum(0)[: len(batch[0])], batch[1])

    batch = (x, y, torch.zeros(16, 16, 2).double())
    kept = Hessian(loss, net.parameters(), [batch]).graph_bytes()
    if kind == "a fixed number of samples":
        with pytest.raises(GraphTooLargeError) as caught:
            fitting_hessian(loss, net.parameters(), [batch], kept)
        assert "shape" in str(caught.value.__cause__)
        assert caught.value.__cause__ is not caught.value
    else:
        assert "samples" in fitting_hessian(loss, net.parameters(), [batch], kept)[1]


def test_ranks_take_every_attempt_together():
    """This rank has the memory, another one has not: both cut, and take the same number of passes."""
    made, told = cases.build("mlp tanh"), []

    def agree(verdict):
        told.append(verdict)
        return min(verdict, fitting.TOO_LARGE) if 2 < len(told) < 5 else verdict

    found, words = fitting_hessian(made.loss, made.parameters, made.batches[:1], None, (), agree)
    assert told == [made.counts[0], 1, *[fitting.FITS] * 3]  # samples, batches, and three attempts
    assert words.startswith("pieces of")
    assert words.endswith("because memory is short on another rank")
    assert found.graph_bytes() == 0


def test_another_rank_that_fails_outright_ends_it_here_too():
    made = cases.build("mlp tanh")
    with pytest.raises(OtherRankFailedError, match="another rank"):
        fitting_hessian(made.loss, made.parameters, made.batches, None, (), lambda verdict: fitting.FAILED)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_with_uneven_batches_have_ladders_of_one_length(count):
    """Where another rank's batch is smaller, this one gives up with it: nobody waits for an attempt that doesn't come."""
    made = cases.build("mlp tanh")
    calls, agreed = [], iter([count, 1])

    def agree(number):
        calls.append(number)
        return next(agreed, number)

    with pytest.raises(GraphTooLargeError):
        fitting_hessian(made.loss, made.parameters, made.batches[:1], 1, (), agree)
    assert len(calls) == 2 + {1: 1, 2: 2, 3: 3}[count]  # whole, and the halves of the smaller batch
