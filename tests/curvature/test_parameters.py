"""The flat layout, and the choice of parameters by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_rmt.curvature.parameters import ParameterBlock, hooked_parameters, select_parameters


def model():
    net = nn.ModuleDict({"encoder": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    net["frozen"] = nn.Linear(2, 1).requires_grad_(False)
    return net


def test_split_and_flatten_are_inverse():
    block = ParameterBlock(model().named_parameters())
    assert block.size == 8 + 6 + 3
    flat = torch.arange(17.0)
    parts = block.split(flat)
    assert [part.shape for part in parts] == [p.shape for p in block.tensors]
    assert torch.equal(block.flatten(parts), flat)
    assert torch.equal(block.flatten([None, *parts[1:]])[:6], torch.zeros(6))
    assert torch.equal(block.flatten([None, *parts[1:]])[6:], flat[6:])


def test_flatten_copies():
    x = torch.ones(3, requires_grad=True)
    block = ParameterBlock([x])
    flat = block.flatten([x.detach()])
    flat.zero_()
    assert torch.equal(x.detach(), torch.ones(3))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16", "float16"], torch.float32),
        (["bfloat16", "float32"], torch.float32),
        (["float32", "float64"], torch.float64),
    ],
)
def test_vectors_are_float32_or_float64_and_cast_at_the_border(dtypes, expected):
    tensors = [torch.zeros(2, 2, dtype=getattr(torch, dtype)) for dtype in dtypes]
    block = ParameterBlock(tensors)
    assert block.dtype == expected
    parts = block.split(torch.ones(8, dtype=expected))
    assert [part.dtype for part in parts] == [t.dtype for t in tensors]
    assert block.flatten(parts).dtype == expected


def test_transposed_gradients_lie_in_row_major_order():
    x = torch.zeros(2, 3)
    block = ParameterBlock([x])
    gradient = torch.arange(6.0).view(3, 2).T
    assert block.flatten([gradient]).tolist() == [0, 2, 4, 1, 3, 5]


def test_takes_tensors_pairs_and_mappings():
    net = model()
    named = dict(net.named_parameters())
    assert ParameterBlock(net.parameters()).names == ("0", "1", "2", "3", "4", "5")
    assert ParameterBlock(net.named_parameters()).names == tuple(named)
    assert ParameterBlock(named).names == tuple(named)
    single = torch.zeros(2, 2)
    assert ParameterBlock(single).tensors == (single,)
    pair = (torch.zeros(1), torch.zeros(2))
    assert ParameterBlock([pair[0], pair[1]]).size == ParameterBlock(pair).size == 3


def test_tied_tensors_count_once_under_their_first_name():
    shared = torch.zeros(4)
    block = ParameterBlock([("a", shared), ("b", torch.zeros(2)), ("c", shared)])
    assert block.names == ("a", "b")
    assert block.size == 6


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ([], ValueError, "no parameters were given"),
        ([torch.zeros(0)], ValueError, "no entries"),
        ([torch.zeros(2, dtype=torch.complex64)], ValueError, "'0' is complex"),
        ([("w", 3.0)], TypeError, "'w' is a float"),
        (nn.Linear(2, 2), TypeError, "named_parameters"),
        (3, TypeError, "got int"),
    ],
)
def test_errors(parameters, kind, message):
    with pytest.raises(kind, match=message):
        ParameterBlock(parameters)


def test_sharded_parameters_are_refused():
    """Autograd calls them unused, which would read as a spectrum of zeros."""
    tensor = torch.zeros(2)
    tensor._local_tensor = tensor
    with pytest.raises(ValueError, match=r"'w' is sharded.*unshard"):
        ParameterBlock([("w", tensor)])


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        (None, ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]),
        (["encoder.*"], ["encoder.weight", "encoder.bias"]),
        (["*.bias", "head.*"], ["encoder.bias", "head.weight", "head.bias"]),  # in the model's order, each once
        (["*"], ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]),
        (["head.weight"], ["head.weight"]),
    ],
)
def test_globs(globs, expected):
    assert [name for name, _ in select_parameters(model().named_parameters(), globs)] == expected


def test_a_glob_that_matches_nothing_names_itself_and_what_there_is():
    with pytest.raises(
        ValueError, match=r"'encoder.wieght' matches no parameter; close to it: encoder.weight"
    ) as caught:
        select_parameters(model().named_parameters(), ["head.*", "encoder.wieght"])
    assert "there are 6: encoder.weight, encoder.bias, " in str(caught.value)
    with pytest.raises(ValueError, match=r"^the pattern 'zzz' matches no parameter; there are 6") as caught:
        select_parameters(model().named_parameters(), ["zzz"])


def test_frozen_choices_are_refused():
    with pytest.raises(ValueError, match=r"'frozen.\*' matches only frozen"):
        select_parameters(model().named_parameters(), ["frozen.*"])
    with pytest.raises(ValueError, match="all have requires_grad=False"):
        select_parameters(model().requires_grad_(False).named_parameters())
    with pytest.raises(TypeError, match=r"write \['head'\]"):
        select_parameters(model().named_parameters(), "head")


def test_tied_parameters_are_found_under_either_name():
    net = model()
    net["head"].weight = net["frozen"].weight = nn.Parameter(torch.zeros(2, 2))
    for glob in ("head.weight", "frozen.weight"):
        chosen = select_parameters(net.named_parameters(remove_duplicate=False), [glob])
        assert len(chosen) == 1
        assert chosen[0][1] is net["head"].weight


def test_hooked_parameters_ignores_other_hooks():
    net = model()
    net["head"].bias.register_post_accumulate_grad_hook(lambda p: None)  # autograd.grad does not run these
    assert hooked_parameters(net.named_parameters()) == ()
    net["head"].weight.register_hook(lambda g: g)
    assert hooked_parameters(net.named_parameters()) == ("head.weight",)
