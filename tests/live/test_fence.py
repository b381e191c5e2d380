"""What the fence restores, one guard at a time, without a Trainer; tests/live/test_bitwise.py has the Trainers."""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections import deque
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_models import Meter, Sequence, cnn
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lightning_rmt.live.fence
from lightning_rmt.live.fence import PARTS, fence


def hessian(loss, parameters):
    """Dense, by double backward; the thing that has to work inside."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [
        torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True, materialize_grads=True) for x in flat
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


# -- randomness


def test_generators_are_restored_and_seeded():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    net = nn.Linear(1, 1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    torch.randn(3), np.random.randn(3)  # leaves half a normal pair in both states
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = []
    for seed in (5, 5, 6):
        with fence(None, net, seed=seed):
            drawn.append(draw())
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert str(before[1:]) == str(after[1:])
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


def test_seeding_leaves_other_devices_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every device"))
    with fence(None, nn.Linear(1, 1), seed=2**63):
        pass


# -- tensors


def test_buffers_are_copies_inside_and_the_same_objects_afterwards():
    net = cnn()
    shared = torch.zeros(2)
    net.register_buffer("one", shared)
    net[1].register_buffer("two", shared, persistent=False)
    before = _buffers(net)
    versions = {name: buffer._version for name, buffer in before.items()}
    values = {name: buffer.clone() for name, buffer in before.items()}
    with fence(None, net, seed=0):
        assert net.one is net[1].two is not shared
        net.one.add_(1)
        net[1].two = torch.ones(5)
        net.register_buffer("three", torch.ones(1))
        net(torch.randn(4, 1, 6, 6))
    assert list(_buffers(net)) == list(before)
    assert all(b is before[name] for name, b in _buffers(net).items())
    assert {name: b._version for name, b in before.items()} == versions
    assert all(torch.equal(b, values[name]) for name, b in before.items())
    assert "two" not in net.state_dict()


def _buffers(net):
    return {(id(m), name): b for m in net.modules() for name, b in m._buffers.items()}


def test_live_graph_survives_the_fence():
    net = cnn().eval()  # running statistics are saved for backward
    loss = net(torch.randn(4, 1, 6, 6)).square().sum()
    with fence(None, net, seed=0):
        net.train()(torch.randn(4, 1, 6, 6)).sum()
    loss.backward()


def test_gradients_hooks_and_requires_grad():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    net[1].weight.requires_grad_(False)
    fired = []
    net[0].weight.register_hook(lambda g: fired.append(g) or 0.5 * g)
    x = torch.randn(4, 3)
    net(x).square().mean().backward()
    fired.clear()
    gradients = [p.grad for p in net.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    with fence(None, net, seed=0):
        assert all(p.grad is None for p in net.parameters())
        H = hessian(net(x).square().mean(), [net[0].weight])
        net(x).square().mean().backward()
        net.requires_grad_(True)
        net[0].bias.requires_grad_(False)
    assert fired == []
    unhooked = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    unhooked.load_state_dict(net.state_dict())
    assert torch.equal(H, hessian(unhooked(x).square().mean(), [unhooked[0].weight]))
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(g is None or torch.equal(g, v) for g, v in zip(gradients, values, strict=True))
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    net(x).square().mean().backward()
    assert len(fired) == 1


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda p: p.data.mul_(2),
        lambda p: torch.no_grad()(p.mul_)(2),
        lambda p: setattr(p, "data", 2 * p.data),
        lambda p: setattr(p, "data", torch.zeros(7)),
    ],
    ids=["data in place", "no_grad in place", "rebound", "resized"],
)
@pytest.mark.parametrize("trained", [True, False])
def test_parameters_that_the_step_overwrites(overwrite, trained):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    p = net[0].weight.requires_grad_(trained)
    before, memory, version = p.clone(), p.data_ptr(), p._version
    loss = net(torch.randn(2, 3)).sum()
    for _ in range(3):
        with fence(None, net, seed=0):
            overwrite(p)
            assert not torch.equal(p, before)
        assert torch.equal(p, before)
        assert (p.data_ptr(), p._version) == (memory, version)
    loss.backward()


def test_large_frozen_backbone_is_not_copied_and_a_late_write_is_told():
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 1))
    net[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fence(None, net, seed=0):
            pass
    with pytest.warns(UserWarning, match=r"parameter '0.bias' in place.*loss_fn"):
        with fence(None, net, seed=0), torch.no_grad():
            net[0].bias.add_(1)
    before = net[0].bias.clone()
    with fence(None, net, seed=0), torch.no_grad():  # known from now on
        net[0].bias.add_(1)
    assert torch.equal(net[0].bias, before)


def test_an_interrupted_first_fence_learns_nothing():
    net = nn.Linear(3, 3)
    before = net.weight.clone()
    with pytest.raises(KeyboardInterrupt), fence(None, net, seed=0):
        raise KeyboardInterrupt  # before the step could overwrite anything
    with fence(None, net, seed=0):
        net.weight.data.mul_(2)
    assert torch.equal(net.weight, before)


# -- Python attributes


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


class Connection:
    """Stands for an object of an installed library."""

    def __init__(self):
        self.sent = 0


def test_objects_of_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(Connection, "__module__", "torch.utils.tensorboard.writer")
    net = nn.Linear(1, 1)
    net.connection, net.meter = Connection(), Meter()
    with fence(None, net, seed=0):
        net.connection.sent += 1
        net.meter.update(1.0)
    assert (net.connection.sent, net.meter.mean) == (1, 0.0)


def test_hidden_modules_are_guarded():
    net = nn.Linear(2, 2)
    net.teacher = [nn.Sequential(nn.BatchNorm1d(2))]
    norm = net.teacher[0][0]
    with fence(None, net, seed=0):
        net.teacher[0](torch.randn(4, 2)).sum().backward()
        net.teacher[0].eval()
    assert norm.num_batches_tracked == 0
    assert norm.training
    assert norm.weight.grad is None


def test_training_flags():
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout().eval())
    with fence(None, net, seed=0):
        net.eval()
        net[1].train()
    assert [m.training for m in net.modules()] == [True, True, False]


# -- logging


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


# -- modes


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_whatever_mode_surrounds_the_fence(outer):
    net = cnn()
    x = torch.randn(4, 1, 6, 6)
    with outer(), fence(None, net, seed=0):
        hessian(net(x).square().mean(), [net[8].bias])


def test_second_derivatives_of_embeddings_lstm_and_attention():
    torch.manual_seed(0)
    net = Sequence().double()
    x, y = torch.randint(10, (3, 5)), torch.tensor([0, 1, 2])
    bounded = net.bounded.weight.clone()
    parameters = list(net.parameters())
    with fence(None, net, seed=0):
        gradient = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=True)
        u, v = ([torch.randn_like(p) for p in parameters] for _ in range(2))
        Hu, Hv = (torch.autograd.grad(gradient, parameters, w, retain_graph=True) for w in (u, v))
    uHv, vHu = (sum((a * b).sum() for a, b in zip(one, other, strict=True)) for one, other in ((u, Hv), (v, Hu)))
    assert uHv.item() == pytest.approx(vHu.item(), rel=1e-12)
    assert abs(uHv) > 1e-3
    assert torch.equal(net.bounded.weight, bounded)
    assert (net.embed.sparse, net.bounded.max_norm) == (True, 0.5)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_second_derivative_of_weight_normalisation(norm):
    """The fused kernel's own one is wrong by as much as itself."""
    torch.manual_seed(0)
    net = norm(nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    parameters = list(net.parameters())
    sizes = [p.numel() for p in parameters]

    def gradient(flat):
        torch.nn.utils.vector_to_parameters(flat, parameters)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(net(x), y), parameters)])

    with fence(None, net, seed=0):
        H = hessian(F.cross_entropy(net(x), y), parameters)
    flat, eps = torch.nn.utils.parameters_to_vector(parameters).detach(), 1e-5
    units = torch.eye(sum(sizes)).double()
    expected = torch.stack([(gradient(flat + eps * e) - gradient(flat - eps * e)) / (2 * eps) for e in units])
    assert torch.allclose(H, expected, atol=1e-8)


def test_compiled_code_runs_eagerly_only_inside():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    net = nn.Linear(2, 2)
    step = torch.compile(lambda x: net(x).square().mean(), backend=backend)
    with fence(None, net, seed=0):
        step(torch.randn(3, 2))
    assert compiled == []
    step(torch.randn(3, 2))
    assert len(compiled) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_only_when_asked_for(autocast):
    torch.manual_seed(0)
    plugin = SimpleNamespace(train_step_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    net, x = nn.Linear(8, 8), torch.randn(4, 8)
    with fence(SimpleNamespace(precision_plugin=plugin), net, seed=0, autocast=autocast):
        inside = net(x)
    assert inside.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert not torch.is_autocast_enabled("cpu")


def test_default_dtype_of_true_half_precision_is_entered():
    from pytorch_lightning.plugins.precision import HalfPrecision

    with fence(SimpleNamespace(precision_plugin=HalfPrecision("bf16-true")), nn.Linear(1, 1), seed=0):
        assert torch.zeros(1).dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32


# -- leaving


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_failing_restoration_does_not_keep_the_others_from_running(part, monkeypatch):
    """Whichever step fails, everything that the other parts guard is restored."""

    def sabotaged(enclosure, undo: ExitStack):
        part(enclosure, undo)
        undo.callback(lambda: (_ for _ in ()).throw(OSError("this step failed")))

    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", tuple(sabotaged if p is part else p for p in PARTS))
    module = Stateful()
    module.norm = nn.BatchNorm2d(4)
    before, state, flags = module.snapshot(), torch.get_rng_state(), [m.training for m in module.modules()]

    def upset_everything():
        with fence(None, module, seed=0):
            module.upset()
            module.norm(torch.randn(4, 4, 6, 6))
            module.eval()
            module.requires_grad_(False)

    with pytest.raises(OSError, match="this step failed"):
        upset_everything()
    assert module.snapshot() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert module.norm.num_batches_tracked == 0
    assert [m.training for m in module.modules()] == flags
    assert all(p.requires_grad for p in module.parameters())


def test_a_failing_entrance_leaves_nothing_behind(monkeypatch):
    def failing(enclosure, undo):
        raise OSError("no entrance")

    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", (*PARTS, failing))
    net, state = cnn(), torch.get_rng_state()
    buffers = list(net.buffers())
    with pytest.raises(OSError, match="no entrance"), fence(None, net, seed=0):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    assert all(a is b for a, b in zip(net.buffers(), buffers, strict=True))


def test_costs_less_than_two_milliseconds_and_copies_no_trained_parameter():
    """11.5 million parameters in 73 modules, of the make of a ResNet-18."""
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    net = nn.Sequential(*[_block(a, b) for a, b in widths])
    assert sum(p.numel() for p in net.parameters()) > 11_000_000
    with fence(None, net, seed=0):  # compares the parameters, once
        pass
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        with fence(None, net, seed=0):
            pass
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 2e-3, statistics.median(seconds)


def _block(a: int, b: int) -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, bias=False))
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b)), nn.ReLU())
