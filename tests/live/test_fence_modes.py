"""Inside the fence a loss can be differentiated twice, in the precision that was asked for."""

from __future__ import annotations

from types import BuiltinFunctionType, SimpleNamespace

import pytest
import torch
from fenced_modules import hessian
from live_models import cnn
from nasty_models import Sequence
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_rmt.live.fence import fence


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
        assert torch.equal(net.bounded.weight, bounded)
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
    assert isinstance(torch._weight_norm, BuiltinFunctionType)  # the kernel is back


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


def test_for_first_derivatives_compiled_code_runs_compiled_and_none_is_compiled_anew():
    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *values: ran.append(1) or graph.forward(*values)

    torch._dynamo.reset()
    net = nn.Linear(2, 2)
    step = torch.compile(lambda x: net(x).square().mean(), backend=backend)
    with fence(None, net, seed=0, first_order=True):
        step(torch.randn(3, 2))
    assert (compiled, ran) == ([], [])
    step(torch.randn(3, 2))
    assert (len(compiled), len(ran)) == (1, 1)
    with fence(None, net, seed=0, first_order=True):
        step(torch.randn(3, 2))  # what is there is used
        step(torch.randn(3, 2).double().float().requires_grad_())  # what isn't is not made
    assert (len(compiled), len(ran)) == (1, 2)


@pytest.mark.parametrize("first_order", [False, True])
def test_attention_kernel(first_order):
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    fused = "ScaledDotProductFlashAttention"
    if fused not in type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__:
        pytest.skip("no fused attention kernel on this CPU")
    with fence(None, nn.Linear(1, 1), seed=0, first_order=first_order):
        assert (fused in type(F.scaled_dot_product_attention(q, q, q).grad_fn).__name__) is first_order


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
