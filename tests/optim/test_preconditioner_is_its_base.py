"""T7: with rank 0, or before anything is measured, the optimizer is its base, bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from preconditioner_cases import BASES, batch, loss_of, network, preconditioned, same_weights, train

from lightning_rmt.curvature.hessian import Hessian


@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [0, "auto"])
def test_it_is_its_base_bit_for_bit(base, closures, rank):
    plain, wrapped = network(), network()
    optimizer = preconditioned(BASES[base](wrapped.parameters()), rank=rank)
    refresh_at = (10,) if rank == 0 else ()
    random = torch.get_rng_state()
    train(wrapped, optimizer, 50, refresh_at=refresh_at, closures=closures)
    assert torch.equal(random, torch.get_rng_state())
    reference = BASES[base](plain.parameters())
    train(plain, reference, 50, closures=closures)
    assert same_weights(plain, wrapped)
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert all(
        torch.equal(ours["state"][i][key], theirs["state"][i][key]) for i in range(4) for key in ours["state"][i]
    )
    assert optimizer.steps == 50


@pytest.mark.parametrize("base", BASES)
def test_a_refresh_makes_it_another(base):
    """So that the tests of identity are no tests of nothing."""
    plain, wrapped = network(), network()
    optimizer = preconditioned(BASES[base](wrapped.parameters()), rank="auto")
    train(wrapped, optimizer, 15, refresh_at=(10,))
    assert optimizer.active, optimizer.reason
    train(plain, BASES[base](plain.parameters()), 15)
    assert not same_weights(plain, wrapped)


def test_a_refresh_with_rank_0_takes_no_products():
    model = network()
    optimizer = preconditioned(BASES["sgd"](model.parameters()), rank=0)
    operator = Hessian(loss_of(model), model.parameters(), [batch(0)])
    assert optimizer.refresh(operator).rank == 0
    assert operator.products == 0
    assert not optimizer.due
    assert optimizer.reason == "the rank is 0"


def test_lbfgs_is_refused_and_works_with_rank_0():
    model, plain = network(), network()
    with pytest.raises(TypeError, match="LBFGS requires a closure"):
        preconditioned(torch.optim.LBFGS(model.parameters()))
    train(model, preconditioned(torch.optim.LBFGS(model.parameters()), rank=0), 3, closures=True)
    train(plain, torch.optim.LBFGS(plain.parameters()), 3, closures=True)
    assert same_weights(model, plain)


@pytest.mark.parametrize("base", BASES)
def test_with_and_without_closure_are_the_same_when_active(base):
    first, second = network(), network()
    train(first, preconditioned(BASES[base](first.parameters())), 20, refresh_at=(5, 15))
    train(second, preconditioned(BASES[base](second.parameters())), 20, refresh_at=(5, 15), closures=True)
    assert same_weights(first, second)


def test_the_closure_is_evaluated_once_and_its_value_returned():
    model = network()
    optimizer = preconditioned(BASES["sgd"](model.parameters()))
    train(model, optimizer, 1, refresh_at=(0,))
    assert optimizer.active
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = loss_of(model)(batch(7))
        value.backward()
        return value

    expected = loss_of(model)(batch(7))
    assert torch.equal(optimizer.step(closure), expected)
    assert calls == [True]


def test_weights_that_a_closure_changes_are_no_part_of_the_step():
    model = network()
    optimizer = preconditioned(torch.optim.SGD(model.parameters(), lr=0.0))
    train(model, optimizer, 1, refresh_at=(0,))
    assert optimizer.active
    expected = [p.detach() * 0.5 for p in model.parameters()]

    def closure():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
                p.grad = torch.ones_like(p)

    optimizer.step(closure)
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original(copied):
    model = network()
    optimizer = preconditioned(BASES["adamw"](model.parameters()))
    train(model, optimizer, 12, refresh_at=(5,))
    assert optimizer.active
    model2, optimizer2 = copied((model, optimizer))
    assert optimizer2.param_groups is optimizer2.base.param_groups
    train(model, optimizer, 10, start=12, refresh_at=(15,))
    train(model2, optimizer2, 10, start=12, refresh_at=(15,))
    assert same_weights(model, model2)
    optimizer2.base.load_state_dict(optimizer.base.state_dict())
    assert optimizer2.param_groups is optimizer2.base.param_groups
    assert optimizer2.state is optimizer2.base.state


def test_wrong_arguments_are_explained():
    model = network()
    base = BASES["sgd"](model.parameters())
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential"):
        preconditioned(model)
    with pytest.raises(ValueError, match="rank must be 'auto' or a number"):
        preconditioned(base, rank=-1)
    with pytest.raises(ValueError, match="rank must be 'auto' or a number"):
        preconditioned(base, rank="all")
    with pytest.raises(ValueError, match=r"must be at least 1, got 0, 200 and 1\.0"):
        preconditioned(base, max_rank=0)
    with pytest.raises(ValueError, match="metric must be one of"):
        preconditioned(base, metric="euclid")
    with pytest.raises(ValueError, match=r"metric='adam' needs an Adam as base.*got SGD"):
        preconditioned(base, metric="adam")
    optimizer = preconditioned(base, damping=lambda step: -1.0)
    train(model, optimizer, 1, refresh_at=())
    optimizer.refresh(Hessian(loss_of(model), model.parameters(), [batch(0)]))
    with pytest.raises(ValueError, match="damping must be finite and at least 0, got -1"):
        optimizer.step()
