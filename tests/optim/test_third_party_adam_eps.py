"""``eps`` of torch's AdamW, where it is asked for: a damping once the learning rate is near one."""

from __future__ import annotations

import pytest
import torch
from digits_runs import DigitsRun

from lightning_rmt import DampingController


def trained(eps, lr, control=None, steps=60, **options):
    run = DigitsRun()
    optimizer = torch.optim.AdamW(run.parameters, lr=lr, eps=eps, **options)
    if control is not None:
        control.attach(optimizer)
    return run.train(optimizer, steps, control), optimizer, run


def test_logging_changes_nothing_and_measures():
    control = DampingController("eps", every=5)
    plain, _, run = trained(1e-8, 0.01, steps=11)
    final, optimizer, watched = trained(1e-8, 0.01, control, steps=11)
    assert final == plain
    assert torch.equal(run.weights(), watched.weights())
    assert optimizer.param_groups[0]["eps"] == 1e-8
    assert control.report.ratio is not None
    assert control.report.suggested != 1e-8


def test_control_from_absurd_starts():
    """Without an eps a learning rate of one is far too long; with 1000 nothing moves. From both it ends in one place."""
    seen = {}
    for eps in (1e-8, 1000.0):
        control = DampingController("eps", mode="control", every=5, guard_steps="every")
        fixed, _, _ = trained(eps, 1.0)
        seen[eps], optimizer, _ = trained(eps, 1.0, control)
        assert seen[eps] < fixed / 2
        assert 1e-3 < optimizer.param_groups[0]["eps"] < 10
    assert max(seen.values()) < 2 * min(seen.values())


def test_a_scheduler_of_the_learning_rate_is_no_conflict():
    run = DigitsRun()
    optimizer = torch.optim.AdamW(run.parameters, lr=1.0)
    control = DampingController("eps", mode="control", every=2).attach(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run.train(optimizer, 5, control, after=scheduler.step)
    assert control.mode == "control"


@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_what_is_measured_is_the_new_gradient_alone(beta, weight_decay):
    """The ratio of ``g / (sqrt(v) + eps)`` along it, whatever momentum and decay make the step of."""
    control = DampingController("eps", every=1)
    eps = 1e-3
    _, optimizer, run = trained(eps, 1e-3, control, steps=8, betas=(beta, 0.9), weight_decay=weight_decay)
    start = run.weights()
    rows, others = run.rows(), run.rows()
    optimizer.zero_grad()
    run.loss(rows).backward()
    report = control.step(lambda: run.loss(rows), lambda: run.loss(others))
    g = torch.cat([p.grad.flatten() for p in run.parameters])
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in run.parameters]) / (1 - 0.9**9)
    d = -g / (v.sqrt() + eps)
    torch.nn.utils.vector_to_parameters(start, run.parameters)
    first = torch.autograd.grad(run.loss(others), run.parameters, create_graph=True)
    product = torch.autograd.grad(torch.cat([part.flatten() for part in first]) @ d, run.parameters)
    expected = float(d @ torch.cat([part.flatten() for part in product]) / -(g @ d))
    assert report.ratio == pytest.approx(expected, rel=0.02)
