"""How many samples a batch of any shape holds, and how to cut it into smaller ones."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_ATOMS = (str, bytes, int, float, complex, type(None), type, torch.nn.Module)


def sample_count(batch: Any) -> int:
    """Number of samples in ``batch``: the first dimension of the first tensor in it that has one.

    Looks into mappings, lists, tuples, named tuples, dataclasses and any other object with a ``__dict__`` (a
    Hugging Face ``BatchEncoding``, say), in their own order. Scalars are passed over.

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


def micro_batches(batch: Any, size: int) -> list[Any]:
    """Cuts a batch into batches of ``size`` samples (the last one may be smaller).

    Every tensor whose first dimension is the batch's sample count is sliced, and so is every list of that
    length that holds no tensors (a list of texts); slices are copies, all else is shared. Containers keep their types.

    Args:
        batch: whatever a data loader yields.
        size: samples per part, at least 1.

    Raises:
        ValueError: ``size`` is below 1.
        TypeError: the batch holds packed sequences, whose samples can't be sliced.
    """
    if size < 1:
        raise ValueError(f"a micro-batch must hold at least 1 sample, got {size}")
    count = sample_count(batch)
    if count <= size:
        return [batch]
    if any(isinstance(leaf, PackedSequence) for leaf in _leaves(batch, set())):
        raise TypeError("a PackedSequence can't be cut into micro-batches; use one micro-batch per batch")

    def part(start: int) -> Callable[[Any], Any]:
        def slice_one(leaf: Any) -> Any:
            sliced = leaf.ndim > 0 and len(leaf) == count if isinstance(leaf, Tensor) else len(leaf) == count
            if not sliced:
                return leaf
            # A clone: whoever copies a view copies the whole batch behind it.
            return leaf[start : start + size].clone() if isinstance(leaf, Tensor) else leaf[start : start + size]

        return slice_one

    return [_rebuild(batch, part(start), {}) for start in range(0, count, size)]


def map_tensors(batch: Any, transform: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in it replaced; containers keep their types, all else is shared.

    Packed sequences are replaced by those of their transformed data.
    """

    def one(leaf: Any) -> Any:
        return transform(leaf) if isinstance(leaf, Tensor) else leaf

    return _rebuild(batch, one, {})


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors in a batch of any shape, in order; the data of packed sequences."""
    return [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in _leaves(batch, set())]


def _leaves(item: Any, seen: set[int]) -> Iterator[Any]:
    """The tensors and packed sequences in a nested batch, in order; an object that holds itself ends."""
    if isinstance(item, (Tensor, PackedSequence)):
        yield item
        return
    if isinstance(item, _ATOMS) or id(item) in seen:
        return
    seen.add(id(item))
    for child in _children(item).values():
        yield from _leaves(child, seen)


def _children(item: Any) -> dict[Any, Any]:
    if isinstance(item, Mapping):  # BatchEncoding, a UserDict, is one too
        return {key: item[key] for key in item}
    if isinstance(item, (list, tuple)):
        return dict(enumerate(item))
    if dataclasses.is_dataclass(item):  # perhaps with slots
        return {field.name: getattr(item, field.name, None) for field in dataclasses.fields(item)}
    return dict(getattr(item, "__dict__", {}))


def _rebuild(item: Any, transform: Callable[[Any], Any], done: dict[int, Any]) -> Any:
    """A copy of a nested batch with ``transform`` applied to its tensors and its lists without tensors."""
    if isinstance(item, Tensor):
        return transform(item)
    if isinstance(item, _ATOMS):
        return item
    if id(item) in done:
        return done[id(item)]
    if next(_leaves(item, set()), None) is None:
        return transform(item) if isinstance(item, list) else item
    if isinstance(item, tuple):
        parts = [_rebuild(child, transform, done) for child in item]
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    clone = done[id(item)] = copy.copy(item)
    for key, child in _children(item).items():
        part = _rebuild(child, transform, done)
        if isinstance(item, (Mapping, list)):
            clone[key] = part
        else:
            object.__setattr__(clone, key, part)  # frozen dataclasses too
    return clone
