"""Optimizers of other libraries with a damping that is far off, with and without a controller.

Digits, two layers, plain loops. Losses are of all data at the end; `inf` is above 1000 or not a number. About 30 seconds:

    python examples/damped_optimizers.py
"""

from __future__ import annotations

import argparse
import math
import warnings

import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from pytorch_optimizer import AdaHessian
from singd.optim.optimizer import SINGD
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_rmt import DampingController

warnings.filterwarnings("ignore", message="Using backward.* with create_graph=True")  # as AdaHessian wants it

data = load_digits()
x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def batches(steps):
    """Two independent batches for each step."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(len(x), (steps, 2, 128), generator=random)


def train_singd(damping, steps, controlled):
    """Its damping acts on later steps, so there is nothing to search for in the first one."""
    model = network()
    optimizer = SINGD(model, lr=0.1, damping=damping, T=1, lr_cov=0.1, normalize_lr_cov=True)
    mode = "control" if controlled else "log"
    controller = DampingController(mode=mode, every=5, guard_steps="every", search=False, max_change=10.0)
    controller.attach(optimizer)
    for rows, others in batches(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        controller.step(
            lambda r=rows: cross_entropy(model(x[r]), y[r]),
            lambda r=others: cross_entropy(model(x[r]), y[r]),
            before=loss,
        )
    return model, controller


def train_curvlinops(damping, steps, controlled):
    """A K-FAC inverse that is made in each step: ``take`` asks the controller for the damping."""
    model = network()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    mode = "control" if controlled else "log"
    controller = DampingController("call", init=damping, mode=mode, every=10, guard_steps="every").attach(optimizer)
    for rows, others in batches(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        kfac = KFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            parameters,
            [(x[rows], y[rows])],
            check_deterministic=False,
            separate_weight_and_bias=False,
        )

        def take(kfac=kfac):
            inverse = KFACInverseLinearOperator(kfac, damping=controller(), use_exact_damping=True)
            for p, direction in zip(parameters, inverse @ [p.grad for p in parameters], strict=True):
                p.grad = direction
            optimizer.step()

        controller.step(
            lambda r=rows: cross_entropy(model(x[r]), y[r]),
            lambda r=others: cross_entropy(model(x[r]), y[r]),
            before=loss,
            take=take,
        )
    return model, controller


def train_adahessian(damping, steps, controlled):
    """``eps`` is added to the size of the Hessian's diagonal; it is only taken where it is asked for."""
    model = network()
    optimizer = AdaHessian(model.parameters(), lr=1.0, eps=damping)
    mode = "control" if controlled else "log"
    controller = DampingController("eps", mode=mode, every=10, guard_steps="every").attach(optimizer)
    for rows, others in batches(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward(create_graph=True)
        controller.step(
            lambda r=rows: cross_entropy(model(x[r]), y[r]),
            lambda r=others: cross_entropy(model(x[r]), y[r]),
            before=loss,
        )
    return model, controller


TRAINED = {"singd SINGD": train_singd, "curvlinops KFAC inverse": train_curvlinops, "AdaHessian, eps": train_adahessian}
STARTS = (1e-6, 1e-2, 100.0)


def final(model):
    with torch.no_grad():
        loss = float(cross_entropy(model(x), y))
    return loss if loss < 1e3 else math.inf


def main(steps=80):
    rows = []
    for name, train in TRAINED.items():
        for start in STARTS:
            alone, _ = train(start, steps, controlled=False)
            model, controller = train(start, steps, controlled=True)
            rows.append((name, start, final(alone), final(model), controller.damping))
    columns = ("optimizer", "damping at start", "loss, left there", "loss, controlled", "damping at end")
    print(tabulate(rows, headers=columns, floatfmt=("", ".0e", ".3g", ".3g", ".2g")))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    main(parser.parse_args().steps)
