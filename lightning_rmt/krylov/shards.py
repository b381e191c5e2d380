"""Which entries of every vector a process holds, and how sums over all entries are made.

With W ranks each holds n/W entries of every Lanczos vector, so the basis takes ``steps * n / W`` elements. All sums over
entries are made from the ranks' partial sums, so that every rank sees the same coefficients, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.krylov.collectives import LostRankError, clear_frames, collective
from lightning_rmt.krylov.reductions import norm

T = TypeVar("T")

# The names since torch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards(Protocol):
    """What Lanczos needs to know of how vectors are spread.

    A process that fails alone, between two collectives, must not leave: the others are about to wait for it. It goes on
    with NaN in all sums, so that all of them end the run together (`attempt`, `settle`).

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

    def attempt(self, stage: Callable[[], T], failed: T, sums: Sequence[Callable[[], object]] = (), /) -> T:
        """Runs a local stage between two collectives.

        Args:
            stage: what may fail.
            failed: what is returned if it did, on a process that the others wait for.
            sums: the collectives that it makes, in their order; those that a failure left out are made up for.

        Raises:
            Exception: the stage's, where no other process waits for this one.
        """

    def settle(self) -> None:
        """Raises what `attempt` has kept, once no other process waits for this one."""


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

    def attempt(self, stage: Callable[[], T], failed: T, sums: Sequence[Callable[[], object]] = ()) -> T:
        """What the stage gives or raises."""
        return stage()

    def settle(self) -> None:
        """Nothing was kept."""


class _Shared:
    """Keeps what went wrong in this process until the others know.

    Attributes:
        error: the first exception, or None.
    """

    error: Exception | None = None
    _made = 0  # collectives so far

    def attempt(self, stage: Callable[[], T], failed: T, sums: Sequence[Callable[[], object]] = ()) -> T:
        """Runs the stage, keeps what it raises in `error` and makes the collectives that are left."""
        before = self._made
        try:
            return stage()
        except LostRankError:  # nobody waits
            raise
        except Exception as error:
            clear_frames(error)  # they hold vectors, or a graph
            self.error = self.error or error
        for make in sums[self._made - before :]:
            make()
        return failed

    def settle(self) -> None:
        """Raises `error`."""
        if self.error is not None:
            raise self.error


class Replicated(_Shared, Unsharded):
    """Every vector whole in every process of a group, which makes the same sums as all the others."""


class GroupShards(_Shared):
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
        self._made += 1
        with collective():
            dist.all_reduce(parts, group=self._group)
        return parts

    def largest(self, part: Tensor) -> Tensor:
        """One all-reduce."""
        self._made += 1
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
        self._parts = self._whole = torch.empty(0)

    def reserve(self, k: int, like: Tensor) -> None:
        """Takes the memory for `exchange` with up to k vectors, of the dtype and on the device of ``like``."""
        if self._parts.numel() < k * self.local_size:
            self._parts = like.new_empty(k * self.local_size)
            self._whole = like.new_empty(self.ranks * k * self.local_size)

    def reserved(self, k: int) -> bool:
        """Whether there is memory for k vectors."""
        return self._parts.numel() >= k * self.local_size

    def exchange(self, parts: Tensor, compute: Callable[[Tensor], Tensor], factor: float) -> Tensor:
        """The sum over ranks of ``factor * compute(V)`` for whole vectors V: an all-gather and a reduce-scatter.

        Between the two nothing is allocated that wasn't reserved, but by ``compute``; a rank where that fails contributes
        NaN.

        Args:
            parts: everyone's parts of V, shape (k, local_size); k was reserved.
            compute: of whole vectors, shape (k, n) to the same.
            factor: this rank's.

        Returns:
            This rank's part of the sum, shape (k, local_size).
        """
        k = parts.shape[0]
        mine, everyones = self._parts[: k * self.local_size], self._whole[: self.ranks * k * self.local_size]
        pieces = everyones.view(self.ranks, k, self.local_size)

        def product() -> bool:
            whole = pieces.transpose(0, 1).reshape(k, -1)[:, : self._size]  # a copy where there are several vectors
            self._cut(compute(whole), pieces)
            everyones.mul_(factor)
            return True

        mine.view(k, self.local_size).copy_(parts)
        with collective():
            _all_gather(everyones, mine, group=self._group)
        if self.error is not None or not self.attempt(product, False):
            everyones.fill_(float("nan"))
        with collective():
            _reduce_scatter(mine, everyones, group=self._group)
        return self.attempt(mine.view(k, -1).clone, mine.new_full((1, 1), float("nan")).expand(k, self.local_size))

    def _cut(self, whole: Tensor, pieces: Tensor) -> None:
        """Writes whole vectors, shape (k, n), into everyone's pieces, shape (ranks, k, local_size), padded with zeros."""
        k, full = whole.shape[0], self._size // self.local_size  # ranks with no padding
        end = full * self.local_size
        pieces[full:].zero_()
        pieces[:full].copy_(whole[:, :end].reshape(k, full, self.local_size).transpose(0, 1))
        if end < self._size:
            pieces[full, :, : self._size - end].copy_(whole[:, end:])


def even_length(size: int, ranks: int) -> int:
    """Entries of each rank's part of a vector of n entries: n/W, rounded up."""
    return -(-size // ranks)


def can_scatter(device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether a group's backend gathers and scatters tensors of this device: gloo does on CPUs only."""
    return device.type == "cpu" or "gloo" not in str(dist.get_backend(group))
