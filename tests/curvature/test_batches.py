"""Sample counts and micro-batches of every container a data loader may yield."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_rmt.curvature.batches import micro_batches, sample_count

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: torch.Tensor
    x: torch.Tensor
    texts: list[str]


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x", "y")
    x: Any
    y: Any


class Plain:
    def __init__(self, x):
        self.name = "name"
        self.itself = self
        self.x = x


X = torch.arange(10.0).view(5, 2)
Y = torch.arange(5)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 5),
        ((X, Y), 5),
        ([torch.tensor(3.0), None, "text", 7, X], 5),
        ({"temperature": torch.tensor(1.0), "x": X}, 5),
        (UserDict(x=X), 5),
        (OrderedDict(x=X), 5),
        (Pair(None, X), 5),
        (Frozen(torch.tensor(1.0), X, ["a"]), 5),
        (Slotted(None, {"deep": [X]}), 5),
        (Plain(X), 5),
        (pack_sequence([torch.zeros(4, 2), torch.zeros(3, 2)]), 2),
        ((pack_sequence([torch.zeros(4, 2), torch.zeros(3, 2)]), Y), 2),
        (torch.zeros(0, 3), 0),
        (torch.tensor(2.0), 1),
        (None, 1),
        ("text", 1),
        (3, 1),
        ([], 1),
        (torch.nn.Linear(4, 4), 1),
    ],
)
def test_sample_count(batch, expected):
    assert sample_count(batch) == expected


@pytest.mark.parametrize(
    ("wrap", "get"),
    [
        (lambda x, y: x, lambda b: (b, None)),
        (lambda x, y: (x, y), lambda b: b),
        (lambda x, y: [x, y], lambda b: b),
        (lambda x, y: {"x": x, "y": y, "n": 3}, lambda b: (b["x"], b["y"])),
        (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
        (lambda x, y: Pair(x, y), lambda b: (b.x, b.y)),
        (lambda x, y: Slotted(x, {"deep": (y,)}), lambda b: (b.x, b.y["deep"][0])),
        (lambda x, y: Plain((x, y)), lambda b: b.x),
    ],
)
def test_micro_batches_slice_the_samples_and_keep_the_container(wrap, get):
    batch = wrap(X, Y)
    parts = micro_batches(batch, 2)
    assert [sample_count(part) for part in parts] == [2, 2, 1]
    assert all(type(part) is type(batch) for part in parts)
    xs, ys = zip(*map(get, parts), strict=True)
    assert torch.equal(torch.cat(xs), X)
    if ys[0] is not None:
        assert torch.equal(torch.cat(ys), Y)
    assert sample_count(batch) == 5  # the batch itself is as it was


def test_what_is_not_per_sample_is_shared():
    scale, weights = torch.tensor(2.0), torch.ones(3)
    batch = {
        "x": X,
        "scale": scale,
        "class_weights": weights,
        "texts": list("abcde"),
        "pair": ("a", "b"),
        "two": [1, 2],
    }
    parts = micro_batches(batch, 3)
    assert [part["texts"] for part in parts] == [["a", "b", "c"], ["d", "e"]]
    assert all(part["scale"] is scale and part["class_weights"] is weights for part in parts)
    assert all(part["pair"] == ("a", "b") and part["two"] == [1, 2] for part in parts)
    frozen = micro_batches(Frozen(scale, X, list("abcde")), 4)
    assert [(part.x.shape[0], part.texts) for part in frozen] == [(4, list("abcd")), (1, ["e"])]


def test_a_plain_object_that_holds_itself_ends():
    parts = micro_batches(Plain(X), 4)
    assert [part.x.shape[0] for part in parts] == [4, 1]
    assert parts[0].itself is parts[0]


def test_a_small_batch_is_its_own_part():
    batch = (X, Y)
    assert micro_batches(batch, 5) == [batch]
    assert micro_batches(batch, 9)[0] is batch


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        micro_batches((X, Y), 0)
    with pytest.raises(TypeError, match="PackedSequence"):
        micro_batches((X, pack_sequence([torch.zeros(4, 2)] * 5)), 1)
