"""How many samples a batch of any shape holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def sample_count(batch: Any) -> int:
    """Number of samples in ``batch``: the first dimension of the first tensor in it that has one.

    Looks into mappings, lists, tuples, named tuples, dataclasses and any other object with a ``__dict__`` (a Hugging
    Face ``BatchEncoding``, say), in their own order. Scalars are passed over.

    Args:
        batch: whatever a data loader yields.

    Returns:
        The count; 1 where the batch holds no tensor with a dimension.
    """
    for leaf in _leaves(batch, set()):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])  # its data hold all time steps of all sequences
        if leaf.ndim > 0:
            return int(leaf.shape[0])
    return 1


def _leaves(item: Any, seen: set[int]) -> Iterator[Any]:
    """The tensors (and packed sequences) in a nested batch, in order; an object that holds itself ends."""
    if isinstance(item, (Tensor, PackedSequence)):
        yield item
        return
    if (
        isinstance(item, (str, bytes, int, float, complex, type(None), torch.nn.Module, type))
        or id(item) in seen
    ):
        return
    seen.add(id(item))
    for child in _children(item):
        yield from _leaves(child, seen)


def _children(item: Any) -> list[Any]:
    if isinstance(item, Mapping):  # UserDict (BatchEncoding) is a Mapping too
        return list(item.values())
    if isinstance(item, (list, tuple)):
        return list(item)
    if hasattr(item, "__dict__"):  # dataclasses, plain containers
        return list(vars(item).values())
    if hasattr(type(item), "__dataclass_fields__"):  # with slots
        return [getattr(item, name, None) for name in type(item).__dataclass_fields__]
    return []
