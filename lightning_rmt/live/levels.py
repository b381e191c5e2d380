"""Level statistics of the live module: exact blocks in float64, on all ranks together, never at the probe's expense."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from lightning_rmt.curvature.double_precision import Slice, double_batch, double_bytes, in_double
from lightning_rmt.curvature.evaluation import differentiable, evaluate
from lightning_rmt.curvature.exact_block import BlockHessian, ExactLevels, rows_affordable, steps_to_loss
from lightning_rmt.curvature.parameters import select_parameters
from lightning_rmt.levels.block import BlockLevels
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.fence.enclosure import enclose
from lightning_rmt.live.fence.generators import seed_generators
from lightning_rmt.live.level_blocks import (
    FEWEST,
    FEWEST_AUTO,
    MOST,
    TIME_SHARE,
    LevelBlock,
    named_block,
    nearest_block,
)
from lightning_rmt.live.loss import curvature_loss
from lightning_rmt.live.memory import SHARE, free_bytes
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import Learned, ProbeSettings

#: Distance to the loss of a parameter that it doesn't depend on.
_NOWHERE = 2**40

T = TypeVar("T")


class FoundLevels(NamedTuple):
    """Level statistics of one probe.

    Attributes:
        blocks: one entry per block that could be had.
        notes: why others couldn't.
        learned: for the next probe.
    """

    blocks: tuple[BlockLevels, ...]
    notes: tuple[str, ...]
    learned: Learned


def measure_levels(
    trainer: Any,
    module: Any,
    batches: Sequence[CapturedBatch],
    settings: ProbeSettings,
    ranks: Ranks,
    *,
    seconds: float,
    seed: int,
    learned: Learned,
) -> FoundLevels:
    """Exact level statistics; called inside the fence, by all ranks.

    Whatever goes wrong is a note: the spectrum has been measured by then.

    Args:
        trainer: the Trainer.
        module: the LightningModule, fenced and gathered.
        batches: this rank's curvature batches.
        settings: with what is wanted in ``levels``.
        ranks: all that take part.
        seconds: what the rest of the probe took.
        seed: of what the loss draws on this rank, so that it doesn't depend on what earlier probes have found out.
        learned: from earlier probes.
    """
    if settings.levels is None:
        return FoundLevels((), (), learned)
    if learned.no_levels is not None:
        return FoundLevels((), (learned.no_levels,), learned)
    work = _Work(trainer, module, batches, settings, ranks, seed)
    if settings.levels == "auto":
        try:
            block = learned.level_block or work.nearest()
            found, kept = work.measure(block, allowed=TIME_SHARE * seconds)
        except RefusedError as error:
            reason = f"no level statistics: {error}"
            return FoundLevels((), (reason,), replace(learned, no_levels=reason))
        return FoundLevels((found,), (), replace(learned, level_block=kept))
    blocks, notes = [], []
    for pattern in settings.levels:
        try:
            block = work.together(partial(named_block, module, pattern, settings.parameters))
            blocks.append(work.measure(block, allowed=None)[0])
        except RefusedError as error:
            notes.append(f"no level statistics of {pattern}: {error}")
    return FoundLevels(tuple(blocks), tuple(notes), learned)


class _Work:
    """What the stages of one measurement share."""

    def __init__(
        self,
        trainer: Any,
        module: Any,
        batches: Sequence[CapturedBatch],
        settings: ProbeSettings,
        ranks: Ranks,
        seed: int,
    ) -> None:
        self.module = module
        self.settings = settings
        self.ranks = ranks
        self.batches = batches[: ranks.least(len(batches))]  # as many on every rank
        self.enclosure = enclose(trainer, module, seed=seed, autocast=False)
        self.modules = self.enclosure.modules
        self.loss = curvature_loss(module, settings.loss_fn)

    def together(self, stage: Callable[[], T]) -> T:
        """Runs a local stage; goes on only if it worked on every rank."""
        return all_or_none(self.ranks, stage)

    def nearest(self) -> LevelBlock:
        """The block of the layers nearest to the loss; one evaluation of the loss."""
        trainable = dict(select_parameters(self.module.named_parameters(), self.settings.parameters))

        def look() -> dict[int, int]:
            with differentiable():  # compiled code would show as a single step
                return steps_to_loss(evaluate(self.loss, (self.batches[0],), 0).loss, trainable.values())

        mine = self.together(look)
        # Another rank's batch may go another way through the module: one distance, and so one block, for all of them.
        agreed = self.ranks.largest([mine.get(id(p), _NOWHERE) for p in trainable.values()])
        distances = {id(p): n for p, n in zip(trainable.values(), agreed, strict=True) if n < _NOWHERE}
        block = nearest_block(trainable, distances)
        if block is None:
            raise RefusedError(f"too few parameters; {FEWEST} levels are needed")
        return block

    def measure(self, block: LevelBlock, allowed: float | None) -> tuple[BlockLevels, LevelBlock]:
        """The block's levels on every batch of every rank.

        Args:
            block: which parameters.
            allowed: seconds that it may take; None: as long as it takes.

        Returns:
            The levels, and the block with the number of coordinates that the time sufficed for.
        """
        begin = time.perf_counter()
        slices = self.together(partial(block.slices, self.module))
        if block.keep is not None:
            allowed = None
        with ExitStack() as stack:

            def start() -> tuple[list[torch.Tensor], BlockHessian, float]:
                self._refuse_too_large(slices)
                leaves = stack.enter_context(in_double(self.modules, slices))
                hessian = self._hessian(leaves, 0)
                return leaves, hessian, 0.0 if allowed is None else hessian.seconds_per_row()

            leaves, first, per_row = self.together(start)
            keep = first.size if block.keep is None else min(block.keep, first.size)
            if allowed is not None:
                affordable = self.ranks.least(rows_affordable(allowed / len(self.batches), per_row))
                wanted = min(FEWEST_AUTO, keep)
                if affordable < wanted:
                    needed = wanted * per_row * len(self.batches)
                    raise RefusedError(
                        f"the exact Hessian of {wanted} parameters of {block.name}, the layers nearest to the loss, would "
                        f"take {needed:.2g} s, more than {TIME_SHARE:g} of the rest of the probe ({allowed:.2g} s). "
                        f"levels=[...] with layers or patterns of {FEWEST} to {MOST} parameters takes them all the same"
                    )
                keep = min(keep, affordable)

            def finish() -> list[ExactLevels]:
                others = range(1, len(self.batches))
                return [first.levels(keep), *(self._hessian(leaves, i).levels(keep) for i in others)]

            mine = self.together(finish)
        rows = np.stack([np.append(found.eigenvalues, found.noise) for found in mine])
        everyones = self.ranks.gather(rows).reshape(-1, keep + 1)
        spectra, noise = everyones[:, :-1], float(everyones[:, -1].max())
        levels = BlockLevels(
            name=block.name,
            description=block.describe(slices, keep),
            eigenvalues=spectra,
            noise=noise,
            seconds=time.perf_counter() - begin,
        )
        return levels, replace(block, keep=keep)

    def _hessian(self, leaves: list[torch.Tensor], index: int) -> BlockHessian:
        captured = self.batches[index]
        seed_generators((self.enclosure.seed + index) % 2**63, self.enclosure.device)
        return BlockHessian(self.loss, leaves, CapturedBatch(double_batch(captured.batch), captured.batch_idx), index)

    def _refuse_too_large(self, slices: Sequence[Slice]) -> None:
        size = sum(part.size for part in slices)
        device = slices[0].parameter.device
        needed, free = double_bytes(self.modules) + 4 * 8 * size**2, free_bytes(device)
        if needed > SHARE * free:
            raise RefusedError(
                f"a copy of the model in float64 and the block take {needed / 2**30:.2g} GiB, of {free / 2**30:.2g} GiB free"
            )
