"""What a controller takes: products, forward passes, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from newton_harness import NoisyQuadratic

from lightning_rmt import DampingController
from lightning_rmt.curvature.hessian import Hessian


class Counted:
    """A loss that counts its calls."""

    calls = 0

    def __init__(self, loss):
        self.loss = loss

    def __call__(self):
        Counted.calls += 1
        return self.loss()


@pytest.fixture
def products(monkeypatch):
    taken = []
    original = Hessian.matvec
    monkeypatch.setattr(Hessian, "matvec", lambda self, v: (taken.append(1), original(self, v))[1])
    return taken


@pytest.mark.parametrize("method", ["heldout", "two-part"])
def test_two_products_and_two_forward_passes_of_its_own_in_25_steps(products, method):
    problem = NoisyQuadratic(noise=1.0)
    control = DampingController(mode="control", method=method).attach(problem.optimizer)
    for step in range(101):
        own, other = problem.batch(), problem.batch()
        value = problem.backward(own)
        products.clear()
        Counted.calls, problem.optimizer.taken = 0, 0
        report = control.step(Counted(own), Counted(other), before=value)
        if step == 0:
            assert 2 <= len(products) <= 48
        elif step % 25 == 0:
            assert len(products) == 2  # each with a forward pass of its own
            assert Counted.calls - len(products) == 1  # the guard's
            assert problem.optimizer.taken == 1
        elif step < 25:  # the guard sees all of the first ones
            assert (len(products), Counted.calls, problem.optimizer.taken) == (0, 1, 1)
        else:
            assert (len(products), Counted.calls, problem.optimizer.taken) == (0, 0, 1)
            assert report is None
    # without the loss before the step the guard takes it itself
    own, other = problem.batch(), problem.batch()
    for _ in range(25):
        problem.backward(own)
        Counted.calls = 0
        control.step(Counted(own), Counted(other))
    assert Counted.calls in (0, 2 + 2)


def test_a_guard_on_every_step_is_one_forward_pass(products):
    problem = NoisyQuadratic()
    control = DampingController(mode="control", guard_steps="every").attach(problem.optimizer)
    for step in range(24):
        own, other = problem.batch(), problem.batch()
        value = problem.backward(own)
        products.clear()
        Counted.calls = 0
        control.step(Counted(own), Counted(other), before=value)
        assert step == 0 or (len(products), Counted.calls) == (0, 1)


def test_spread_over_the_first_steps_where_none_can_be_taken_again(products):
    problem = NoisyQuadratic(noise=1.0, damping=1e-4)
    control = DampingController(mode="control").attach(problem.optimizer)
    steps = 0
    while control.due and steps < 30:
        own, other = problem.batch(), problem.batch()
        problem.backward(own)
        control.before_step()
        problem.optimizer.step()
        control.after_step(own, other)
        steps += 1
    assert 2 <= steps <= 24
    assert len(products) <= 48
    problem.run(control, 200)  # each of the first steps is another batch, and one may be content by chance
    assert 0.2 < control.damping < 5
    # and through the hooks of torch, as a framework would
    again = NoisyQuadratic(noise=1.0, damping=1e-4)
    control = DampingController(mode="control").attach(again.optimizer)
    batches = {}
    again.optimizer.register_step_pre_hook(lambda *_: control.before_step())
    again.optimizer.register_step_post_hook(
        lambda *_: control.after_step(batches["own"], batches["other"], retake=again.optimizer.step)
    )
    batches |= {"own": again.batch(), "other": again.batch()}
    again.backward(batches["own"])
    again.optimizer.step()
    assert control.state_dict()["steps"] == 1
    assert not control.due
    assert control.damping > 0.1


def live_tensors():
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("method", ["heldout", "two-part"])
def test_200_probes_leave_no_tensors_behind(method):
    """T11."""
    problem = NoisyQuadratic(n=10)
    control = DampingController(mode="control", method=method, every=1, guard_steps="every").attach(problem.optimizer)
    problem.run(control, 5)
    before = live_tensors()
    problem.run(control, 200)
    assert control.state_dict()["products"] >= 400
    assert live_tensors() <= before
