"""Parameters sharded by FSDP2 are whole inside `unsharded`, and sharded bitwise as before afterwards."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import digest
from several_ranks import on_two_ranks
from torch import nn

from lightning_rmt.live.sharding import unsharded


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def sharded_network() -> nn.Sequential:
    """Two layers in groups of their own, that are sharded again after their forward pass, the rest in the root's."""
    from torch.distributed.fsdp import fully_shard

    net = network()
    fully_shard(net[0])
    fully_shard(net[2])
    return fully_shard(net)


def loss(net: nn.Module, batch: int = 0) -> torch.Tensor:
    return net(torch.randn(6, 5, generator=torch.Generator().manual_seed(batch))).square().mean()


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    optimizer.zero_grad()
    loss(net).backward()
    optimizer.step()
    return digest([(p.grad, p) for p in net.parameters()])


def gradient_and_product(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = list(net.parameters())
    assert all(type(p) is nn.Parameter for p in parameters)
    value = loss(net)
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))  # still whole after a forward pass
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    v = [torch.randn(p.shape, generator=generator) for p in parameters]
    for _ in range(2):  # the graph is used again: a group that was sharded in between would have lost its memory
        product = torch.autograd.grad(gradient, parameters, v, retain_graph=True)
    return tuple(torch.cat([t.detach().reshape(-1) for t in ts]) for ts in (gradient, product))


def settings(net: nn.Module) -> list[object]:
    """All that steers FSDP's passes and that a pass leaves behind."""
    seen = []
    for state in (m._get_fsdp_state() for m in (net, net[0], net[2])):
        g, order = state._fsdp_param_group, len(state._comm_ctx.post_forward_order)
        seen.append((g.post_forward_mesh_info, g.reshard_after_backward, g.reduce_grads, g.all_reduce_grads))
        seen.append((state._state_ctx.iter_forward_root, state._training_state, g._training_state))
        seen.append((order, len(g._post_forward_indices), g.is_sharded))
    return seen


def _fail(*_: object) -> None:
    raise OSError("inside")


def trained(middle: str) -> dict[str, object]:
    """Three training steps, with something in the middle; what is left of it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    net = sharded_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    seen: dict[str, object] = {"steps": [step(net, optimizer)]}
    before, settings_before = digest([(p, p.grad) for p in net.parameters()]), settings(net)
    gradients = [p.grad for p in net.parameters()]
    if middle == "products":
        whole = [p.full_tensor() for p in net.parameters()]
        with unsharded(net):
            seen["products"] = gradient_and_product(net)
        reference = network()
        for p, value in zip(reference.parameters(), whole, strict=True):
            p.data.copy_(value)
        seen["expected"] = gradient_and_product(reference)
    elif middle == "forward only":
        with unsharded(net):
            loss(net)
    elif middle.startswith("error"):
        register = net[3].register_forward_hook if middle.endswith("forward") else net[1].register_full_backward_hook
        handle = register(_fail)
        with pytest.raises(OSError, match="inside"), unsharded(net):
            gradient_and_product(net)
        handle.remove()
    seen["unchanged"] = before == digest([(p, p.grad) for p in net.parameters()]) and settings_before == settings(net)
    seen["same gradients"] = all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    seen["sharded"] = all(type(p).__name__ != "Parameter" or hasattr(p, "_local_tensor") for p in net.parameters())
    seen["steps"] += [step(net, optimizer) for _ in range(2)]
    return seen


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return on_two_ranks(trained, tmp_path_factory.mktemp("control"), "nothing")


@pytest.mark.parametrize("middle", ["products", "forward only", "error in forward", "error in backward"])
def test_sharded_training_goes_on_bitwise(middle, control, tmp_path):
    for seen, without in zip(on_two_ranks(trained, tmp_path, middle), control, strict=True):
        assert seen["unchanged"]
        assert seen["same gradients"]
        assert seen["sharded"]
        assert seen["steps"] == without["steps"]
        if middle == "products":
            for found, expected in zip(seen["products"], seen["expected"], strict=True):
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
                assert found.abs().max() > 1e-3


def accumulated(probed: bool) -> str:
    """Two batches' gradients, of which only the second is to be reduced, and perhaps a product in between."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    net = sharded_network()
    net.set_requires_gradient_sync(False)
    loss(net, 1 + dist.get_rank()).backward()
    net.set_requires_gradient_sync(True)
    if probed:
        with unsharded(net):
            gradient_and_product(net)
    loss(net, 3 + dist.get_rank()).backward()
    return digest([p.grad for p in net.parameters()])


def test_gradients_that_are_still_accumulated_locally_stay_so(tmp_path):
    assert on_two_ranks(accumulated, tmp_path, True) == on_two_ranks(accumulated, tmp_path, False)


def test_nothing_happens_to_an_ordinary_module():
    net = network()
    before = list(net.parameters())
    with unsharded(net):
        loss(net)
    assert all(a is b for a, b in zip(net.parameters(), before, strict=True))
