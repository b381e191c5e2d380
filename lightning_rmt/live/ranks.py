"""Ranks act together or not at all: one that fails alone would pair its next all-reduce with another's probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_rmt.curvature.errors import is_out_of_memory

T = TypeVar("T")


class OtherRankFailedError(RuntimeError):
    """This rank was fine, but another one was not, so all of them skip the probe."""


class RefusedError(Exception):
    """Something that a probe can do without couldn't be had, on any rank; the message says why."""


class Ranks:
    """The data-parallel process group of a Trainer, or a single process.

    Attributes:
        group: process group for the products; None for a single process.
        size: number of ranks in it.
        rank: this process's rank in it.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self._device = device or torch.device("cpu")

    @classmethod
    def of(cls, trainer: Any) -> Ranks:
        """The ranks that share the loss in this Trainer."""
        if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            return cls()
        mesh = getattr(trainer.strategy, "device_mesh", None)
        group = mesh["data_parallel"].get_group() if mesh is not None else dist.group.WORLD
        on_cpu = dist.get_backend(group) == "gloo"
        return cls(group, torch.device("cpu") if on_cpu else trainer.strategy.root_device)

    def least(self, number: int) -> int:
        """The smallest number of any rank (one small all-reduce)."""
        return -self.largest((-number,))[0]

    def all_ok(self, ok: bool) -> bool:
        """Whether every rank is fine."""
        return bool(self.least(int(ok)))

    def together(self, stage: Callable[[], T], follows: Callable[[Exception], bool] = lambda error: False) -> T:
        """Runs a local stage that may fail; returns its result only if it worked on every rank.

        Args:
            stage: what to run.
            follows: whether an exception may be the consequence of another rank's, which then says more than this one.

        Raises:
            OtherRankFailedError: it worked here, but not everywhere.
            Exception: whatever the stage raised here.
        """
        result, error = None, None
        try:
            result = stage()
        except Exception as caught:
            error = caught
        fine, consequence, cause = 2, 1, 0
        mine = fine if error is None else consequence if follows(error) else cause
        worst = self.least(mine)
        try:
            if error is not None and not (mine == consequence and worst == cause):
                raise error
        finally:
            error = None  # or its traceback's frame would hold it, and with it the graph of the failed probe
        if worst != fine:
            raise OtherRankFailedError("the probe failed on another rank; its log says why. All ranks skip this one")
        return result  # type: ignore[return-value]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks (one small all-reduce)."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in tensor.tolist()]

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every rank's values, shape (ranks, *values.shape); the shape is the same on all of them."""
        if self.group is None:
            return values[None]
        everyones = torch.zeros(self.size, *values.shape, dtype=torch.float64, device=self._device)
        everyones[self.rank] = torch.from_numpy(values)
        dist.all_reduce(everyones, group=self.group)
        return np.asarray(everyones.cpu().numpy())

    def from_first(self, values: Sequence[int]) -> list[int]:
        """The first rank's values, on every rank."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)
        return [int(value) for value in tensor.tolist()]


def all_or_none(ranks: Ranks, stage: Callable[[], T]) -> T:
    """Runs a local stage that a probe can do without; goes on only if it worked on every rank.

    Raises:
        RefusedError: it failed here or elsewhere; of the exception only the words are kept.
    """
    result, reason = None, None
    try:
        result = stage()
    except Exception as error:
        reason = "memory ran out" if is_out_of_memory(error) else str(error) or type(error).__name__
    if not ranks.all_ok(reason is None):
        raise RefusedError(reason or "it failed on another rank, whose log says why")
    return result  # type: ignore[return-value]
