"""Python attributes, hidden modules, training flags and logging behind the fence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fenced_modules import Logger, Module, Stateful
from nasty_models import Meter
from torch import nn

from lightning_rmt.live.fence import fence, python_state


def test_python_attributes_hold_again_what_they_held():
    module = Stateful()
    objects = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    inner = (module.list[1], module.list[1][1], module.dict["t"][0])
    before = module.snapshot()
    with fence(None, module, seed=0):
        assert module.weights[0] is module.net.weight  # what the loss is differentiated by is never copied
        module.upset()
        assert module.snapshot() != before
    assert module.snapshot() == before
    assert all(module.__dict__[k] is v for k, v in objects.items())
    assert all(a is b for a, b in zip(inner, (module.list[1], module.list[1][1], module.dict["t"][0]), strict=True))
    assert not hasattr(module.net, "own")


def test_what_leads_to_a_parameter_stays_in_the_graph():
    net = nn.Linear(2, 2)
    net.doubled = [2 * net.weight]
    with fence(None, net, seed=0):
        (gradient,) = torch.autograd.grad(net.doubled[0].sum(), net.weight)
    assert torch.equal(gradient, torch.full((2, 2), 2.0))


def test_large_things_are_not_copied(monkeypatch):
    monkeypatch.setattr(python_state, "_COPIED_BYTES", 2**10)
    net = nn.Linear(1, 1)
    net.dataset, net.array, net.history = torch.zeros(300), np.zeros(300), [torch.zeros(1) for _ in range(1001)]
    dataset, array, first = net.dataset, net.array, net.history[0]
    with fence(None, net, seed=0):
        assert net.dataset is dataset
        assert net.array is array
        assert net.history[0] is first
        net.history.append(1)
    assert len(net.history) == 1001


class Connection:
    """Stands for an object of an installed library."""

    def __init__(self):
        self.sent = 0


@pytest.mark.parametrize("library", ["torch.utils.tensorboard.writer", "queue", "lightning_rmt.callbacks", "pytest"])
def test_objects_of_libraries_are_left_alone(library, monkeypatch):
    monkeypatch.setattr(Connection, "__module__", library)
    net = nn.Linear(1, 1)
    net.connection, net.meter = Connection(), Meter()
    with fence(None, net, seed=0):
        net.connection.sent += 1
        net.meter.update(1.0)
    assert (net.connection.sent, net.meter.mean) == (1, 0.0)


def test_hidden_modules_are_guarded():
    net = nn.Linear(2, 2)
    listed, unregistered = nn.Sequential(nn.BatchNorm1d(2)), nn.BatchNorm1d(2)
    net.teacher = [listed]
    net.__dict__["other"] = unregistered
    with fence(None, net, seed=0):
        unregistered(listed(torch.randn(4, 2))).sum().backward()
        listed.eval()
        unregistered.eval()
    for norm in (listed[0], unregistered):
        assert norm.num_batches_tracked == 0
        assert norm.training
        assert norm.weight.grad is None


def test_training_flags():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout().eval())
    with fence(None, net, seed=0):
        net.eval()
        net[1].train()
    assert [m.training for m in net.modules()] == [True, True, False]


def test_logging_is_silent_inside():
    module = Module()
    trainer = SimpleNamespace(_loggers=[Logger()], profiler=(profiler := object()))
    loggers = trainer._loggers
    with fence(trainer, module, seed=0):
        module.log("loss", 1.0)
        module.log_dict({"a": 1})
        module.print("hello")
        assert module._current_fx_name == "training_step"
        (logger,) = trainer._loggers
        assert isinstance(logger, Logger)
        assert (logger.name, logger.save_dir, logger.version) == ("runs", "/runs", 3)
        logger.log_metrics({"a": 1}, step=0)
        logger.experiment.add_scalar("a", 1)
        logger[0].experiment.anything.at["all"](1)
        logger.some = 1
        with trainer.profiler.profile("own"):
            pass
    assert "log" not in module.__dict__
    assert "_current_fx_name" not in module.__dict__
    assert trainer._loggers is loggers
    assert trainer.profiler is profiler
    with pytest.raises(AssertionError, match="logged"):
        module.log("loss", 1.0)


def test_a_log_that_was_replaced_before_is_put_back():
    module = Module()
    module.log = mine = lambda *args: None
    with fence(None, module, seed=0):
        assert module.log is not mine
    assert module.log is mine


class Averages(NamedTuple):
    loss: torch.Tensor
    count: np.ndarray


class Slotted:
    """A running average that keeps its state in slots."""

    __slots__ = ("__hidden", "late", "mean", "seen")

    def __init__(self):
        self.mean, self.seen, self.__hidden = torch.zeros(2), [], 0

    def update(self):
        self.mean += 1
        self.seen.append(1)
        self.late = True
        self.__hidden += 1

    def snapshot(self):
        return self.mean.tolist(), list(self.seen), hasattr(self, "late"), self.__hidden


def test_named_tuples_and_slots_are_guarded():
    module = nn.Linear(1, 1)
    module.averages, module.meter = Averages(torch.zeros(2), np.zeros(2)), Slotted()
    averages, meter, mean = module.averages, module.meter, module.meter.mean
    with fence(None, module, seed=0):
        assert type(module.averages) is Averages
        module.averages.loss.add_(1)
        module.averages.count[:] = 1
        module.meter.update()
        assert module.meter.snapshot() == ([1, 1], [1], True, 1)
    assert module.averages is averages
    assert averages.loss.tolist() == averages.count.tolist() == [0, 0]
    assert module.meter is meter
    assert meter.mean is mean
    assert meter.snapshot() == ([0, 0], [], False, 0)
