"""A step of real optimizers undone, wherever they keep their state: taken again, it is the same step."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from singd.optim.optimizer import SINGD
from torch import nn

from lightning_rmt import DampingController
from lightning_rmt.optim.outside_state import OutsideState
from lightning_rmt.optim.taken_step import TakenStep
from lightning_rmt.optim.targets import FunctionTarget

DAMPING = FunctionTarget(lambda: 1.0, lambda value: None)
#: where each keeps something: attributes and hooks, lists of matrices, objects, groups, random numbers, a graph
OPTIMIZERS = {
    "singd": lambda model: SINGD(model, lr=0.1, T=1, lr_cov=0.1),
    "singd, every third": lambda model: SINGD(model, lr=0.1, T=3, lr_cov=0.1, structures=("diagonal", "dense")),
    "AdaHessian": lambda model: pytorch_optimizer.AdaHessian(model.parameters()),
    "SOAP": lambda model: pytorch_optimizer.SOAP(model.parameters()),
    "Shampoo": lambda model: pytorch_optimizer.Shampoo(model.parameters()),
    "ScalableShampoo": lambda model: pytorch_optimizer.ScalableShampoo(
        model.parameters(), start_preconditioning_step=2
    ),
    "Kron": lambda model: pytorch_optimizer.Kron(model.parameters(), balance_prob=0.5),
    "Prodigy": lambda model: pytorch_optimizer.Prodigy(model.parameters()),
    "ScheduleFreeAdamW": lambda model: pytorch_optimizer.ScheduleFreeAdamW(model.parameters()),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=2),
    "Nesterov": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "NAdam": lambda model: torch.optim.NAdam(model.parameters()),
}


def weights_after_8(name, undone):
    """Weights after 8 steps, of which those in ``undone`` are undone twice."""
    torch.manual_seed(0)
    np.random.seed(0)  # Kron balances its factors when NumPy says so, which moves the last bits
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = OPTIMIZERS[name](model)
    if hasattr(optimizer, "train"):
        optimizer.train()
    x, y = torch.randn(8, 40, 6), torch.randint(0, 3, (8, 40))

    def backward(t):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[t]), y[t])
        loss.backward(create_graph=name == "AdaHessian")
        return loss

    for t in range(8):
        backward(t)
        for _ in range(2 if t in undone else 0):
            taken = TakenStep(optimizer, DAMPING, undo=True, outside=OutsideState(optimizer))
            taken.keep_gradients()
            take(name, optimizer, backward, t)
            taken.undo()
            if name == "AdaHessian":
                backward(t)
        take(name, optimizer, backward, t)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def take(name, optimizer, backward, t):
    if name == "LBFGS":
        optimizer.step(lambda: backward(t))
    else:
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_was_undone_leaves_no_trace(name):
    plain, undone = weights_after_8(name, ()), weights_after_8(name, (0, 3))
    assert torch.isfinite(plain).all()
    assert torch.equal(plain, undone)


class Hiding(torch.optim.SGD):
    """Keeps a running mean of gradients where no state_dict shows it."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.damping, self.means = 1.0, [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p, mean in zip(self.param_groups[0]["params"], self.means, strict=True):
            mean.mul_(0.9).add_(p.grad)
            p.sub_(self.param_groups[0]["lr"] * mean)

    def read(self):
        return self.means

    def fill(self, means):
        self.means = means


def rejected(optimizer, p, **options):
    control = DampingController((lambda: 1.0, lambda value: None), mode="control", search=False)
    control.attach(optimizer, **options)
    (p**2).sum().backward()
    return control.step(lambda: (p**2).sum() * 1e6, before=1.0)


def test_hidden_state_is_warned_of_and_a_pair_of_functions_puts_it_back():
    p = nn.Parameter(torch.ones(3))
    optimizer = Hiding([p], lr=0.1)
    with pytest.warns(RuntimeWarning, match=r"Hiding keeps tensors in means and not in its state_dict"):
        assert rejected(optimizer, p).rejected
    assert optimizer.means[0].norm() > 0  # it can't be known
    optimizer = Hiding([p], lr=0.1)
    means = optimizer.means[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejected(optimizer, p, state=[(optimizer.read, optimizer.fill)]).rejected
    assert optimizer.means[0] is means
    assert torch.equal(means, torch.zeros(3))


def test_a_preconditioner_beside_the_optimizer_is_put_back():
    """Batch normalisation stands for it: it has a state_dict, and a forward pass changes it."""
    p, beside = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD([p], lr=0.1)
    control = DampingController("lr", mode="control", search=False).attach(optimizer, state=[beside])
    before = {name: tensor.clone() for name, tensor in beside.state_dict().items()}

    def loss():
        return (p + beside(torch.randn(4, 3)) * 1e6).square().sum()

    loss().backward()
    beside.load_state_dict(before)
    assert control.step(loss, loss, before=1.0).rejected
    torch.testing.assert_close(dict(beside.state_dict()), before, rtol=0, atol=0)


def test_what_is_no_state_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(TypeError, match="state is a list of objects with state_dict"):
        DampingController("lr").attach(optimizer, state=["kfac"])


class Uncopyable:
    def __deepcopy__(self, memo):
        raise NotImplementedError("no")


def test_an_object_that_cannot_be_copied_is_said():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p]["object"] = Uncopyable()
    with pytest.warns(RuntimeWarning, match="an? Uncopyable in the optimizer's state can't be copied"):
        assert rejected(optimizer, p).rejected
