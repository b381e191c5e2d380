"""What rounding does to an exact block: bounded where it is reported, and refused where it isn't that of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from block_cases import agrees, entries, formed, whole
from curvature_cases import case, classify, dense_hessian
from torch import nn

from lightning_rmt.curvature.double_precision import in_double
from lightning_rmt.curvature.exact_block import NOISE_IN_ROUNDINGS, BlockHessian, spectral_norm


def network(kind, seed):
    """Partly trained, in float32, with a batch in float64."""
    torch.manual_seed(seed)
    x, y = torch.randn(64, 10), torch.randint(5, (64,))
    net = {
        "deep": lambda: nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 5)),
        "norm": lambda: nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5)),
        "relu": lambda: nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 5)),
        "head": lambda: nn.Sequential(nn.Linear(10, 5)),
    }[kind]()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net, x.double(), y


def in_single(where, net, leaves, x, y):
    """The loss as float64, with a part of it computed in float32; `where` says which, None for none."""
    if where == "everywhere":
        names = [name for name, _ in net.named_parameters()]
        weights = {name: leaf.float() for name, leaf in zip(names, leaves, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, weights, (x.float(),)), y).double()
    h = net[0](x)
    for layer in net[1:]:
        h = layer(torch.tanh(h.float()).double() if where == "first layer" and layer is net[1] else h)
    return F.cross_entropy(h.float() if where == "logits" else h, y).double()


@pytest.mark.parametrize("kind", ["deep", "norm", "relu", "head"])
@pytest.mark.parametrize("where", ["logits", "first layer", "everywhere"])
def test_the_noise_bounds_the_error_in_float32(kind, where, monkeypatch):
    """With the refusal of lower precision out of the way: it is measured where rounding can be seen."""
    if (kind, where) == ("head", "first layer"):
        where = "logits"
    monkeypatch.setattr("lightning_rmt.curvature.exact_block._COARSE", ())
    for seed in range(4):
        net, x, y = network(kind, seed)
        with in_double(net.modules(), whole(net)) as leaves:

            def loss(part, net=net, leaves=leaves, x=x, y=y):
                h = torch.tanh(net[0](x)) if where == "first layer" and part is None else None
                return F.cross_entropy(net[1:](h), y) if h is not None else in_single(part, net, leaves, x, y)

            truth = entries(BlockHessian(loss, leaves, None))
            coarse = BlockHessian(loss, leaves, where)
            matrix, noise = entries(coarse), coarse.levels().noise
        error, norm = np.linalg.norm((matrix + matrix.T) / 2 - truth, 2), np.linalg.norm(truth, 2)
        assert 1e-9 * norm < error
        assert error <= max(noise, NOISE_IN_ROUNDINGS * torch.finfo(torch.float32).eps * norm)
        assert noise <= 300 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", [False, True])
def test_lower_precision_is_refused_even_where_the_loss_is_double_again(dtype, back):
    net, x, y = network("deep", 0)

    def loss(_):
        h = net[:2](x).to(dtype)
        return F.cross_entropy(net[2:](h.double()), y) if back else h.square().mean()

    with in_double(net.modules(), whole(net)) as leaves:
        with pytest.raises(ValueError, match=f"computed in {dtype} between the block"):
            BlockHessian(loss, leaves, None)


def test_lower_precision_before_the_block_does_no_harm():
    net, x, y = network("deep", 0)
    slices = whole(net, "4.weight", "4.bias")
    levels = formed(lambda _: F.cross_entropy(net[4](net[:4](x).float().double()), y), net, slices)[1]
    net.double()
    made = case(net[4])
    made.loss = lambda batch: classify(made.model, batch)
    made.batches, made.counts = [(net[:4](x).float().double().detach(), y)], [len(y)]
    agrees(levels, dense_hessian(made).numpy())


def test_spectral_norm():
    a = np.random.default_rng(1).standard_normal((60, 60))
    assert spectral_norm(a - a.T) == pytest.approx(np.linalg.norm(a - a.T, 2), rel=0.1)
    assert spectral_norm(np.zeros((5, 5))) == 0.0
