"""What a damping controller needs of a live training: the step's batches, others beside them, and losses of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_rmt.live.batches import CapturedBatch, copy_batch, is_empty
from lightning_rmt.live.gradients import refuse_sharded_gradients, refuse_sharded_parameters
from lightning_rmt.live.loss import LossFn, curvature_loss
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.optim.targets import KEYS, TargetArgument


class StepBatches:
    """The batches of the step that goes on, and those of the step before: independent of each other.

    A step's gradient hasn't seen the batches of the step before it, so the curvature there is held out from its direction.
    """

    def __init__(self) -> None:
        self._now: list[CapturedBatch] = []
        self._before: list[CapturedBatch] = []
        self._stepped = False

    def begin(self) -> None:
        """The next batch: of the step that goes on, or, if one was tried since the last batch, of the next step.

        Several steps on one batch, as in manual optimization, are all its own, and a step that a gradient scaler skips is
        over all the same.
        """
        if self._stepped:
            self._before, self._now, self._stepped = self._now, [], False

    def add(self, batch: Any, batch_idx: int) -> None:
        """Copies a batch of the step that goes on."""
        self._now.append(CapturedBatch(copy_batch(batch), batch_idx))

    def stepped(self) -> None:
        """A step was tried."""
        self._stepped = True

    def forget(self) -> None:
        """Drops all."""
        self._now, self._before, self._stepped = [], [], False

    def own(self, module: Any, loss_fn: LossFn | None) -> Callable[[], Tensor] | None:
        """The mean loss over the step's own batches; None where they weren't kept."""
        return _mean_loss(module, self._now, loss_fn)

    def held_out(self, module: Any, loss_fn: LossFn | None) -> Callable[[], Tensor] | None:
        """The same over those of the step before."""
        return _mean_loss(module, self._before, loss_fn)


def _mean_loss(module: Any, captured: list[CapturedBatch], loss_fn: LossFn | None) -> Callable[[], Tensor] | None:
    batches = [batch for batch in captured if not is_empty(batch.batch)]
    if not batches:
        return None
    one = curvature_loss(module, loss_fn)

    def mean() -> Tensor:
        # as Lightning accumulates: every batch counts the same, whatever it holds
        losses = [found[0] if isinstance(found := one(batch), tuple) else found for batch in batches]
        return sum(losses[1:], losses[0]) / len(losses)

    return mean


def find_optimizer(trainer: Any, place: int | None, target: TargetArgument) -> Any:
    """The optimizer whose damping is meant.

    Args:
        trainer: its optimizers are made.
        place: in the list that ``configure_optimizers`` returns; None: the first that has the target.
        target: see `DampingController`.

    Raises:
        MisconfigurationException: there is none.
    """
    optimizers = list(trainer.optimizers)
    if place is not None:
        if not 0 <= place < len(optimizers):
            raise MisconfigurationException(
                f"LocalLawDamping(optimizer={place}): configure_optimizers returns {len(optimizers)} optimizers, "
                "counted from 0"
            )
        return optimizers[place]
    if target is not None and not isinstance(target, str):
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"LocalLawDamping: which of the {len(optimizers)} optimizers is the target of? Say optimizer="
            )
        return optimizers[0]
    keys = KEYS if target is None else (target,)
    for optimizer in optimizers:
        if target == "call" or any(key in group for group in optimizer.param_groups for key in keys):
            return optimizer
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
    raise MisconfigurationException(
        f"LocalLawDamping found no damping: no parameter group of the optimizers ({names}) has "
        f"{' or '.join(map(repr, keys))}. Pass DampingController(target=...) with the name of its key, with (get, set) "
        "functions, or 'call' where the optimizer was given damping=controller; target='eps' takes Adam's eps"
    )


def refuse_sharding(trainer: Any, module: Any) -> None:
    """Refuses what a damping can't be measured under.

    Raises:
        MisconfigurationException: gradients or parameters are sharded.
    """
    refuse_sharded_gradients(trainer, "LocalLawDamping")
    refuse_sharded_parameters(module, "LocalLawDamping")
