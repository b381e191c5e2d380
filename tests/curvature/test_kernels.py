from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from types import BuiltinFunctionType

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.kernels import twice_differentiable_kernels


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_hessian_of_a_weight_normalised_layer(norm):
    """Differences of first derivatives, which the fused kernel has right, are the truth; its second ones aren't."""
    torch.manual_seed(0)
    net = norm(nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])

    def loss(batch):
        return cross_entropy(net(x), y)

    H = Hessian(loss, net.named_parameters(), [x])
    eye = torch.eye(H.size, dtype=torch.float64)
    dense = H.matmat(eye)
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12)
    expected = FiniteDifferenceHessian(loss, net.named_parameters(), [x]).matmat(eye)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-6)

    parameters = list(net.parameters())  # the control: without the composed kernel it is wrong
    gradient = torch.autograd.grad(loss(x), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    fused = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    assert (fused - expected).abs().max() > 0.05 * expected.abs().max()

    for owner in (torch, sys.modules["torch.nn.utils.weight_norm"]):
        assert isinstance(owner._weight_norm, BuiltinFunctionType)  # the kernel is back


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 2)])
def test_composed_batch_norm_is_the_fused_one(shape, affine, training):
    """Values, running statistics, first and second derivatives."""
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    x, weights = torch.randn(shape).double().requires_grad_(), torch.randn(shape).double()
    found = []
    for composed in (False, True):
        torch.manual_seed(1)
        norm = kind(3, affine=affine, momentum=0.3).double().train(training)
        with torch.no_grad():
            for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
                tensor.add_(torch.rand(3).double())
        leaves = [x, *norm.parameters()]
        with twice_differentiable_kernels() if composed else nullcontext():
            y = norm(x)
            slopes = torch.autograd.grad((y.tanh() * weights).sum(), leaves, create_graph=True)
            bent = torch.autograd.grad(sum((s.sin()).sum() for s in slopes), leaves)
        found.append([y, *slopes, *bent, norm.running_mean, norm.running_var, norm.num_batches_tracked])
    for fused, own in zip(*found, strict=True):
        torch.testing.assert_close(own, fused, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_without_running_statistics_or_in_another_precision(track):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3, track_running_stats=track, momentum=None)
    x = torch.randn(6, 3)
    expected = copy.deepcopy(norm)(x)
    with twice_differentiable_kernels():
        torch.testing.assert_close(norm(x), expected)
        if track:
            assert norm.eval()(x.to(torch.bfloat16)).dtype == torch.bfloat16  # the fused kernel's to mix
    assert isinstance(torch.batch_norm, BuiltinFunctionType)


def test_a_gradient_penalty_through_batch_norm_has_the_right_hessian():
    """It needs a third derivative of the norm, which the fused kernel has wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(5, 2).double()

    def loss(batch):
        at = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        return slope.square().mean()

    H = Hessian(loss, net.named_parameters(), [x])
    dense = H.matmat(torch.eye(H.size, dtype=torch.float64))
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-12)
    eye = torch.eye(H.size, dtype=torch.float64)
    step, columns = 1e-5, []
    for direction in eye:
        gradients = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, part in zip(net.parameters(), H.block.split(direction), strict=True):
                    p.add_(part, alpha=sign * step)
            gradients.append(Hessian(loss, net.named_parameters(), [x]).gradient)
            with torch.no_grad():
                for p, part in zip(net.parameters(), H.block.split(direction), strict=True):
                    p.sub_(part, alpha=sign * step)
        columns.append((gradients[0] - gradients[1]) / (2 * step))
    torch.testing.assert_close(dense, torch.stack(columns), rtol=0, atol=1e-6 * float(dense.abs().max()))
