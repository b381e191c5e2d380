from __future__ import annotations

import sys
from types import BuiltinFunctionType

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.hessian import Hessian


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
