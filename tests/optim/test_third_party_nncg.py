"""T12: DeepXDE's NysNewton-CG, a damped Newton step by conjugate gradients, taken from a closure."""

from __future__ import annotations

import os

import pytest
import torch
from digits_runs import DigitsRun

from lightning_rmt import DampingController

os.environ.setdefault("DDE_BACKEND", "pytorch")  # else it asks for one, and remembers it in the home directory

from deepxde.optimizers.pytorch.nncg import NNCG

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"),
    pytest.mark.usefixtures("capsys"),  # it prints where conjugate gradients stop early
]

#: Final loss of the best of 1e-4, 1e-2, .1, 1, 10, 100.
BEST = 0.260
KEPT = ("U", "S", "rho", "old_dir", "n_iters")


def outside(optimizer):
    """What it keeps in attributes, and in no state_dict."""
    return (lambda: {name: vars(optimizer)[name] for name in KEPT if name in vars(optimizer)}), vars(optimizer).update


def trained(mu, control=None, steps=40, search="armijo", state=True):
    """``control(optimizer)`` makes the controller."""
    run = DigitsRun()
    optimizer = NNCG(run.parameters, mu=mu, cg_max_iters=20, cg_tol=1e-6, line_search_fn=search)
    if control is not None:
        control = control(optimizer)
        control.attach(optimizer, state=[outside(optimizer)] if state else ())
    final = run.train(optimizer, steps, control, take=lambda rows: lambda: optimizer.step(lambda: run.loss(rows)))
    return final, optimizer, control, run.weights()


def controller(optimizer, **options):
    # its groups have a "mu" that it never reads
    target = (lambda: optimizer.mu, lambda value: setattr(optimizer, "mu", value))
    return DampingController(target, **{"mode": "control", "every": 10, "guard_steps": "every", **options})


@pytest.mark.parametrize("search", ["armijo", None])
def test_it_trains_from_an_absurd_damping(search):
    final, optimizer, _, _ = trained(1e-8, controller, search=search)
    assert final < 1.5 * BEST  # measured .83 and 1.33
    assert 0.05 < optimizer.mu < 10


def test_without_control_the_same_damping_diverges():
    # with its line search it is at 6, after thousands of halvings where the damped curvature is negative
    assert trained(1e-8, search=None)[0] > 100 * BEST


def test_where_the_damping_starts_has_no_say():
    """Its own attributes are put back with the weights, and the random numbers of its sketch."""
    _, _, control, weights = trained(1e-8, controller, steps=4)
    _, _, other, others = trained(100.0, controller, steps=4)
    assert torch.equal(others, weights)
    assert other.state_dict() == control.state_dict()


def test_what_it_makes_in_its_first_step_is_warned_of():
    with pytest.warns(
        RuntimeWarning, match=r"NNCG keeps tensors in U, S, old_dir, rho and not in its state_dict"
    ) as caught:
        trained(0.5, controller, steps=3, state=False)
    assert len(caught) == 1


def test_a_damping_that_it_does_not_read_is_refused():
    _, _, control, weights = trained(0.5, lambda _: DampingController(mode="control"), steps=1)
    assert "the optimizer doesn't use this number" in control.report.refused
    assert torch.equal(weights, trained(0.5, steps=1)[-1])
    assert control.damping == 0.5


def test_logging_leaves_the_weights_as_they_are():
    _, _, control, weights = trained(0.5, lambda optimizer: controller(optimizer, mode="log", every=5), steps=8)
    assert control.report.ratio is not None
    assert torch.equal(weights, trained(0.5, steps=8)[-1])
