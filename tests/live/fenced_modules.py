"""A module with state in every kind of Python attribute, and dense Hessians, for the tests of the fence."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from nasty_models import Meter
from torch import nn


def hessian(loss, parameters):
    """Dense, by double backward; the thing that has to work inside."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True, materialize_grads=True) for x in flat
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.count = 0
        self.list = [1, [2, torch.zeros(2)]]
        self.dict = {"a": {"b": np.zeros(2)}, "t": (torch.zeros(1), [1])}
        self.set = {1}
        self.deque = deque([1, 2], maxlen=2)
        self.tensor = torch.zeros(2)
        self.alias = self.tensor
        self.array = np.zeros(2)
        self.meter = Meter()
        self.weights = [self.net.weight]
        self.generator = torch.Generator().manual_seed(0)

    def upset(self):
        self.count += 1
        self.list[1][1].add_(1)
        self.list[1].append(3)
        self.list.pop(0)
        self.dict["a"]["b"] += 1
        self.dict["t"][0].add_(1)
        self.dict["t"][1].clear()
        self.dict["new"] = 1
        self.set.add(2)
        self.deque.append(3)
        self.tensor.add_(1)
        assert torch.equal(self.alias, self.tensor)
        self.array[0] = 1
        self.meter.update(1.0)
        self.net.own = "new"
        torch.rand(1, generator=self.generator)
        del self.alias

    def snapshot(self):
        own = sorted((name, repr(value)) for name, value in self.__dict__.items() if not name.startswith("_"))
        return own, repr(self.meter.__dict__), self.generator.get_state().sum().item()


class Module(nn.Linear):
    """As much of a LightningModule as matters here."""

    _current_fx_name = "on_train_batch_end"

    def __init__(self):
        super().__init__(1, 1)
        self.logged = []

    def log(self, *args, **kwargs):
        raise AssertionError("logged")

    log_dict = print = log


class Logger:
    name, save_dir, version = "runs", "/runs", 3

    @property
    def experiment(self):
        raise AssertionError("touched")

    def log_metrics(self, metrics, step):
        raise AssertionError("logged")
