"""Runs in which a controller holds still: clipped gradients, sharded parameters, no search."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from newton_harness import NoisyQuadratic
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from lightning_rmt import DampingController


def controller(**options):
    return DampingController(**{"mode": "control", "every": 1, "guard": None, "search": False, **options})


def clipped_run(control, problem, steps, limit):
    """The reports of steps with gradients clipped to a norm."""
    reports = []
    for _ in range(steps):
        own, other = problem.batch(), problem.batch()
        problem.backward(own)
        norm = nn.utils.clip_grad_norm_([problem.x], limit)
        reports.append(control.step(own, other, clipped=norm > limit))
    return reports


def test_where_most_steps_are_clipped_the_damping_stays():
    problem = NoisyQuadratic(damping=100.0)
    control = controller().attach(problem.optimizer)
    reports = clipped_run(control, problem, 4, limit=1e-3)
    assert control.damping == 100.0
    assert all(report.refused.startswith("clipped: 100%") for report in reports)
    assert control.state_dict()["products"] == 0
    assert json.loads(json.dumps(control.state_dict()))["clipped"] == 1.0
    # from there on nothing is clipped: three more measured steps until most of the last ones weren't
    reports = clipped_run(control, problem, 4, limit=1e6)
    assert [report.refused is None for report in reports] == [False, False, True, True]
    assert control.damping == 25.0


def test_where_few_are_it_goes_on_as_if_none_was():
    plain, some = NoisyQuadratic(damping=100.0), NoisyQuadratic(damping=100.0)
    expected = plain.run(controller().attach(plain.optimizer), 6)
    control = controller().attach(some.optimizer)
    seen = []
    for step in range(6):
        own, other = some.batch(), some.batch()
        some.backward(own)
        control.step(own, other, clipped=step == 3)
        seen.append(control.damping)
    assert seen == expected


def test_clipping_does_not_change_the_ratio():
    """Half the gradient is half the step: the ratio is that of the damped curvature either way."""
    ratios = []
    for limit in (1e6, 1e-3):
        problem = NoisyQuadratic()
        control = DampingController().attach(problem.optimizer)
        own, other = problem.batch(), problem.batch()
        problem.backward(own)
        nn.utils.clip_grad_norm_([problem.x], limit)
        ratios.append(control.step(own, other).ratio)
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-6)


def test_without_a_search_the_first_step_is_taken_once():
    problem = NoisyQuadratic(damping=100.0)
    control = controller(every=5).attach(problem.optimizer)
    dampings = problem.run(control, 6)
    assert problem.optimizer.taken == 6
    assert dampings == [50.0] * 5 + [25.0]


@pytest.mark.parametrize("options", [{"nesterov": True}, {"dampening": 0.5}, {}])
def test_torchs_momentum_is_taken_out(options):
    """Along ``-g``: what the step is made of, whatever the buffer holds."""
    problem = NoisyQuadratic()
    optimizer = torch.optim.SGD([problem.x], lr=0.01, momentum=0.9, **options)
    control = DampingController("lr", every=1).attach(optimizer)
    ratios, expected = [], []
    for _ in range(4):
        own, other = problem.batch(), problem.batch()
        optimizer.zero_grad()
        own().backward()
        g = problem.x.grad.clone()
        (first,) = torch.autograd.grad(other(), problem.x, create_graph=True)
        (product,) = torch.autograd.grad(first @ g, problem.x)
        expected.append(float(g @ product / (g @ g)))
        ratios.append(control.step(own, other).ratio)
    assert ratios == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def sharded(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield nn.Parameter(distribute_tensor(torch.ones(4), mesh))
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_are_refused_in_control_and_said_in_log(sharded):
    optimizer = torch.optim.SGD([sharded], lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer's parameters are sharded \(FSDP\)"):
        DampingController("lr", mode="control").attach(optimizer)
    control = DampingController("lr").attach(optimizer)
    (sharded**2).sum().backward()
    report = control.step(lambda: (sharded**2).sum(), lambda: (sharded**2).sum())
    assert "sharded (DTensor)" in report.refused
    assert torch.equal(sharded.full_tensor(), torch.full((4,), 0.8))


@pytest.mark.parametrize("overflow", [None, 0, 2])
def test_a_gradient_scaler_steps_once_and_the_search_by_itself(overflow):
    def run(scaler):
        problem = NoisyQuadratic(10)
        control = DampingController(mode="control", guard=None).attach(problem.optimizer)  # else that undoes it
        for step in range(4):
            own, other = problem.batch(), problem.batch()
            problem.optimizer.loss = own
            problem.optimizer.zero_grad()
            scaler.scale(own()).backward()
            if step == overflow:
                problem.x.grad[0] = torch.inf
            scaler.unscale_(problem.optimizer)
            control.before_step()
            scaler.step(problem.optimizer)
            scaler.update()
            control.after_step(own, other, retake=problem.optimizer.step)
        return problem.x.detach(), control

    weights, control = run(torch.amp.GradScaler("cpu", init_scale=64.0))
    assert torch.isfinite(weights).all()
    assert weights.abs().max() > 0
    if overflow is None:
        plain, _ = run(torch.amp.GradScaler("cpu", enabled=False))
        torch.testing.assert_close(weights, plain, rtol=1e-12, atol=0)
    assert control.report is not None


@pytest.mark.parametrize("offset", [-1, 25])
def test_an_offset_is_one_of_the_steps_between_two_measurements(offset):
    with pytest.raises(ValueError, match=f"below every=25, got {offset}"):
        DampingController().attach(NoisyQuadratic().optimizer, offset=offset)
