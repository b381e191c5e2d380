"""What is measured of one step, the same on every rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.optim.errors import NoCalibrationError
from lightning_rmt.optim.ranks import mean_over_ranks
from lightning_rmt.optim.taken_step import Direction, LossFunction, TakenStep


class Ratio(NamedTuple):
    """A held-out measurement.

    Attributes:
        value: r; infinite where the step isn't finite, or goes uphill without momentum.
        direction: along which.
    """

    value: float
    direction: Direction


class Look:
    """One step, looked at.

    Every rank must ask the same questions in the same order. What fails on one rank is refused on all.

    Args:
        taken: the step.
        group: process group, None: this process alone.

    Attributes:
        taken: the step.
        products: curvature products taken.
    """

    def __init__(self, taken: TakenStep, group: dist.ProcessGroup | None) -> None:
        self.taken = taken
        self.products = 0
        self._group = group
        self._losses: tuple[float, float] | None = None

    def ratio(self, held_out: LossFunction | None) -> Ratio:
        """``r = d'H d / (-g.d)`` for a learning rate of one, H of the held-out loss before the step.

        Raises:
            NoCalibrationError: some rank can't say, or momentum takes the step uphill.
        """
        reason: NoCalibrationError | None = None
        curvature, direction = math.nan, None
        try:
            if held_out is None:
                raise NoCalibrationError("no loss of an independent batch was given")
            direction = self.taken.proposed()
            if math.isfinite(direction.length):
                self.products += 1
                curvature = self.taken.curvature(held_out, direction.unit)
        except NoCalibrationError as error:
            reason = error
        slope = math.nan if direction is None else direction.slope
        curvature, slope, failed = self._mean([curvature, slope, float(reason is not None)])
        if failed or direction is None:
            raise reason or NoCalibrationError("another rank couldn't measure the curvature along the step")
        if not math.isfinite(direction.length):
            return Ratio(math.inf, direction)
        if slope >= 0 and direction.pure:  # damped curvature that isn't positive makes such steps
            return Ratio(math.inf, direction)
        if not slope < 0:
            raise NoCalibrationError(
                "the step doesn't go downhill on its own batch (momentum outweighs the gradient), so its length says nothing"
            )
        if math.isnan(curvature):
            raise NoCalibrationError("the curvature along the step isn't a number")
        return Ratio(direction.length * curvature / -slope, direction)

    def losses(self, loss: LossFunction, before: Tensor | float | None) -> tuple[float, float]:
        """The step's own batch's loss before and after it; taken once.

        Args:
            loss: of that batch.
            before: its value before the step, where it is known.
        """
        if self._losses is None:
            if before is None:
                with self.taken.at_start():
                    before = self.taken.value(loss)
            elif isinstance(before, Tensor):
                before = before.detach()
            found = self._mean([float(before), self.taken.value(loss)])
            self._losses = found[0], found[1]
        return self._losses

    def forget_losses(self) -> None:
        """For a step that was taken again."""
        self._losses = None

    def reduction(self, loss: LossFunction, before: Tensor | float | None) -> float:
        """Actual over predicted reduction of the batch's own loss, predicted by its own gradient and curvature.

        Returns:
            1 where the loss is quadratic; minus infinity where the step was predicted to raise it.

        Raises:
            NoCalibrationError: some rank can't say.
        """
        reason: NoCalibrationError | None = None
        predicted = math.nan
        try:
            direction = self.taken.applied()
            if math.isfinite(direction.length):
                self.products += 1
                curvature = self.taken.curvature(loss, direction.unit)
                predicted = direction.length * (direction.slope + direction.length * curvature / 2)
        except NoCalibrationError as error:
            reason = error
        predicted, failed = self._mean([predicted, float(reason is not None)])
        if failed:
            raise reason or NoCalibrationError("another rank couldn't measure the curvature along the step")
        start, end = self.losses(loss, before)
        return (end - start) / predicted if predicted < 0 and math.isfinite(end) else -math.inf

    def _mean(self, numbers: list[float]) -> list[float]:
        return mean_over_ranks(numbers, self._group, self.taken.device)


def same_direction(one: Ratio, other: Ratio) -> bool:
    """Whether two steps are the same bit for bit."""
    return one.direction.length == other.direction.length and torch.equal(one.direction.unit, other.direction.unit)
