"""Saddles, NaN, others who set the damping, and all that a controller refuses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from newton_harness import DampedNewton, NoisyQuadratic, goe_spectrum, positive_spectrum
from torch import nn

from lightning_rmt import DampingController


def controller(**options):
    return DampingController(**{"mode": "control", "every": 5, **options})


def everything(problem):
    """Weights and optimizer state, copied."""
    return [problem.x.detach().clone(), {k: v.clone() for k, v in problem.optimizer.state[problem.x].items()}]


# --- the saddle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1e-6, 1e-2, 1.0])
def test_it_leaves_a_saddle(start):
    """T10."""
    p = nn.Parameter(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    optimizer = DampedNewton([p], damping=start)

    def loss():
        x, y = p
        return x**2 / 2 - y**2 / 2 + y**4 / 4

    control = controller(guard_steps="every", every=2).attach(optimizer)
    optimizer.loss = loss
    for _ in range(150):
        optimizer.zero_grad()
        loss().backward()
        control.step(loss, loss)
        assert 1e-8 <= control.damping <= 1e3
        assert torch.isfinite(p).all()
    assert loss().item() == pytest.approx(-0.25, abs=1e-3)


def test_a_step_uphill_had_too_small_a_damping():
    p = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = DampedNewton([p], damping=1e-3)
    optimizer.loss = lambda: -(p[0] ** 2) / 2 + p[0] ** 4 / 400
    optimizer.loss().backward()
    report = controller(guard=None).attach(optimizer).step(optimizer.loss, optimizer.loss)
    assert report.refused is None
    # r = -1 / (damping - 1)
    assert report.damping == pytest.approx(2, rel=0.01)
    assert p.item() == pytest.approx(0.2, rel=0.01)


def test_momentum_that_goes_uphill_says_nothing():
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.NAdam([p], lr=0.1)  # whose momentum can't be taken out
    control = DampingController("eps", every=1).attach(optimizer)
    for target in (0.0, 0.95):
        optimizer.zero_grad()
        (10 * (p[0] - target) ** 2).backward()

        def loss(target=target):
            return 10 * (p[0] - target) ** 2

        report = control.step(loss, loss)
    assert "momentum outweighs the gradient" in report.refused


def test_negative_curvature_never_shrinks_the_damping_by_more_than_max_change():
    p = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = DampedNewton([p], damping=3.0)
    control = controller(every=1, guard=None).attach(optimizer)

    def loss():
        return -(p[0] ** 2)

    optimizer.loss = loss
    before = control.damping
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        control.step(loss, loss)
        assert control.damping >= before / 2
        before = control.damping
    assert math.isfinite(before)


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisoned", ["all", "loss only"])
@pytest.mark.parametrize("step", [0, 1, 10])
def test_a_nan_batch_leaves_no_trace_but_a_higher_damping(step, poisoned):
    """T10."""
    problem = NoisyQuadratic(momentum=0.9)
    control = controller(guard_steps="every").attach(problem.optimizer)
    problem.run(control, step)
    before, damping = everything(problem), control.damping
    own, other = problem.batch(), problem.batch()
    problem.backward(own)

    def nan():
        return own() * float("nan")

    if poisoned == "all":
        problem.backward(nan)
    report = control.step(nan, other, before=float("nan") if poisoned == "all" else None)
    assert report.rejected
    assert torch.equal(problem.x, before[0])
    assert control.damping > damping
    if step:
        assert control.damping == pytest.approx(4 * damping)
        assert torch.equal(problem.optimizer.state[problem.x]["momentum_buffer"], before[1]["momentum_buffer"] / 2)
    else:
        assert "momentum_buffer" not in problem.optimizer.state[problem.x]
    assert all(math.isfinite(v) for v in control.state_dict().values() if isinstance(v, float))
    assert all(math.isfinite(d) for d in problem.run(control, 10))
    assert torch.isfinite(problem.x).all()


def test_a_step_that_goes_too_far_is_undone_bit_for_bit():
    problem = NoisyQuadratic(momentum=0.5)
    control = controller(guard_steps="every").attach(problem.optimizer)
    problem.run(control, 7)
    before, damping = everything(problem), control.damping
    own = problem.batch()
    problem.backward(own)
    problem.optimizer.param_groups[0]["lr"] = 50.0
    report = control.step(own, problem.batch())
    assert report.rejected
    assert report.rejections == 1
    assert torch.equal(problem.x, before[0])
    assert torch.equal(problem.optimizer.state[problem.x]["momentum_buffer"], before[1]["momentum_buffer"] / 2)
    assert control.damping == pytest.approx(4 * damping)


def test_the_guard_may_rise_from_a_negative_loss():
    problem = NoisyQuadratic()
    control = controller(guard_steps="every").attach(problem.optimizer)
    problem.run(control, 30)
    assert problem.batch()().item() < 0
    assert control.state_dict()["rejections"] == 0


def test_without_a_guard_nothing_is_undone():
    problem = NoisyQuadratic()
    control = controller(guard=None).attach(problem.optimizer)
    problem.run(control, 1)
    problem.optimizer.param_groups[0]["lr"] = 50.0
    before = problem.x.detach().clone()
    problem.run(control, 6)
    assert control.state_dict()["rejections"] == 0
    assert (problem.x - before).norm() > 1e3


# --- others who set it ------------------------------------------------------------------------------------------------


def test_a_scheduler_wins_with_one_warning():
    """T12."""
    problem = NoisyQuadratic()
    control = controller(every=1).attach(problem.optimizer)
    problem.run(control, 2)
    group = problem.optimizer.param_groups[0]
    group["damping"] = 0.5
    with pytest.warns(RuntimeWarning, match=r"a scheduler or a callback changes it too") as caught:
        problem.run(control, 3)
    assert len(caught) == 1
    for value in (0.25, 0.125):  # any further warning would be an error
        group["damping"] = value
        problem.run(control, 3)
        assert control.damping == group["damping"] == value
    assert control.mode == control.report.mode == "log"
    assert control.report.ratio is not None


def test_a_scheduler_that_is_only_watched_gets_no_warning():
    problem = NoisyQuadratic()
    control = DampingController(every=1).attach(problem.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.run(control, 2)
        problem.optimizer.param_groups[0]["damping"] = 0.5
        problem.run(control, 2)
    assert control.report.damping == 0.5


# --- no noise ---------------------------------------------------------------------------------------------------------


def test_without_noise_the_trust_part_is_left():
    problem = NoisyQuadratic(noise=0.0, damping=1.0)
    control = controller(every=1, guard_steps="every").attach(problem.optimizer)
    control.update(positive_spectrum(), 0.0)
    assert control.damping == 1.0  # the closed form gives 0: nothing to start from
    dampings = problem.run(control, 12)
    assert control.report.ratio is None
    # a quadratic, so the model is right, and the damping falls
    assert dampings[:3] == pytest.approx([0.5, 0.25, 0.125])
    assert all(d > 0 for d in dampings)
    assert (problem.A @ problem.x - problem.b).norm().item() < 1e-6


def test_a_batch_without_noise_is_seen_where_the_spectrum_has_some():
    """An epoch accumulated into one step, and the spectrum on one batch of it."""
    problem = NoisyQuadratic(noise=0.0, damping=1.0)
    control = controller(every=1, guard_steps="every").attach(problem.optimizer)
    with pytest.raises(ValueError, match=r"more than the 0 .*SpectrumMonitor\(batches="):
        control.update(positive_spectrum(), 0.0, spectrum_noise=0.5)
    assert problem.run(control, 3) == pytest.approx([0.5, 0.25, 0.125])
    assert control.report.ratio is None


def test_the_trust_part_grows_where_the_model_is_wrong():
    p = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = DampedNewton([p], damping=1e-3)
    control = controller(every=1, method="two-part").attach(optimizer)

    def loss():  # Newton's step goes from p to -p^3
        return torch.sqrt(1 + p[0] ** 2)

    optimizer.loss = loss
    reductions, dampings, rejections = [], [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        report = control.step(loss)
        reductions.append(report.reduction)
        dampings.append(report.damping)
        rejections.append(report.rejected)
    assert reductions[0] < 0
    assert rejections[0]
    assert dampings[0] == pytest.approx(4e-3)
    assert max(dampings) > 0.1
    assert abs(p.item()) < 1e-2


def test_the_trust_part_is_a_floor():
    problem = NoisyQuadratic(noise=1.0)
    control = controller(every=1, method="two-part").attach(problem.optimizer)
    problem.run(control, 5)
    assert control.report.ratio is not None
    assert control.report.own_ratio is None
    assert control.report.reduction == pytest.approx(1, rel=1e-6)  # any batch's loss is quadratic
    assert control.state_dict()["trust"] == 1e-8


def test_the_trust_part_needs_the_loss():
    problem = NoisyQuadratic()
    control = DampingController(method="two-part").attach(problem.optimizer)
    problem.backward(problem.batch())
    assert "pass it as loss" in control.step(None, problem.batch()).refused


# --- refused for one step ---------------------------------------------------------------------------------------------


def refusal(problem, **options):
    control = controller(guard=None).attach(problem.optimizer)
    own = problem.batch()
    problem.backward(own)
    before = control.damping
    report = control.step(own, **{"held_out": problem.batch(), **options})
    assert report.ratio is None
    assert control.damping == before
    return report.refused


def test_no_independent_batch():
    assert "independent batch" in refusal(NoisyQuadratic(), held_out=None)


def test_steps_that_are_undone_with_the_largest_damping_are_said_once():
    problem = NoisyQuadratic(6, lr=0.1)
    control = controller(init=10.0, bounds=(1e-3, 20.0), search=False).attach(problem.optimizer)
    own = problem.batch()

    def worse():
        return own() + 100.0  # than what is said of before

    def run():
        for _ in range(6):
            problem.backward(own)
            control.step(worse, problem.batch(), before=1.0)

    with pytest.warns(RuntimeWarning, match="the largest that its bounds allow") as said:
        run()
    assert len(said) == 1
    assert control.report.rejections >= 4


def test_no_learning_rate():
    assert "learning rate is 0" in refusal(NoisyQuadratic(lr=0.0))


def test_gradients_gone():
    problem = NoisyQuadratic()

    def take():
        problem.optimizer.step()

    control = controller(guard=None).attach(problem.optimizer)
    own = problem.batch()
    problem.backward(own)
    control.before_step()
    take()
    problem.x.grad = None
    assert "before zero_grad()" in control.after_step(own, own).refused


def test_a_gradient_that_is_not_finite():
    problem = NoisyQuadratic()
    control = controller(guard=None).attach(problem.optimizer)
    own = problem.batch()
    problem.backward(own)
    problem.x.grad[3] = float("nan")
    assert "isn't finite" in control.step(own, own).refused


def test_sparse_gradients():
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)

    def loss():
        return (table(torch.tensor([0, 2])) ** 2).sum()

    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    optimizer.param_groups[0]["damping"] = 0.25
    control = controller(guard_steps="every").attach(optimizer)
    before = table.weight.detach().clone()
    loss().backward()
    report = control.step(loss, loss)
    assert "sparse" in report.refused
    assert control.damping == 0.25
    assert not torch.equal(table.weight, before)  # the step itself stands


def test_a_loss_without_second_derivative():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    problem = NoisyQuadratic()
    assert "no second derivative" in refusal(problem, held_out=lambda: Once.apply(problem.x).sum())


def test_a_number_that_the_optimizer_does_not_use():
    problem = NoisyQuadratic()
    sgd = torch.optim.SGD([problem.x], lr=1e-3)
    sgd.param_groups[0]["damping"] = 0.5
    control = controller().attach(sgd)
    own = problem.batch()
    problem.backward(own)
    report = control.step(own, problem.batch())
    assert "doesn't use this number" in report.refused
    assert control.damping == sgd.param_groups[0]["damping"] == 0.5
    assert not report.rejected


# --- refused for good -------------------------------------------------------------------------------------------------


def test_an_optimizer_without_damping():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"AdamW has no damping under a name that is known .*have .*eps.*Pass target="):
        controller().attach(optimizer)
    with pytest.raises(ValueError, match="no parameter group of AdamW has a 'dampling'"):
        controller(target="dampling").attach(optimizer)
    with pytest.raises(TypeError, match="a pair of functions"):
        controller(target=3).attach(optimizer)
    assert controller(target="eps").attach(optimizer).damping == 1e-8


def test_nothing_to_train():
    p = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="frozen"):
        controller().attach(DampedNewton([p]))


def test_a_frozen_group_is_left_out():
    problem = NoisyQuadratic(noise=1.0)
    frozen = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
    problem.optimizer.add_param_group({"params": [frozen]})
    control = controller().attach(problem.optimizer)
    found = problem.run(control, 1)[0]
    assert [group["damping"] for group in problem.optimizer.param_groups] == [found, found]
    assert torch.equal(frozen, torch.ones_like(frozen))
    assert control.report.refused is None


def test_a_damping_that_is_no_number():
    with pytest.raises(TypeError, match="must be a number"):
        controller().attach(DampedNewton([nn.Parameter(torch.ones(2))], damping=lambda step: 1.0))
    with pytest.raises(ValueError, match="finite number"):
        controller().attach(DampedNewton([nn.Parameter(torch.ones(2))], damping=-1.0))


def test_a_step_before_attaching():
    with pytest.raises(RuntimeError, match=r"controller\.attach\(optimizer\)"):
        controller().step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "steer"}, "mode is one of 'log', 'suggest', 'control'"),
        ({"method": "lm"}, "method is one of"),
        ({"guard_steps": "never"}, "guard_steps is one of"),
        ({"every": 0}, "at least 1"),
        ({"init": -1.0}, "a damping above 0"),
        ({"init": "auto"}, "a damping above 0"),
        ({"bounds": (0.0, 1.0)}, "0 < low <= high"),
        ({"rel_bounds": (1.0, 0.1)}, "0 < low <= high"),
        ({"deadband": (1.1, 1.2)}, "must contain the ratio 1"),
        ({"ema": 1.0}, r"in \[0, 1\)"),
        ({"max_change": 1.0}, "max_change is a factor above 1"),
        ({"guard": 0.5}, "guard is a factor above 1"),
        ({"guard_factor": float("nan")}, "guard_factor is a factor above 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DampingController(**options)


def test_a_wrong_spectrum_or_noise():
    control = controller().attach(NoisyQuadratic().optimizer)
    with pytest.raises(TypeError, match=r"expected a lightning_rmt\.Spectrum"):
        control.update([1.0], 1.0)
    with pytest.raises(ValueError, match="at least 0"):
        control.update(goe_spectrum(), -1.0)


def test_a_refused_spectrum_leaves_no_damping_of_an_earlier_one():
    control = controller().attach(NoisyQuadratic().optimizer)
    control.update(goe_spectrum(), 1.0, spectrum_noise=0.0)
    assert control.state_dict()["local_law"] > 0
    with pytest.raises(ValueError, match=r"more than the 0\.1 of the matrix that is damped"):
        control.update(goe_spectrum(), 0.1, spectrum_noise=1.0)
    assert control.state_dict()["local_law"] is None
