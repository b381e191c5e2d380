"""A module in float64 for a moment: what it computes there, and that nothing of it is left."""

from __future__ import annotations

import dataclasses
import warnings
from collections import UserDict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_rmt.curvature.double_precision import Slice, double_batch, double_bytes, in_double
from lightning_rmt.live.fence.enclosure import enclose

# of torch, about the float32 pass before the measurement
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Tied(nn.Module):
    """One weight under two names in two modules, and a module that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = self.again = nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long() % 7
        return self.out(torch.tanh(self.again(self.first(self.embed(tokens).sum(-2)))))


class Hidden(nn.Module):
    """Modules that `modules()` doesn't show, in a list, a dict and one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Linear(6, 6)
        self.__dict__["bare"] = nn.Linear(6, 6)
        inner = nn.Linear(6, 6)
        inner.__dict__["deeper"] = [nn.BatchNorm1d(6)]
        self.teachers = {"one": inner}

    def forward(self, x: Tensor) -> Tensor:
        inner = self.teachers["one"]
        return inner.deeper[0](inner(self.bare(self.seen(x))))


class Buffers(nn.Module):
    """Of every dtype; one that is shared, one that changes, None, and one that the forward pass registers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("coarse", torch.ones(6, dtype=torch.bfloat16))
        self.register_buffer("fine", torch.full((6,), 1.0 / 3, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([True, False] * 3), persistent=False)
        self.register_buffer("phases", torch.polar(torch.ones(6), torch.arange(6.0)))
        self.register_buffer("missing", None)
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.layer.register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.scale.mul_(1.5)
        self.mask = ~self.mask
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(6))
        turned = torch.fft.ifft(torch.fft.fft(x) * self.phases).real
        assert self.phases.dtype == torch.complex128 or x.dtype == torch.float32
        return self.layer(turned) * self.coarse * self.fine * self.layer.scale + self.cache


class ModesOfNormalisation(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None).eval(), nn.Linear(6, 6))


class Recurrent(nn.Module):
    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.view(len(x), 1, -1))[0]


def old_style(norm: Any, layer: nn.Module, *arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer, *arguments)


MODULES = {
    "tied": Tied,
    "hidden": Hidden,
    "buffers": Buffers,
    "batch norm": ModesOfNormalisation,
    "rnn": lambda: Recurrent(nn.RNN(6, 4)),
    "lstm with projection": lambda: Recurrent(nn.LSTM(6, 4, num_layers=2, bidirectional=True, proj_size=2)),
    "gru without bias": lambda: Recurrent(nn.GRU(6, 4, bias=False)),
    "lstm, weight norm": lambda: Recurrent(parametrizations.weight_norm(nn.LSTM(6, 4), "weight_hh_l0")),
    "lstm, old weight norm": lambda: Recurrent(old_style(nn.utils.weight_norm, nn.LSTM(6, 4), "weight_hh_l0")),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "old weight norm": lambda: old_style(nn.utils.weight_norm, nn.Linear(6, 6)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "half": lambda: nn.Linear(6, 6).bfloat16(),
    "lists of parameters": lambda: Lists(),
}


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.named = nn.ParameterDict({"bias": torch.randn(6)})
        self.nothing = nn.Linear(1, 1, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] @ self.weights[1] + self.named["bias"]


def everything(module: nn.Module) -> list[tuple[Any, ...]]:
    """Every table of every module: order, names, identities, versions and bits."""
    found = []
    for m in enclose(None, module, seed=0, autocast=False).modules:
        for table in (m._parameters, m._buffers):
            for name, t in table.items():
                bits = None if t is None else t.detach().contiguous().flatten().view(torch.uint8).tolist()
                found.append((id(m), name, id(t), None if t is None else (t._version, t.requires_grad, t.dtype), bits))
        if isinstance(m, nn.RNNBase):
            found.append((id(m._flat_weights), [id(w) for w in m._flat_weights], id(m._flat_weight_refs)))
    return found


def block_of(module: nn.Module) -> list[Slice]:
    return [Slice(name, p, tuple(p.shape)) for name, p in module.named_parameters() if p.requires_grad]


def modules_of(module: nn.Module) -> tuple[nn.Module, ...]:
    return enclose(None, module, seed=0, autocast=False).modules


@pytest.fixture(params=MODULES)
def module(request) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[request.param]()


X = torch.linspace(-1, 1, 30).sin().view(5, 6)


class TestInDouble:
    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_everything_is_put_back(self, module, error):
        x = X.to(next(module.parameters()).dtype)
        module(x)  # so that running statistics and derived weights are there
        module._buffers.pop("cache", None)  # to be made inside
        before = everything(module)
        with nullcontext() if error is None else pytest.raises(error, match="inside"):
            with in_double(modules_of(module), block_of(module)) as leaves:
                out = module(X.double())
                torch.autograd.grad(out.square().sum(), leaves, create_graph=True, allow_unused=True)
                assert everything(module) != before
                if error is not None:
                    raise error("inside")
        assert everything(module) == before
        assert torch.get_default_dtype() == torch.float32

    def test_computes_what_a_double_of_the_module_would(self, module):
        """The reference is the module's own `double()`, applied to its parameters as they are."""
        module(X.to(next(module.parameters()).dtype))
        module._buffers.pop("cache", None)
        with in_double(modules_of(module), block_of(module)) as leaves:
            out = module(X.double())
            gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        assert out.dtype == torch.float64
        double = module.double()
        if isinstance(double, Buffers):  # `double()` leaves complex numbers alone, and unties shared buffers
            double.phases, double.layer.scale = double.phases.to(torch.complex128), double.scale
        if isinstance(double, Hidden):  # nor does it reach these
            for hidden in (double.bare, double.teachers["one"], double.teachers["one"].deeper[0]):
                hidden.double()
        expected = double(X.double())
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)
        parameters = [p for p in module.parameters() if p.requires_grad]
        for ours, theirs in zip(
            gradients, torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True), strict=True
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)

    def test_only_the_block_is_differentiated(self):
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        with in_double(net.modules(), block_of(net)[2:]) as leaves:
            assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
            hidden = net[1](net[0](X.double()))
            assert not hidden.requires_grad
            assert net[2]._parameters["weight"] is leaves[0]
            assert torch.ones(1).dtype == torch.float64
        assert all(p.requires_grad for p in net.parameters())

    def test_tied_weights_stay_tied(self):
        net = Tied()
        with in_double(net.modules(), block_of(net)) as leaves:
            assert net.out.weight is net.embed.weight is leaves[0]
            assert net.first is net.again
        with in_double(net.modules(), [Slice("embed.weight", net.embed.weight, (3, 2))]):
            assert net.out.weight is net.embed.weight

    def test_a_piece_of_a_parameter(self):
        net = nn.Sequential(nn.Linear(6, 4))
        piece = Slice("0.weight", net[0].weight, (2, 6))
        assert (piece.size, piece.whole, piece.label) == (12, False, "0.weight[:2, :]")
        with in_double(net.modules(), [piece]) as (leaf,):
            torch.testing.assert_close(net[0].weight, piece.parameter.double(), rtol=0, atol=0)
            gradient = torch.autograd.grad(net(X.double()).square().sum(), leaf)[0]
        whole = torch.autograd.grad(net(X).square().sum(), net[0].weight)[0]
        torch.testing.assert_close(gradient, whole[:2].double(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_the_default_dtype_comes_back(self, dtype):
        torch.set_default_dtype(dtype)
        try:
            with pytest.raises(ValueError, match="inside"), in_double([nn.Linear(1, 1)], []):
                raise ValueError("inside")
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)

    def test_a_module_that_cannot_be_copied_is_left_as_it_was(self):
        """The second module fails, the first has been changed by then."""
        net = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3))
        before = dict(net[0]._parameters)
        with pytest.raises(ValueError, match="uninitialized"), in_double(net.modules(), []):
            raise AssertionError
        assert all(net[0]._parameters[name] is p for name, p in before.items())
        assert torch.get_default_dtype() == torch.float32

    def test_memory_counts_each_tensor_once(self):
        net = Tied()
        assert double_bytes(net.modules()) == 8 * (7 * 6 + 6 * 6 + 6)


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Tensor
    more: dict[str, Any]


class TestDoubleBatch:
    def test_nested(self):
        ids, name = torch.arange(3), object()
        batch = {
            "a": [torch.ones(2), (ids, None, "text")],
            "b": Sample(torch.ones(2).half(), {"c": torch.ones(2, dtype=torch.complex64), "d": name}),
            "u": UserDict(x=torch.ones(1)),
            "mask": torch.tensor([True]),
        }
        found = double_batch(batch)
        assert found["a"][0].dtype == torch.float64
        assert found["a"][1][0] is ids
        assert found["a"][1][2] == "text"
        assert type(found["b"]) is Sample
        assert found["b"].x.dtype == torch.float64
        assert found["b"].more["c"].dtype == torch.complex128
        assert found["b"].more["d"] is name
        assert isinstance(found["u"], UserDict)
        assert found["u"]["x"].dtype == torch.float64
        assert found["mask"].dtype == torch.bool
        assert batch["a"][0].dtype == batch["u"]["x"].dtype == torch.float32
        assert batch["b"].x.dtype == torch.float16

    def test_packed_sequence(self):
        packed = pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
        found = double_batch({"x": packed})["x"]
        assert isinstance(found, PackedSequence)
        assert found.data.dtype == torch.float64
        assert torch.equal(found.batch_sizes, packed.batch_sizes)
        assert packed.data.dtype == torch.float32
