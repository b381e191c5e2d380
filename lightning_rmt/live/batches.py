"""The curvature batches: copies of what the training loop is about to consume; the dataloader is never touched."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import Any

from lightning_rmt.curvature.batches import tensors_of


@dataclass(frozen=True)
class CapturedBatch:
    """A copy of a training batch with its index in the epoch, as the training loop passed it to the module."""

    batch: Any
    batch_idx: int


def copy_batch(batch: Any) -> Any:
    """An independent copy of a batch of any structure; tensors that it shares stay shared within the copy.

    Raises:
        TypeError: the batch can't be copied.
    """
    try:
        return copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(
            f"the training batch of type {type(batch).__name__} can't be copied ({error}). The curvature is measured on a "
            "copy, so that nothing that the loss does to its batch reaches the training: give the batch a __deepcopy__"
        ) from error


def is_empty(batch: Any) -> bool:
    """Whether a batch holds tensors, and none of them a single entry (scalars aside): the last one of an uneven loader."""
    sizes = [leaf.numel() for leaf in tensors_of(batch) if leaf.ndim > 0]
    return bool(sizes) and not any(sizes)


class BatchCollector:
    """Keeps copies of the last few training batches while a probe is coming up.

    Args:
        batches: how many to keep.
    """

    def __init__(self, batches: int) -> None:
        self._kept: deque[CapturedBatch] = deque(maxlen=batches)

    def add(self, batch: Any, batch_idx: int) -> None:
        """Copies a batch; the oldest one goes when there are too many."""
        self._kept.append(CapturedBatch(copy_batch(batch), batch_idx))

    def take(self) -> list[CapturedBatch]:
        """Hands the batches over, oldest first, and forgets them."""
        taken = list(self._kept)
        self._kept.clear()
        return taken

    def __len__(self) -> int:
        return len(self._kept)
