"""Ranks act together or not at all: one that fails alone would pair its next all-reduce with another's probe."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lightning_rmt.curvature.distributed import RankSum, RankWeights
from lightning_rmt.curvature.errors import is_out_of_memory
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.krylov.collectives import LostRankError, OtherRankFailedError, collective
from lightning_rmt.krylov.shards import can_scatter, even_length
from lightning_rmt.krylov.tridiagonal import NonFiniteError
from lightning_rmt.live.namespaces import MisconfigurationException

T = TypeVar("T")

#: Said by the ranks that were fine.
SKIPPED = "the probe failed on {}. All ranks skip this one"
#: Bytes of an exception's message that other ranks are told.
MOST_WORDS = 300


class RefusedError(Exception):
    """Something that a probe can do without couldn't be had, on any rank; the message says why."""


class _LeftStageError(OtherRankFailedError):
    """Another rank has left a stage early, and said so in the agreement that this one was at; the message is which."""


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

    def local_size(self, operator: CurvatureOperator) -> int:
        """Entries of each Lanczos vector that a rank holds: its share, where the group can scatter them."""
        return even_length(operator.size, self.size) if self._scatters(operator.device) else operator.size

    def mean(self, operator: CurvatureOperator, weights: RankWeights) -> CurvatureOperator | RankSum:
        """The operator over all ranks' batches, its vectors sharded where that can be; itself for a single process."""
        if self.group is None:
            return operator
        return RankSum(operator, self.group, weights=weights, sharded=self._scatters(operator.device))

    def _scatters(self, device: torch.device) -> bool:
        return self.group is not None and can_scatter(device, self.group)

    def least(self, number: int) -> int:
        """The smallest number of any rank (one small all-reduce)."""
        return -self.largest((-number,))[0]

    def agree(self, number: int) -> int:
        """The smallest of a positive number of any rank, in the midst of a stage that `together` runs.

        A rank that fails before it gets here is at the end of its stage, where it says 0: to the others, the same
        collective.

        Raises:
            OtherRankFailedError: that has happened.
        """
        least = self.least(number)
        if least <= 0:
            raise _LeftStageError(self._where(None))
        return least

    def all_ok(self, ok: bool) -> bool:
        """Whether every rank is fine."""
        return bool(self.least(int(ok)))

    def together(
        self,
        stage: Callable[[], T],
        follows: Callable[[Exception], bool] = lambda error: False,
        elsewhere: str = SKIPPED,
    ) -> T:
        """Runs a local stage that may fail; returns its result only if it worked on every rank.

        Args:
            stage: what to run; collectives in it are calls of `agree`, as many on every rank.
            follows: whether an exception may be the consequence of another rank's, which then says more than this one.
            elsewhere: message on the ranks where it worked, with a place for which rank it failed on, and why.

        Raises:
            OtherRankFailedError: it worked here, but not everywhere.
            Exception: whatever the stage raised here.
        """
        result, error, where = None, None, None
        try:
            result = stage()
        except LostRankError:  # nobody to agree with
            raise
        except _LeftStageError as caught:  # agreed on already
            where = str(caught)
        except Exception as caught:
            error = caught
        if where is not None:
            raise OtherRankFailedError(elsewhere.format(where))
        fine, consequence, cause = 2, 1, 0
        follows_it = error is not None and (isinstance(error, OtherRankFailedError) or follows(error))
        mine = fine if error is None else consequence if follows_it else cause
        try:
            worst = self.least(mine)
            if worst == fine:
                return result  # type: ignore[return-value]
            where = self._where(error if mine == worst else None)
            if error is not None and mine == worst:
                raise error
        finally:
            error = None  # or its traceback's frame would hold it, and with it the graph of the failed probe
        raise OtherRankFailedError(elsewhere.format(where))

    def _where(self, error: Exception | None) -> str:
        """The first rank that has an exception, with its words; every rank calls it (one all-reduce)."""
        words = "" if error is None else _first_line(error)
        mine = np.zeros(MOST_WORDS)
        encoded = words.encode()[:MOST_WORDS]
        mine[: len(encoded)] = list(encoded)
        for rank, found in enumerate(self.gather(mine)):
            if found.any():
                return f"rank {rank} ({bytes(found[found > 0].astype(np.uint8)).decode(errors='replace')})"
        return "another rank"

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks (one small all-reduce)."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        with collective():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return [int(value) for value in tensor.tolist()]

    def differing(self, values: Sequence[int]) -> list[int]:
        """The places at which not every rank gives the same value (one small all-reduce)."""
        largest = self.largest([*values, *(-value for value in values)])
        return [i for i in range(len(values)) if largest[i] != -largest[len(values) + i]]

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Every rank's values, shape (ranks, *values.shape); the shape is the same on all of them."""
        if self.group is None:
            return values[None]
        everyones = torch.zeros(self.size, *values.shape, dtype=torch.float64, device=self._device)
        everyones[self.rank] = torch.from_numpy(values)
        with collective():
            dist.all_reduce(everyones, group=self.group)
        return np.asarray(everyones.cpu().numpy())

    def from_first(self, values: Sequence[int]) -> list[int]:
        """The first rank's values, on every rank."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device)
        with collective():
            dist.broadcast(tensor, src=dist.get_global_rank(self.group, 0), group=self.group)
        return [int(value) for value in tensor.tolist()]


def _first_line(error: Exception) -> str:
    kind = type(error).__name__
    try:
        return str(error) if isinstance(error, RefusedError) else f"{kind}: {error}".splitlines()[0]
    except Exception:  # of the user's own __str__; the other ranks wait
        return kind


def refuse_differences(ranks: Ranks, values: Mapping[str, object], remedy: str) -> None:
    """Refuses a callback whose arguments, or whose state, aren't the same on every rank, on all of them.

    Args:
        ranks: all that train together.
        values: plain values by name; what is no value, such as a function, is only asked whether it is there.
        remedy: what to do.

    Raises:
        MisconfigurationException: ranks differ; the message names them.
    """
    words = [repr(value is not None) if callable(value) else repr(value) for value in values.values()]
    differing = ranks.differing([zlib.crc32(word.encode()) for word in words])
    if differing:
        names = [list(values)[i] for i in differing]
        raise MisconfigurationException(
            f"ranks disagree about the SpectrumMonitor's {', '.join(names)} (here {words[differing[0]]}), so that "
            f"their probes would wait for each other: {remedy}"
        )


def all_or_none(ranks: Ranks, stage: Callable[[], T]) -> T:
    """Runs a local stage that a probe can do without; goes on only if it worked on every rank.

    Raises:
        RefusedError: it failed here or elsewhere; of the exception only the words are kept.
    """
    try:
        return ranks.together(stage, lambda error: isinstance(error, NonFiniteError), "it failed on {}")
    except LostRankError:
        raise
    except Exception as error:
        reason = "memory ran out" if is_out_of_memory(error) else str(error) or type(error).__name__
    raise RefusedError(reason)  # out here, or it would keep the exception and what that holds
