"""A module in float64 for a moment, with nothing differentiated but one block of its parameters.

Level statistics need eigenvalues to a small share of their spacing, which float32 doesn't give: its rounding is a random
matrix of its own, whose levels repel as those of the GOE do. And a Hessian's block costs no more than the way from the
block to the loss, if autograd sees nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rmt.curvature.batches import map_tensors


@dataclass(frozen=True)
class Slice:
    """Which entries of a parameter are in a block: a leading piece along each of its first dimensions.

    Attributes:
        name: of the parameter.
        parameter: the live tensor.
        shape: of the piece, at most the parameter's in every dimension.
    """

    name: str
    parameter: Tensor
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter."""
        return self.shape == tuple(self.parameter.shape)

    @property
    def label(self) -> str:
        """The parameter's name, with the range of each dimension that isn't whole, as Python writes it."""
        if self.whole:
            return self.name
        pairs = zip(self.shape, self.parameter.shape, strict=True)
        return f"{self.name}[{', '.join(f':{n}' if n < full else ':' for n, full in pairs)}]"


@contextmanager
def in_double(modules: Iterable[nn.Module], block: Sequence[Slice]) -> Iterator[list[Tensor]]:
    """Puts float64 copies in the place of all parameters and buffers; inside, only the block requires gradients.

    Nothing of the module is written to: its tables of parameters and buffers point to the copies, and back afterwards.
    The default dtype is float64 inside, so that tensors which the loss creates fit.

    Args:
        modules: every module that the loss may reach.
        block: the parameters, or pieces of them, to differentiate by.

    Yields:
        The block's leaves, float64, in the block's order and shapes.
    """
    listed = list(modules)
    with ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        leaves = [_leaf(part) for part in block]
        copies = {id(part.parameter): _with_leaf(part, leaf) for part, leaf in zip(block, leaves, strict=True)}
        originals = [part.parameter for part in block]  # alive, so that no id is given away

        def copy_of(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to(_double_of(tensor), copy=True)
                originals.append(tensor)
            return copies[id(tensor)]

        for module in listed:
            for table in (module._parameters, module._buffers):
                undo.callback(_put_back, table, dict(table))
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = copy_of(tensor)  # type: ignore[assignment]
            if isinstance(module, nn.RNNBase):  # it keeps its own list of them, and remembers whose list it is
                for own in ("_flat_weights", "_flat_weight_refs"):
                    undo.callback(setattr, module, own, getattr(module, own))
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        yield leaves


def double_batch(batch: Any) -> Any:
    """The batch with its floating point tensors in float64, complex ones likewise; all else as it was."""
    return map_tensors(batch, lambda tensor: tensor.to(_double_of(tensor)))


def double_bytes(modules: Iterable[nn.Module]) -> int:
    """Memory of the copies that `in_double` makes of these modules' parameters and buffers."""
    tensors = {
        id(tensor): tensor
        for module in modules
        for table in (module._parameters, module._buffers)
        for tensor in table.values()
        if tensor is not None
    }
    return sum(8 * tensor.numel() for tensor in tensors.values())


def _double_of(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.complex128
    return torch.float64 if tensor.is_floating_point() else tensor.dtype


def _put_back(table: dict[str, Any], originals: dict[str, Any]) -> None:
    table.clear()  # a forward pass may register buffers, which would be in float64
    table.update(originals)


def _leaf(part: Slice) -> Tensor:
    piece = part.parameter.detach()[tuple(slice(n) for n in part.shape)]
    return piece.double().clone().requires_grad_()


def _with_leaf(part: Slice, leaf: Tensor) -> Tensor:
    """The parameter as a function of the leaf."""
    if part.whole:
        return leaf
    rest = part.parameter.detach().double().clone()
    rest[tuple(slice(n) for n in part.shape)] = leaf
    return rest
