"""Buffers and parameters behind the fence."""

from __future__ import annotations

import warnings

import pytest
import torch
from fenced_modules import hessian
from live_models import cnn
from torch import nn

from lightning_rmt.live.fence import fence


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


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated:DeprecationWarning")
def test_scripted_modules():
    net = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.Linear(3, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with fence(None, net, seed=0):
        net(torch.randn(4, 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


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


def test_a_hidden_teacher_that_requires_gradients_is_guarded_every_time():
    """No optimizer trains it, so that the step moves it itself is no surprise in any fence."""
    net, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    net.teacher = [teacher]
    before = teacher.weight.clone()
    with fence(None, net, seed=0):  # the first one only looks
        pass
    with fence(None, net, seed=0), torch.no_grad():
        teacher.weight.mul_(0.5)
    assert torch.equal(teacher.weight, before)
