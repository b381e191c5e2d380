"""Where successive losses are said to rise, and what the controller does then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from newton_harness import NoisyQuadratic

from lightning_rmt import DampingController
from lightning_rmt.optim.rise import WINDOW, LossRise


def watch(losses, factor=1.5, first=0):
    """The first step that is said to have risen, and the one that it is to go back to; steps stand for themselves."""
    rise = LossRise(factor)
    for step, loss in enumerate(losses, first):
        found = rise.see(step, float(loss), step)
        if found is not None:
            assert found[0] == found[1]
            return step, found[0]
    return None


def test_a_rise_goes_back_to_where_the_mean_was_lowest():
    falling = [2.0, 1.8, 1.6, 1.4, 1.2, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    step, back = watch([*falling, *(1.2**k for k in range(1, 15))])
    assert back == 8  # four losses of 1.0 end there
    assert 1.2 ** (step - 10) < 4


def test_it_takes_the_factor():
    assert watch([1.0] * 10 + [1.4] * 10) is None
    assert watch([1.0] * 10 + [1.6] * 10) is not None
    assert watch([1.0] * 10 + [1.6] * 10, factor=1.7) is None


def test_a_negative_loss_rises_by_its_size():
    assert watch([-4.0] * 10 + [-2.5] * 10) is None
    assert watch([-4.0] * 10 + [-0.5] * 10) is not None


def test_losses_that_fall_never_rise():
    assert watch(np.exp(-np.linspace(0, 8, 200))) is None


# what the docstring of SIGNIFICANT says; 1000 stretches: three standard errors of 5 % are 2.1 %
@pytest.mark.parametrize(("scatter", "most"), [(0.1, 0.0), (0.3, 0.07), (0.5, 0.05), (1.0, 0.03)])
def test_scatter_alone_is_seldom_a_rise(scatter, most):
    random = np.random.default_rng(0)
    sigma = math.sqrt(math.log(1 + scatter**2))
    called = [watch(np.exp(sigma * random.standard_normal(25))) is not None for _ in range(1000)]
    assert np.mean(called) <= most


def test_a_rise_by_four_is_found_in_such_scatter():
    # the level of a loss quadruples within ten batches, with a scatter of .3
    random = np.random.default_rng(0)
    level = np.concatenate([np.ones(10), 4 ** (np.arange(1, 11) / 10), np.full(5, 4.0)])
    found = [watch(level * np.exp(0.3 * random.standard_normal(25))) is not None for _ in range(500)]
    assert np.mean(found) > 0.9


def test_one_bad_batch_is_not_a_rise_and_many_are():
    assert watch([1.0] * 8 + [math.nan] + [1.0] * 8) is None
    assert watch([1.0] * 8 + [math.inf] * (WINDOW - 1)) is None
    assert watch([1.0] * 8 + [math.inf] * WINDOW) == (8 + WINDOW - 1, WINDOW - 1)


def test_a_gap_starts_it_anew():
    rise = LossRise(1.5)
    for step in range(10):
        assert rise.see(step, 1.0, step) is None
    for step in range(11, 31):
        assert rise.see(step, 10.0, step) is None


class Rising:
    """A quadratic whose batches' losses are what the test says, by a constant that no gradient knows.

    It belongs to the weights that a step starts from, so that it is known when they come back; or with ``by_data`` to the
    batch, whatever the weights.
    """

    def __init__(self, levels, by_data=False):
        self.problem = NoisyQuadratic(6, noise=0.01, momentum=0.5, lr=0.01)
        self.levels = iter(levels)
        self.of_weights = {}
        self.by_data = by_data

    def here(self):
        return self.problem.x.detach().numpy().tobytes()

    def step(self, control):
        own, other, level = self.problem.batch(), self.problem.batch(), next(self.levels)
        base = float(own().detach())
        if not self.by_data:
            self.of_weights[self.here()] = level
        self.problem.backward(own)
        return control.step(lambda: own() - base + self.of_weights.get(self.here(), level), other, before=level)


def controller(**options):
    return DampingController(mode="control", init=1.0, search=False, deadband=(1e-9, 1e9), **options)


def test_weights_and_momentum_go_back_and_the_learning_rate_does_not():
    problem = Rising([1.0] * 10 + [4.0] * 10)
    control = controller().attach(problem.problem.optimizer)
    group, p = problem.problem.optimizer.param_groups[0], problem.problem.x
    starts = []
    for step in range(20):
        group["lr"] = 0.01 / (1 + step)
        entry = problem.problem.optimizer.state[p]
        starts.append((p.detach().clone(), entry["momentum_buffer"].clone() if entry else None))
        report = problem.step(control)
        if report.rejected:
            break
    assert report.undone == step - WINDOW + 2  # the first four losses are the lowest, and not lower than the next ones
    weights, momentum = starts[step + 1 - report.undone]
    assert torch.equal(p, weights)
    assert torch.equal(problem.problem.optimizer.state[p]["momentum_buffer"], momentum / 2)
    assert group["lr"] == 0.01 / (1 + step)
    assert control.damping == pytest.approx(4.0)
    assert control.state_dict()["rejections"] == 1
    assert control.state_dict()["guarded_until"] == step + 1 + 25


@pytest.mark.parametrize(
    "levels", [[100.0, 100, 100, 100, 100, 100, 300, 300, 300, 300, 300, 300] * 4, [20 * 1.08**t for t in range(48)]]
)
def test_batches_that_become_harder_are_no_rise(levels):
    # blocks of easy and hard batches, and a curriculum: no weights have a smaller loss on these
    problem = Rising(levels, by_data=True)
    control = controller().attach(problem.problem.optimizer)
    for _ in levels:
        problem.step(control)
    assert control.state_dict()["rejections"] == 0
    assert control.damping == 1.0


def test_the_weights_of_then_are_let_go_when_it_no_longer_watches():
    problem = Rising([1.0] * 40)
    control = controller(every=10, guard_steps="every").attach(problem.problem.optimizer)
    kept = []
    for _ in range(13):
        problem.step(control)
        kept.append(control._knob.rise._lowest is not None)
    assert kept == [WINDOW <= step + 1 <= 10 for step in range(13)]


@pytest.mark.parametrize("options", [{"rewind": None}, {"guard": None}])
def test_it_can_be_turned_off(options):
    problem = Rising([1.0] * 10 + [4.0] * 14)
    control = controller(**options).attach(problem.problem.optimizer)
    for _ in range(24):
        problem.step(control)
    assert control.state_dict()["rejections"] == 0
    assert control.damping == 1.0


@pytest.mark.parametrize("guard_steps", ["probe", "every"])
def test_it_watches_only_while_the_run_is_young(guard_steps):
    problem = Rising([1.0] * 35 + [4.0] * 30)
    control = controller(guard_steps=guard_steps).attach(problem.problem.optimizer)
    for _ in range(65):
        problem.step(control)
    assert control.state_dict()["rejections"] == 0


def test_what_was_seen_before_a_checkpoint_is_forgotten():
    # the weights of then aren't in the checkpoint
    problem = Rising([1.0] * 10 + [4.0] * 10)
    control = controller().attach(problem.problem.optimizer)
    for _ in range(10):
        problem.step(control)
    control.load_state_dict(control.state_dict())
    for _ in range(10):
        problem.step(control)
    assert control.state_dict()["rejections"] == 0


def test_the_factor_is_checked():
    with pytest.raises(ValueError, match="rewind is a factor above 1, got 1"):
        DampingController(rewind=1.0)
