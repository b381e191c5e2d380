"""singd's K-FAC without inverses, which keeps its factors in attributes and gathers them in hooks of the model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from digits_runs import DigitsRun
from singd.optim.optimizer import SINGD

from lightning_rmt import DampingController

OPTIONS = {"lr": 0.1, "T": 1, "lr_cov": 0.1, "normalize_lr_cov": True}


def trained(damping, control=None, steps=100):
    run = DigitsRun()
    optimizer = SINGD(run.model, damping=damping, **OPTIONS)
    if control is not None:
        control.attach(optimizer)
    final = run.train(optimizer, steps, control)
    return final, optimizer.param_groups[0]["damping"]


def controller(**options):
    # its damping moves the factors a little in each step: the first step alone says nothing about it
    return DampingController(
        **{"mode": "control", "every": 5, "guard_steps": "every", "search": False, "max_change": 10.0, **options}
    )


@pytest.mark.parametrize("start", [1e-8, 100.0])
def test_an_absurd_damping_is_left_behind(start):
    fixed, _ = trained(start)
    final, damping = trained(start, controller())
    assert final < 0.25
    assert final < fixed / 4
    assert 1e-2 < damping < 10


def test_logging_leaves_its_hooks_without_a_trace():
    """A loss that is measured runs through singd's hooks, which add it to the factors of the next update."""
    plain, watched = DigitsRun(), DigitsRun()
    optimizers = [SINGD(run.model, damping=0.1, **OPTIONS, weight_decay=0.01) for run in (plain, watched)]
    control = DampingController(every=2, method="two-part").attach(optimizers[1])
    plain.train(optimizers[0], 6)
    group = optimizers[1].param_groups[0]
    watched.train(optimizers[1], 6, control)
    assert control.report.ratio is not None
    assert torch.equal(plain.weights(), watched.weights())
    assert optimizers[1].param_groups[0] is group
    for one, other in zip(state(optimizers[0]), state(optimizers[1]), strict=True):
        assert torch.equal(one, other)


def state(optimizer):
    """All tensors that singd keeps."""
    kept = [entry["momentum_buffer"] for entry in optimizer.state.values() if "momentum_buffer" in entry]
    for name in ("Ks", "Cs", "m_Ks", "m_Cs", "H_Ks", "H_Cs"):
        for matrix in getattr(optimizer, name).values():
            kept.extend(tensor for _, tensor in matrix.named_tensors())
    return [*kept, torch.tensor(float(optimizer.steps))]


def test_the_guard_puts_all_of_it_back():
    run = DigitsRun()
    optimizer = SINGD(run.model, damping=0.1, **OPTIONS)
    control = controller().attach(optimizer)
    run.train(optimizer, 7, control)
    rows = run.rows()
    optimizer.zero_grad()
    loss = run.loss(rows)
    loss.backward()
    before, weights, damping = copy.deepcopy(state(optimizer)), run.weights(), control.damping
    optimizer.param_groups[0]["lr"] = 1e4
    report = control.step(lambda: run.loss(rows), lambda: run.loss(rows), before=loss)
    assert report.rejected
    assert torch.equal(run.weights(), weights)
    assert control.damping == optimizer.param_groups[0]["damping"] == pytest.approx(4 * damping)
    momenta = sum("momentum_buffer" in entry for entry in optimizer.state.values())
    assert momenta == 4
    for i, (then, now) in enumerate(zip(before, state(optimizer), strict=True)):
        assert torch.equal(then / 2 if i < momenta else then, now)
    optimizer.param_groups[0]["lr"] = 0.1
    assert math.isfinite(run.train(optimizer, 5, control))


def test_a_scheduler_on_the_same_key_wins():
    run = DigitsRun()
    optimizer = SINGD(run.model, damping=1.0, **OPTIONS)
    control = controller().attach(optimizer)

    class Decay(torch.optim.lr_scheduler.LRScheduler):
        """LambdaLR is for the learning rate alone; what users write for a damping."""

        def step(self):
            for group in optimizer.param_groups:
                group["damping"] = 0.5 * 0.9**control._knob.state.steps

    scheduler = Decay(optimizer)
    with pytest.warns(RuntimeWarning, match="a scheduler or a callback changes it too") as caught:
        run.train(optimizer, 11, control, after=scheduler.step)
    assert len(caught) == 1
    assert control.mode == "log"
    assert optimizer.param_groups[0]["damping"] == 0.5 * 0.9**11
    assert control.report.step == 10
    assert control.report.ratio is not None  # it goes on measuring
