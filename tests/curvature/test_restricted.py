"""The block of an operator: the rows and columns of some parameters, from the whole operator's own graphs."""

from __future__ import annotations

import pytest
import torch
from curvature_cases import case, classify, dense_hessian, mlp

from lightning_rmt import FiniteDifferenceHessian, GaussNewton, GradientCovariance, Hessian
from lightning_rmt.curvature.restricted import Restricted

GROUPS = [["0.weight", "0.bias"], ["2.weight"], ["2.bias", "0.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]]


def made():
    torch.manual_seed(0)
    return case(mlp(), counts=(6, 3))


def operators(one):
    named = list(one.model.named_parameters())
    return {
        "hessian": Hessian(one.loss, named, one.batches),
        "without graphs": Hessian(one.loss, named, one.batches, keep_graphs=False),
        "differences": FiniteDifferenceHessian(one.loss, named, one.batches),
        "covariance": GradientCovariance(one.loss, named, one.batches),
        "ggn": GaussNewton(
            lambda batch: one.model(batch[0]),
            lambda out, batch: torch.nn.functional.cross_entropy(out, batch[1]),
            named,
            one.batches,
        ),
    }


def places(operator, names):
    parts = torch.arange(operator.size).split(operator.block.sizes)
    return torch.cat([parts[i] for i, name in enumerate(operator.block.names) if name in names])


@pytest.mark.parametrize("kind", ["hessian", "without graphs", "differences", "covariance", "ggn"])
@pytest.mark.parametrize("names", GROUPS, ids=len)
def test_it_is_the_block_of_the_whole(kind, names):
    operator = operators(made())[kind]
    inside = places(operator, names)
    whole = operator.matmat(torch.eye(operator.size, dtype=operator.dtype))
    block = Restricted(operator, names)
    found = block.matmat(torch.eye(block.size, dtype=block.dtype))
    tolerance = 1e-5 if kind == "differences" else 1e-12
    assert (found - whole[inside][:, inside]).abs().max() <= tolerance * whole.abs().max()
    assert block.exact == operator.exact
    assert block.noise == operator.noise
    assert torch.equal(block.gradient, operator.gradient[inside])
    # the whole is as it was
    assert torch.equal(operator.matmat(torch.eye(operator.size, dtype=operator.dtype)), whole)


def test_a_hessian_against_the_dense_one():
    one = made()
    operator = Hessian(one.loss, one.model.named_parameters(), one.batches)
    block = Restricted(operator, ["2.weight", "2.bias"])
    inside = places(operator, ["2.weight", "2.bias"])
    expected = dense_hessian(one)[inside][:, inside]
    assert torch.allclose(block.matmat(torch.eye(block.size).double()), expected, atol=1e-14)


def test_at_once_and_frozen_parameters():
    one = made()
    one.model[0].bias.requires_grad_(False)
    operator = Hessian(one.loss, one.model.named_parameters(), one.batches)
    block = Restricted(operator, ["0.weight", "0.bias"])
    V = torch.randn(3, block.size, dtype=torch.float64)
    apart = block.matmat(V)
    operator.at_once = True
    assert torch.allclose(block.matmat(V), apart, atol=1e-14)
    frozen = places(block, ["0.bias"])
    assert not apart[:, frozen].any()


def test_the_loss_is_not_evaluated_again():
    one, calls = made(), []

    def loss(batch):
        calls.append(1)
        return classify(one.model, batch)

    operator = Hessian(loss, one.model.named_parameters(), one.batches)
    before = len(calls)
    Restricted(operator, ["2.weight"]).matvec(torch.ones(15, dtype=torch.float64))
    assert len(calls) == before


def test_a_parameter_that_is_not_there():
    operator = operators(made())["hessian"]
    with pytest.raises(ValueError, match=r"no parameter 'head'"):
        Restricted(operator, ["2.weight", "head"])
    with pytest.raises(ValueError, match="no parameters were given"):
        Restricted(operator, [])
