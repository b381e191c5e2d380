"""Differences on FSDP2's shards: the Hessian of the whole model, by the same start vectors, and nothing is left behind."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch._dynamo  # FSDP imports it: here, and not in every process that is forked from this one
import torch.distributed as dist
import torch.nn.functional as F
from several_ranks import on_ranks, on_two_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.sharded_differences import ShardedDifferenceHessian
from lightning_rmt.krylov.lanczos import start_vector
from lightning_rmt.probe import check_product, estimate_spectrum

#: Samples on each rank, in each of two batches.
EQUAL, UNEVEN = ((6, 6), (6, 6)), ((9, 2), (4, 6))
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3}


def network(dtype: torch.dtype = torch.float64, kinks: bool = False) -> nn.Sequential:
    """Five rows over two ranks (3 + 2), one over two (1 + 0), and a layer in the root's own group."""
    torch.manual_seed(0)
    act = nn.ReLU() if kinks else nn.Tanh()
    net = nn.Sequential(
        nn.Linear(4, 8), act, nn.LayerNorm(8), nn.Linear(8, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1)
    )
    return net.to(dtype)


def sharded(net: nn.Sequential) -> nn.Sequential:
    fully_shard(net[0])
    fully_shard(net[3])
    return fully_shard(net)


def loss_of(net: nn.Module) -> Any:
    return lambda batch: F.mse_loss(torch.tanh(net(batch[0])), batch[1])


def batches(samples: tuple[int, ...], rank: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [tuple(torch.randn(n, d, generator=generator).to(dtype) for d in (4, 1)) for n in samples]


def start(timeout: int = 30) -> int:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    return dist.get_rank()


def whole(operator: ShardedDifferenceHessian, part: Tensor) -> Tensor:
    """The whole vector from everyone's parts, by where they say that these lie."""
    vector = torch.zeros(operator.size, dtype=part.dtype)
    place = 0
    for first, last in operator.shards.segments:
        vector[first:last] = part[place : place + last - first]
        place += last - first
    assert place == part.numel()
    dist.all_reduce(vector)
    return vector


def products_on_this_rank(dtype: torch.dtype, shares: Any, weights: str) -> dict[str, Any]:
    rank = start()
    net = network(dtype)
    exact = copy.deepcopy(net).double().eval()
    net = sharded(net.eval())
    operator = ShardedDifferenceHessian(
        loss_of(net), net.named_parameters(), batches(shares[rank], rank, dtype), net, weights=weights
    )
    # The exact mean over all ranks, in this process.
    everyones = [[tuple(t.double() for t in b) for b in batches(s, r, dtype)] for r, s in enumerate(shares)]
    parts = [Hessian(loss_of(exact), exact.parameters(), b) for b in everyones]
    c = [p.samples if weights == "samples" else 1.0 for p in parts]

    def mean(of: Any) -> Any:
        return sum(w * of(p) for w, p in zip(c, parts, strict=True)) / sum(c)

    v = start_vector(operator, 3)
    eigenvalues = torch.linalg.eigvalsh(mean(lambda p: p.matmat(torch.eye(p.size, dtype=torch.float64))))
    spectrum = estimate_spectrum(operator, steps=20, seed=3)
    return {
        "vector": whole(operator, v),
        "expected vector": start_vector(parts[0], 3),
        "product": whole(operator, operator.matvec(v)),
        "expected": mean(lambda p: p.matvec(start_vector(p, 3))),
        "gradient": whole(operator, operator.gradient),
        "expected gradient": mean(lambda p: p.gradient),
        "loss": (operator.loss_value, mean(lambda p: p.loss_value)),
        "samples": operator.samples,
        "sizes": (operator.size, operator.shards.local_size),
        "error": operator.product_error,
        "check": check_product(operator).ok,
        "lambda_max": (spectrum.lambda_max.value, spectrum.lambda_max.residual, float(eigenvalues[-1])),
    }


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(
    ("dtype", "shares", "weights"),
    [(torch.float64, EQUAL, "equal"), (torch.float64, UNEVEN, "samples"), (torch.float32, UNEVEN, "equal")],
)
def test_products_are_those_of_the_whole_model(dtype, shares, weights, tmp_path):
    one, two = on_two_ranks(products_on_this_rank, tmp_path, dtype, shares, weights)
    for seen in (one, two):
        assert distance(seen["vector"], seen["expected vector"]) < 1e-7  # drawn in float32 by both
        assert distance(seen["product"], seen["expected"]) < TOLERANCE[dtype]
        assert distance(seen["gradient"], seen["expected gradient"]) < 1e-5
        assert seen["error"] < TOLERANCE[dtype]
        assert seen["loss"][0] == pytest.approx(seen["loss"][1], rel=1e-5)
        assert seen["samples"] == sum(map(sum, shares))
        assert seen["check"]
        found, error, expected = seen["lambda_max"]
        assert abs(found - expected) <= max(error, seen["error"] * expected)
    assert one["sizes"][0] == two["sizes"][0] == one["sizes"][1] + two["sizes"][1]
    assert one["sizes"][1] > two["sizes"][1] > 0  # uneven: the first rank has the odd rows
    assert one["lambda_max"] == two["lambda_max"]
    assert torch.equal(one["product"], two["product"])


def dense_on_this_rank(ranks: int, layers: tuple[str, ...]) -> tuple[Tensor, Tensor, int, float]:
    """All rows of some parameters' matrix, one of them frozen."""
    rank = start()
    net = network()
    net[6].bias.requires_grad_(False)
    exact = copy.deepcopy(net).eval()
    net = sharded(net.eval())
    chosen = [(n, p) for n, p in net.named_parameters() if n.startswith(layers)]
    operator = ShardedDifferenceHessian(loss_of(net), chosen, batches((8,), rank, torch.float64), net)
    selected = [p for n, p in exact.named_parameters() if n.startswith(layers)]
    parts = [Hessian(loss_of(exact), selected, batches((8,), r, torch.float64)) for r in range(ranks)]
    eye = torch.eye(operator.size, dtype=torch.float64)
    entries = torch.cat([torch.arange(*segment) for segment in operator.shards.segments])
    mine = torch.zeros(operator.size, operator.shards.local_size, dtype=torch.float64)
    mine[:, : entries.numel()] = eye[:, entries]
    found = torch.stack([whole(operator, column[: entries.numel()]) for column in operator.matmat(mine)])
    seen = estimate_spectrum(operator, steps=operator.size)
    return found, sum(p.matmat(eye) for p in parts) / ranks, entries.numel(), seen.lambda_max.value


@pytest.mark.parametrize(("ranks", "layers"), [(3, ("3.bias", "6.")), (2, ("6.",))])
def test_the_whole_matrix_of_some_parameters(ranks, layers, tmp_path):
    """On three ranks, and on two of which the second holds nothing."""
    seen = on_ranks(ranks, dense_on_this_rank, tmp_path, ranks, layers)
    for found, expected, _, largest in seen:
        assert torch.allclose(found, expected, rtol=0, atol=1e-8)
        assert found.abs().max() > 0.01
        assert largest == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-7)
    held = [entries for _, _, entries, _ in seen]
    assert held == ([8, 2, 1] if ranks == 3 else [6, 0])
    assert sum(held) == seen[0][0].shape[0]


class Fails(Exception):
    """In the middle of a pass."""


def fail(*_: Any) -> None:
    raise Fails


def state_of(net: nn.Module) -> list[Any]:
    """All that a pass could leave behind: bits, objects, versions, FSDP's settings and state."""
    seen: list[Any] = [torch.get_rng_state().tolist()]
    for p in net.parameters():
        seen.append((id(p), p._version, p._local_tensor._version, p._local_tensor.tolist(), id(p.grad)))
        seen.append((None if p.grad is None else p.grad._local_tensor.tolist(), id(p._post_accumulate_grad_hooks)))
    for state in (m._get_fsdp_state() for m in (net, net[0], net[3])):
        context, shared = state._state_ctx, state._comm_ctx
        seen.append((state._training_state, context.iter_forward_root, context.is_last_backward))
        seen.append((context.post_backward_final_callback_queued, len(shared.post_forward_order)))
        seen.append((getattr(shared, "all_gather_state", None), len(getattr(shared, "reduce_scatter_states", []))))
        for g in state._fsdp_param_groups:
            seen.append((g.reduce_grads, g.all_reduce_grads, g.reshard_after_backward, g.gradient_divide_factor))
            seen.append((g._training_state, g._all_gather_result, g._post_reduce_event, g.is_sharded))
            for p in g.fsdp_params:
                waiting = p._unsharded_param.grad
                seen.append(
                    (None if waiting is None else (id(waiting), waiting.tolist()), p.unsharded_accumulated_grad)
                )
    return seen


def trained(middle: str) -> dict[str, Any]:
    """Training with something in the middle, at a point where gradients and settings are there to be lost."""
    rank = start()
    net = sharded(network(torch.float32))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loss, steps = loss_of(net), batches((5,) * 8, rank, torch.float32)

    def step(index: int) -> None:
        optimizer.zero_grad()
        loss(steps[index]).backward()
        optimizer.step()

    step(0)
    step(1)
    loss(steps[2]).backward()  # onto gradients that are there
    net.set_requires_gradient_sync(False)
    net.set_gradient_divide_factor(3.0)
    loss(steps[3]).backward()  # and one that waits to be reduced
    net.set_is_last_backward(False)
    stepped = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(stepped.append)
    before, seen = state_of(net), {"whole passes": set()}

    def watched(batch: Any) -> Tensor:
        seen["whole passes"].add(net._get_fsdp_state()._state_ctx.is_last_backward)
        return loss(batch)

    if middle == "products":
        operator = ShardedDifferenceHessian(watched, net.named_parameters(), steps[4:6], net)
        seen["product"] = operator.matvec(start_vector(operator, 0))
    elif middle != "nothing":
        where = net[2] if middle.endswith("inner") else net[5]
        operator = ShardedDifferenceHessian(loss, net.named_parameters(), steps[4:5], net)
        register = where.register_full_backward_hook if "backward" in middle else where.register_forward_hook
        handle = register(fail)
        with pytest.raises(Fails):
            operator.matvec(start_vector(operator, 0))
        with pytest.raises(Fails):
            ShardedDifferenceHessian(loss, net.named_parameters(), steps[4:5], net)
        handle.remove()
    after = state_of(net)
    seen["changed"] = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    seen["stepped"] = len(stepped)
    for p in net.parameters():
        p._post_accumulate_grad_hooks = None
    net.set_requires_gradient_sync(True)
    net.set_is_last_backward(True)
    net.set_gradient_divide_factor(2.0)  # gloo knows no other
    loss(steps[6]).backward()
    optimizer.step()
    step(7)
    seen["trained"] = [(p._local_tensor.tolist(), p.grad._local_tensor.tolist()) for p in net.parameters()]
    return seen


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return on_two_ranks(trained, tmp_path_factory.mktemp("control"), "nothing")


@pytest.mark.parametrize("middle", ["products", "error in forward", "error in backward", "error in forward, inner"])
def test_training_goes_on_bitwise(middle, control, tmp_path):
    for seen, without in zip(on_two_ranks(trained, tmp_path, middle), control, strict=True):
        assert seen["changed"] == []
        assert seen["stepped"] == 0
        assert seen["trained"] == without["trained"]
        if middle == "products":
            assert seen["product"].abs().max() > 0
            assert seen["whole passes"] == {True}  # or nobody would wait for what is reduced on a GPU


def refused_on_this_rank() -> dict[str, str]:
    """What every rank is told, though only one of them has the reason; none waits for another."""
    rank = start()
    said = {}

    def refused(name: str, net: nn.Module, *, loss: Any = None, samples: Any = (6,), **options: Any) -> None:
        try:
            named = options.pop("named", None) or net.named_parameters()
            data = batches(samples, rank, torch.float64)
            ShardedDifferenceHessian(loss or loss_of(net), named, data, net, **options)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    refused("kinks", sharded(network(kinks=True).eval()))
    net = sharded(network().eval())
    hidden = lambda batch: torch.where((out := net(batch[0])) > 0, 2 * out, 0.3 * out).square().mean() * 1.0  # noqa: E731
    refused("hidden kinks", net, loss=lambda b: hidden(b) + torch.abs(net(b[0]) - 0.05).mean())
    refused("not finite", net, loss=lambda b: loss_of(net)(b) * (float("inf") if rank else 1.0))
    refused("another number of batches", net, samples=(6,) * (1 + rank))
    refused("no batches", net, samples=())
    refused("fails on one rank", net, loss=lambda b: loss_of(net)(b) if rank == 0 else net(b[0])[:, 9].mean())
    refused("whole", net, named=list(network().named_parameters()))
    refused("half precision", sharded(network(torch.bfloat16).eval()))
    refused("fine", net)
    return said


def test_refusals_are_said_on_every_rank(tmp_path):
    one, two = on_two_ranks(refused_on_this_rank, tmp_path)
    for said in (one, two):
        assert said.keys() == {
            "kinks", "hidden kinks", "not finite", "another number of batches", "no batches", "fails on one rank", "whole",
            "half precision",
        }  # fmt: skip
        assert said["kinks"].startswith(f"{CurvatureError.__name__}: finite differences can't be trusted")
        assert "(Relu)" in said["kinks"]
        assert said["hidden kinks"].startswith(CurvatureError.__name__)
        assert "inf on some rank" in said["not finite"]
        assert "1 to 2 batches" in said["another number of batches"]
        assert "no batches" in said["no batches"]
        assert "isn't sharded" in said["whole"]
        assert "half precision" in said["half precision"]
    assert "on another rank" in one["fails on one rank"]
    assert said["fails on one rank"].startswith("IndexError")
