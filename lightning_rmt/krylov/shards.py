"""Which entries of every vector a process holds, and how sums over all entries are made.

With W ranks each holds n/W entries of every Lanczos vector, so the basis takes ``steps * n / W`` elements. All sums over
entries are made from the ranks' partial sums, so that every rank sees the same coefficients, bit for bit.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.krylov.collectives import collective
from lightning_rmt.krylov.reductions import norm

# The names since torch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards(Protocol):
    """What Lanczos needs to know of how vectors are spread.

    Attributes:
        segments: first and last entry (exclusive) of the pieces of a whole vector that this process holds, in their order.
        local_size: length of this process's part of a vector, at least that of its segments; what is beyond them is zero.
    """

    segments: tuple[tuple[int, int], ...]
    local_size: int

    def total(self, parts: Tensor, /) -> Tensor:
        """Sums over all processes of partial sums: float64, shape (k,), in at most one all-reduce. ``parts`` is consumed."""

    def largest(self, part: Tensor, /) -> Tensor:
        """The largest of a scalar tensor over all processes, in at most one all-reduce."""

    def norm(self, vector: Tensor, /) -> Tensor:
        """Euclidean norm of a whole vector, as a float64 scalar tensor, from this process's part of it."""


class Unsharded:
    """Every vector whole in this process: no communication."""

    def __init__(self, size: int) -> None:
        self.segments: tuple[tuple[int, int], ...] = ((0, size),)
        self.local_size = size

    def total(self, parts: Tensor) -> Tensor:
        """The partial sums, which are the sums."""
        return parts

    def largest(self, part: Tensor) -> Tensor:
        """The same number."""
        return part

    def norm(self, vector: Tensor) -> Tensor:
        """Its norm."""
        return norm(vector)


class GroupShards:
    """Partial sums over a process group; which entries this process holds is up to the subclass or the caller.

    Args:
        segments: as for `Shards`.
        local_size: as for `Shards`.
        group: the processes that share the vectors; None: all.
    """

    def __init__(
        self, segments: tuple[tuple[int, int], ...], local_size: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.segments = segments
        self.local_size = local_size
        self._group = group

    def total(self, parts: Tensor) -> Tensor:
        """One all-reduce of float64 sums."""
        with collective():
            dist.all_reduce(parts, group=self._group)
        return parts

    def largest(self, part: Tensor) -> Tensor:
        """One all-reduce."""
        part = part.clone()
        with collective():
            dist.all_reduce(part, op=dist.ReduceOp.MAX, group=self._group)
        return part

    def norm(self, vector: Tensor) -> Tensor:
        """From the sum of squares: one all-reduce."""
        return self.total(norm(vector).square()).sqrt()


class EvenShards(GroupShards):
    """A whole vector cut into equal pieces, one for each rank in turn; the last ones are padded with zeros.

    Args:
        size: n.
        group: the processes that share the vectors; None: all.
    """

    def __init__(self, size: int, group: dist.ProcessGroup | None = None) -> None:
        self.ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        length = even_length(size, self.ranks)
        super().__init__(((min(rank * length, size), min((rank + 1) * length, size)),), length, group)
        self._size = size

    def gather(self, parts: Tensor) -> Tensor:
        """Whole vectors, shape (k, n), from everyone's parts, shape (k, local_size): one all-gather."""
        k = parts.shape[0]
        everyones = parts.new_empty(self.ranks, k, self.local_size)
        with collective():
            _all_gather(everyones.view(-1), parts.reshape(-1), group=self._group)
        return everyones.transpose(0, 1).reshape(k, -1)[:, : self._size]

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """This rank's part, shape (k, local_size), of the sum over ranks of vectors of shape (k, n): one reduce-scatter."""
        k = whole.shape[0]
        padded = torch.nn.functional.pad(whole, (0, self.ranks * self.local_size - self._size))
        pieces = padded.view(k, self.ranks, self.local_size).transpose(0, 1).contiguous()
        part = whole.new_empty(k, self.local_size)
        with collective():
            _reduce_scatter(part.view(-1), pieces.view(-1), group=self._group)
        return part


def even_length(size: int, ranks: int) -> int:
    """Entries of each rank's part of a vector of n entries: n/W, rounded up."""
    return -(-size // ranks)


def can_scatter(device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group's backend gathers and scatters tensors of this device: gloo does on CPUs only."""
    return device.type == "cpu" or "gloo" not in str(dist.get_backend(group))
