"""pytorch-optimizer's AdaHessian: ``eps`` beside the diagonal of the Hessian is a damping in its units."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from digits_runs import DigitsRun
from pytorch_optimizer import AdaHessian

from lightning_rmt import DampingController

# torch's advice for create_graph: what AdaHessian asks for; the gradients are set to None in each step
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")


def trained(eps, control=None, given=False, steps=60):
    """``given``: the Hessian's diagonal is estimated once per step and handed over, so that the step can be taken again."""
    run = DigitsRun()
    optimizer = AdaHessian(run.parameters, lr=1.0, eps=eps)

    def take(rows):
        signs = [torch.randint(0, 2, p.shape).to(p) * 2 - 1 for p in run.parameters]
        products = torch.autograd.grad([p.grad for p in run.parameters], run.parameters, signs)
        diagonal = [sign * product for sign, product in zip(signs, products, strict=True)]
        return lambda: optimizer.step(hessian=diagonal)

    if control is not None:
        control.attach(optimizer)
    final = run.train(optimizer, steps, control, create_graph=True, take=take if given else None)
    return final, optimizer


@cache
def fixed_at(eps):
    return trained(eps)[0]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 100.0])
def test_it_runs_from_an_absurd_eps(eps, given):
    control = DampingController("eps", mode="control", every=10, guard_steps="every")
    final, optimizer = trained(eps, control, given)
    assert final < fixed_at(eps) / 3
    assert final < 0.4
    assert 0.05 < optimizer.param_groups[0]["eps"] < 20
    # its own count of steps is that of the steps that stayed
    assert optimizer.param_groups[0]["step"] == 60 - control.state_dict()["rejections"]


def test_a_diagonal_that_was_handed_over_is_not_written_to():
    """The state refers to the user's tensors from then on: what is put back must be the optimizer's."""
    run = DigitsRun()
    optimizer = AdaHessian(run.parameters, lr=1.0, eps=1e-8)
    control = DampingController("eps", mode="control", every=1).attach(optimizer)
    diagonal = [torch.rand_like(p) for p in run.parameters]
    before = [part.clone() for part in diagonal]
    run.train(optimizer, 2, control, create_graph=True, take=lambda rows: lambda: optimizer.step(hessian=diagonal))
    assert control.report.products > 4
    assert all(torch.equal(one, other) for one, other in zip(diagonal, before, strict=True))
