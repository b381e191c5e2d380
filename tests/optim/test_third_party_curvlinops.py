"""curvlinops's inverse of a K-FAC matrix, made anew in each step with the damping that the controller says."""

from __future__ import annotations

import pytest
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from digits_runs import DigitsRun
from torch import nn

from lightning_rmt import DampingController


def trained(start, control=None, get_set=False, steps=40):
    """Final loss; ``get_set``: the damping is a number of the user's own, else the controller is called for it."""
    run, kept = DigitsRun(), {"damping": start}
    optimizer = torch.optim.SGD(run.parameters, lr=0.3)
    calls = []

    def damping():
        return control() if control is not None and not get_set else kept["damping"]

    def take(rows):
        kfac = KFACLinearOperator(
            run.model,
            nn.CrossEntropyLoss(),
            run.parameters,
            [(run.x[rows], run.y[rows])],
            check_deterministic=False,
            separate_weight_and_bias=False,
        )

        def step():
            calls.append(damping())
            inverse = KFACInverseLinearOperator(kfac, damping=calls[-1], use_exact_damping=True)
            for p, direction in zip(run.parameters, inverse @ [p.grad for p in run.parameters], strict=True):
                p.grad = direction
            optimizer.step()

        return step

    if control is not None:
        control.attach(optimizer)
    return run.train(optimizer, steps, control, take=take), calls


def controller(target, **options):
    return DampingController(target, mode="control", every=10, guard_steps="every", **options)


@pytest.mark.parametrize(("start", "fixed_at_least"), [(1e-6, 1e3), (100.0, 2.0)])
def test_the_callable_leaves_an_absurd_damping_behind(start, fixed_at_least):
    fixed, _ = trained(start)
    assert not fixed < fixed_at_least  # diverged, or hardly moved from log 10
    control = controller("call", init=start)
    final, calls = trained(start, control)
    assert final < 0.3
    assert calls[0] == start
    assert 0.01 < calls[-1] < 10
    assert control.report.refused is None


def test_a_pair_of_functions_does_the_same():
    kept = {"damping": 1e-6}
    control = controller((lambda: kept["damping"], lambda value: kept.update(damping=value)))
    # the run reads the same number through the controller: it is in one place only
    final, calls = trained(1e-6, control, steps=11)
    called, others = trained(1e-6, controller("call"), steps=11)
    assert calls[1:] == others[1:]
    assert final == called
    assert kept["damping"] == control.damping != 1e-6
