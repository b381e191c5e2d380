"""The fence as a whole: generators, leaving it in every way, its cost; tests/live/test_bitwise.py has the Trainers."""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
import pytest
import torch
from fenced_modules import Stateful
from live_models import cnn
from torch import nn

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
