"""Which layers are nearest to the loss, and how large a piece of them is taken."""

from __future__ import annotations

import math

import pytest
import torch
from curvature_cases import Checkpointed, Partial, Tied, build, classify, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_rmt.curvature.exact_block import leading_piece, nearest_layer, steps_to_loss


def steps(made):
    found = steps_to_loss(made.loss(made.batches[0]), made.model.parameters())
    return {name: found[id(p)] for name, p in made.model.named_parameters() if id(p) in found}


class TestStepsToLoss:
    def test_later_layers_are_nearer(self):
        found = steps(build("mlp tanh"))
        assert found["2.weight"] < found["0.weight"]
        assert found["2.bias"] < found["0.bias"]

    @pytest.mark.parametrize("name", ["encoder gelu", "cnn batchnorm train", "lstm", "checkpoint sdpa"])
    def test_the_head_is_nearest(self, name):
        found = steps(build(name))
        last = list(found)[-2:]
        assert max(found[n] for n in last) < min(value for n, value in found.items() if n not in last)

    def test_a_tied_embedding_is_as_far_as_its_farther_use(self):
        made = build("tied")
        found = steps(made)
        assert isinstance(made.model, Tied)
        assert found["embed.weight"] > found["norm.weight"]

    def test_a_residual_is_as_far_as_its_longer_way(self):
        first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
        h = first.sin()
        loss = (h + (h * second).cos().exp()).sum()
        found = steps_to_loss(loss, [first, second])
        assert found[id(first)] == found[id(second)] + 1

    def test_frozen_unused_and_constant_parameters_are_missing(self):
        made = build("frozen and unused")
        assert isinstance(made.model, Partial)
        assert {name.partition(".")[0] for name in steps(made)} == {"used", "head"}

    def test_a_reentrant_checkpoint_hides_what_is_in_it(self):
        torch.manual_seed(0)
        model = Checkpointed(True)
        x = torch.randn(4, 4, requires_grad=True)
        found = steps_to_loss(classify(model, (x, torch.tensor([0, 1, 2, 0]))), model.parameters())
        near = [name for name, p in model.named_parameters() if id(p) in found]
        assert near == ["second.0.weight", "second.0.bias", "head.weight", "head.bias"]

    def test_a_loss_that_is_linear_in_everything(self):
        found = steps(build("linear in all"))
        assert set(found) == {"weight", "bias"}


def chosen(model, distances=None, *, fewest=256, most=1024):
    """(name, shape) of the pieces, for layers that are nearer the later they come, unless said otherwise."""
    named = dict(model.named_parameters())
    if distances is None:
        distances = {id(p): -i for i, p in enumerate(named.values())}
    slices = nearest_layer(named, distances, fewest=fewest, most=most)
    assert all(named[s.name] is s.parameter for s in slices)
    return {s.name: s.shape for s in slices}


class TestNearestLayer:
    def test_one_layer_that_is_large_enough(self):
        net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
        assert chosen(net) == {"1.bias": (10,), "1.weight": (10, 64)}

    def test_whole_layers_until_there_are_enough(self):
        net = nn.Sequential(nn.Linear(20, 20), nn.Linear(10, 20), nn.Linear(20, 3))
        assert list(chosen(net)) == ["2.bias", "2.weight", "1.bias", "1.weight"]

    def test_the_layer_beyond_the_limit_is_cut(self):
        net = nn.Sequential(nn.Linear(400, 20), nn.Linear(20, 3))
        found = chosen(net)
        assert list(found) == ["1.bias", "1.weight", "0.bias", "0.weight"]
        assert found["1.weight"] == (3, 20)
        assert found["0.bias"] == (20,)
        assert found["0.weight"] == (20, 47)
        assert 63 + 20 + 20 * 47 <= 1024

    def test_a_huge_head_is_a_leading_piece(self):
        net = nn.Linear(768, 50257, bias=False)
        assert chosen(net) == {"weight": (32, 32)}
        assert chosen(nn.Linear(768, 50257), most=1000) == {"bias": (1000,)}

    def test_a_tiny_model_is_all_there_is(self):
        assert sum(math.prod(s) for s in chosen(mlp()).values()) == sum(p.numel() for p in mlp().parameters())
        assert chosen(mlp(), {}) == {}

    def test_layers_without_a_distance_are_left_out(self):
        net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 10))
        near = {id(p): 3 for p in net[0].parameters()}
        assert list(chosen(net, near, most=4096)) == ["0.bias", "0.weight"]

    def test_a_layer_is_as_far_as_its_farthest_parameter(self):
        net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        distances = {id(net[0].weight): 9, id(net[0].bias): 1, id(net[1].weight): 5, id(net[1].bias): 5}
        assert list(chosen(net, distances)) == ["1.bias", "1.weight"]


@given(st.lists(st.integers(1, 60), max_size=4).map(tuple), st.integers(1, 1500))
@settings(deadline=None, max_examples=300)
def test_leading_piece(shape, most):
    piece = leading_piece(shape, most)
    assert len(piece) == len(shape)
    assert all(1 <= n <= full for n, full in zip(piece, shape, strict=True))
    size = math.prod(piece)
    assert size <= most
    if math.prod(shape) <= most:
        assert piece == shape
        return
    cut = [n for n, full in zip(piece, shape, strict=True) if n < full]
    assert max(piece) - min(cut) <= 1  # what is cut is about as long as the longest, and nothing else is longer
    longer = min(range(len(piece)), key=lambda i: (piece[i] == shape[i], piece[i]))
    assert size // piece[longer] * (piece[longer] + 1) > most or len(cut) > 1


def test_leading_piece_of_a_large_tensor_is_quick():
    assert leading_piece((50257, 768), 1024) == (32, 32)
    assert leading_piece((512, 512, 3, 3), 1024) == (10, 11, 3, 3)
    assert leading_piece((), 5) == ()
    assert leading_piece((7,), 5) == (5,)
