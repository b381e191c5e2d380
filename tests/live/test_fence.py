"""The fence as a whole: generators, leaving it in every way, its cost; tests/live/test_bitwise.py has the Trainers."""

from __future__ import annotations

import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fenced_modules import Logger, Module, Stateful
from live_models import cnn
from nasty_models import Sequence
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_rmt.live.fence
from lightning_rmt.live.fence import PARTS, fence


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


def trace(module, trainer):
    """Whatever a part of the fence sets, by identity."""
    kernels = (torch._weight_norm, sys.modules["torch.nn.utils.weight_norm"]._weight_norm)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    flags = (torch.backends.cuda.flash_sdp_enabled(), torch._dynamo.eval_frame._stance.stance)
    spaces = [*(m.__dict__ for m in module.modules()), *(m._buffers for m in module.modules()), trainer.__dict__]
    objects = [(name, id(value)) for space in spaces for name, value in sorted(space.items())]
    tensors = [(id(p), id(p.grad), p.requires_grad, p.data_ptr()) for p in module.parameters()]
    states = torch.get_rng_state().sum().item(), repr(np.random.get_state()), random.getstate()
    return kernels, modes, flags, objects, tensors, states


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@pytest.mark.parametrize("replaced", [False, True])
def test_each_part_alone_leaves_no_trace(part, replaced, monkeypatch):
    """Some parts restore what others guard too; none may rely on it."""
    module = Module()
    module.inner = Sequence()
    if replaced:
        module.log, module._current_fx_name = print, "on_train_start"
    module.weight.grad = torch.ones(1, 1)
    plugin = SimpleNamespace(train_step_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    trainer = SimpleNamespace(_loggers=[Logger()], profiler=object(), precision_plugin=plugin)
    before = trace(module, trainer)
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", (part,))
    with fence(trainer, module, seed=0):
        pass
    assert trace(module, trainer) == before


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_failing_restoration_does_not_keep_the_others_from_running(part, monkeypatch):
    """Whichever step fails, everything that the other parts guard is restored."""

    def sabotaged(enclosure, undo):
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


class Copied(TorchDispatchMode):
    """Counts the elements that clones and copies have written."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.elements += result.numel()
        return result


def test_copies_buffers_but_no_trained_parameter_and_takes_little_time():
    """11.5 million parameters in 73 modules, of the make of a ResNet-18; 1.3 ms where nothing else runs."""
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    net = nn.Sequential(*[_block(a, b) for a, b in widths])
    assert sum(p.numel() for p in net.parameters()) > 11_000_000
    with fence(None, net, seed=0):  # compares the parameters, once
        pass
    with Copied() as copied, fence(None, net, seed=0):
        pass
    assert copied.elements == sum(b.numel() for b in net.buffers())
    seconds, copying = [], []  # in turn, so that a busy machine slows both
    for _ in range(30):
        begin = time.process_time()
        with fence(None, net, seed=0):
            pass
        seconds.append(time.process_time() - begin)
        begin = time.process_time()
        _ = [p.detach().clone() for p in net.parameters()]
        copying.append(time.process_time() - begin)
    assert min(seconds) < min(copying) / 2


def _block(a: int, b: int) -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(a, b, 3, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, bias=False))
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.Sequential(nn.Conv2d(a, b, 1), nn.BatchNorm2d(b)), nn.ReLU())
