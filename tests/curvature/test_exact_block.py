"""Exact blocks against dense Hessians from the definition, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from block_cases import agrees, formed, positions, single, whole
from curvature_cases import CASES, Checkpointed, case, classify, dense_hessian, functional_loss, reseed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_rmt.curvature.double_precision import Slice, in_double
from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.exact_block import (
    CHUNK,
    DECOMPOSITION_SECONDS,
    BlockHessian,
    rows_affordable,
)


@pytest.mark.parametrize("name", CASES)
def test_all_parameters_agree_with_the_dense_hessian(name):
    made = single(name)
    if name == "checkpoint dropout":
        made.loss = lambda batch, loss=made.loss: torch.manual_seed(2) and loss(batch)
    dense = dense_hessian(made)
    slices = whole(made.model)
    reseed()
    matrix, levels = formed(made.loss, made.model, slices, made.batches[0])
    at = positions(made.model, slices)
    expected = dense[at][:, at].numpy()
    scale = np.abs(expected).max() or 1.0
    assert np.abs(matrix - expected).max() <= 1e-12 * scale
    if not name.startswith("linear"):
        agrees(levels, expected)


HEADS = {
    "mlp tanh": ("2.weight", "2.bias"),
    "cnn groupnorm gelu": ("0.weight", "4.bias"),
    "embedding layernorm": ("0.weight", "1.weight", "3.bias"),
    "encoder gelu": ("layer.norm2.weight", "layer.linear2.weight", "head.weight"),
    "lstm": ("cell.weight_hh_l0", "head.weight"),
    "tied": ("embed.weight",),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_block_of_a_float32_model_is_the_submatrix(name):
    """In double, from parameters in single precision, in an order of the block's own."""
    made = single(name)
    made.model.float()
    dense = dense_hessian_of_a_double(made)
    slices = whole(made.model, *HEADS[name])[::-1]
    assert len(slices) == len(HEADS[name])
    at = positions(made.model, slices)
    matrix, levels = formed(made.loss, made.model, slices, made.batches[0])
    expected = dense[np.ix_(at, at)]
    assert np.abs(matrix - expected).max() <= 1e-12 * np.abs(expected).max()
    agrees(levels, expected)
    pieces = [Slice(s.name, s.parameter, tuple(math.ceil(n / 2) for n in s.shape)) for s in slices]
    at = positions(made.model, pieces)
    _, levels = formed(made.loss, made.model, pieces, made.batches[0])
    agrees(levels, dense[np.ix_(at, at)])
    assert levels.eigenvalues.shape == (len(at),)


def dense_hessian_of_a_double(made):
    made.model.double()
    dense = dense_hessian(made).numpy()
    made.model.float()  # exact, since the parameters were float32
    return dense


def test_torch_func_agrees():
    made = single("mlp tanh")
    flat = torch.cat([p.detach().reshape(-1) for p in made.parameters])
    expected = torch.func.jacrev(torch.func.jacrev(functional_loss(made)))(flat).numpy()
    agrees(formed(made.loss, made.model, whole(made.model), made.batches[0])[1], expected)


@pytest.mark.parametrize("keep", [1, 3, CHUNK, CHUNK + 1, 10**6])
def test_keep_takes_the_first_coordinates(keep):
    made = case(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)))
    slices = whole(made.model)
    dense = dense_hessian(made).numpy()[:keep, :keep]
    for timed in (False, True):
        with in_double(made.model.modules(), slices) as leaves:
            block = BlockHessian(made.loss, leaves, made.batches[0])
            if timed:
                assert 0 < block.seconds_per_row() < 1
            agrees(block.levels(keep), dense)


class TestRefusals:
    def test_a_parameter_that_is_reached_past_the_modules(self):
        """A penalty on parameters in a list of the user's would be missing from the block without a word."""
        made = single("mlp tanh")
        listed = list(made.model.parameters())

        def loss(batch):
            return classify(made.model, batch) + sum(p.square().sum() for p in listed)

        with in_double(made.model.modules(), whole(made.model)) as leaves:
            with pytest.raises(ValueError, match=r"a parameter of shape \(.*by another way"):
                BlockHessian(loss, leaves, made.batches[0])

    def test_a_batch_that_requires_gradients_is_fine(self):
        """A gradient penalty."""
        made = single("mlp tanh")

        def loss(batch):
            x = batch[0].detach().clone().requires_grad_()
            value = made.model(x).square().mean()
            return value + torch.autograd.grad(value, x, create_graph=True)[0].square().sum()

        made.loss = loss
        agrees(
            formed(loss, made.model, whole(made.model), made.batches[0])[1],
            dense_hessian(made).numpy(),
        )

    def test_no_second_derivative(self):
        made = case(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        made.loss = lambda batch: torch.cdist(made.model(batch[0]), batch[0]).mean()
        with pytest.raises(CurvatureError, match="cdist_backward"):
            formed(made.loss, made.model, whole(made.model), made.batches[0])

    def test_reentrant_checkpoint(self):
        """The block beyond the checkpoint can be had, the one inside can't."""
        made = case(Checkpointed(True))
        made.batches[0][0].requires_grad_()  # or a reentrant checkpoint warns that no gradient goes through
        dense = dense_hessian(case_like(made, Checkpointed(False))).numpy()
        outer = whole(made.model, "second.0.weight", "head.weight", "head.bias")
        at = positions(made.model, outer)
        agrees(formed(made.loss, made.model, outer, made.batches[0])[1], dense[np.ix_(at, at)])
        with pytest.raises((CurvatureError, ValueError), match=r"reentrant|depends on none"):
            formed(made.loss, made.model, whole(made.model, "first.0.weight"), made.batches[0])

    def test_infinite_entries(self):
        made = single("mlp tanh")
        made.loss = lambda batch: classify(made.model, batch) + sum((p * 0).abs().sqrt().sum() for p in made.parameters)
        with in_double(made.model.modules(), whole(made.model)) as leaves:
            block = BlockHessian(
                lambda b: classify(made.model, b) + sum((p * 0).abs().sqrt().sum() for p in leaves),
                leaves,
                made.batches[0],
            )
            with pytest.raises(ValueError, match="NaN or infinite"):
                block.levels()

    def test_single_precision_leaves(self):
        leaf = torch.ones(3, requires_grad=True)
        with pytest.raises(ValueError, match=r"need float64 parameters, got torch\.float32"):
            BlockHessian(lambda _: leaf.square().sum(), [leaf], None)


def case_like(made, model):
    model.load_state_dict(made.model.state_dict())
    twin = case(model)
    twin.batches, twin.counts = made.batches, made.counts
    twin.loss = lambda batch: classify(model, batch)
    return twin


class Unvectorised(torch.autograd.Function):
    """x squared, through NumPy: vmap knows nothing of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, gradient):
        return UnvectorisedBackward.apply(ctx.saved_tensors[0], gradient)


class UnvectorisedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.save_for_backward(x, gradient)
        return torch.from_numpy(2 * x.detach().numpy() * gradient.detach().numpy())

    @staticmethod
    def backward(ctx, gradient):
        x, first = ctx.saved_tensors
        return torch.from_numpy(2 * first.detach().numpy() * gradient.numpy()), 2 * x * gradient


def test_operations_that_vmap_does_not_know_go_row_by_row():
    made = single("mlp tanh")
    made.loss = lambda batch: F.cross_entropy(Unvectorised.apply(made.model(batch[0])), batch[1])
    twin = single("mlp tanh")
    twin.loss = lambda batch: F.cross_entropy(twin.model(batch[0]).square(), batch[1])
    with in_double(made.model.modules(), whole(made.model)) as leaves:
        block = BlockHessian(made.loss, leaves, made.batches[0])
        agrees(block.levels(), dense_hessian(twin).numpy())
        assert not block._rows._at_once


@given(st.floats(0, 1e3), st.floats(1e-7, 10))
@settings(deadline=None)
def test_rows_affordable_is_the_most_that_fits(seconds, per_row):
    def cost(k):
        return k * per_row + DECOMPOSITION_SECONDS * k**3

    rows = rows_affordable(seconds, per_row)
    assert 0 <= rows < 2**16
    assert rows == 0 or cost(rows) <= seconds
    assert rows == 2**16 - 1 or cost(rows + 1) > seconds
