"""What is measured of one step, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.optim.errors import NoCalibrationError
from lightning_rmt.optim.ranks import mean_over_ranks
from lightning_rmt.optim.taken_step import Direction, LossFunction, TakenStep

#: About so many measured steps are remembered for the share of clipped ones.
MEMORY = 4


class Ratio(NamedTuple):
    """How much too long a step is.

    Attributes:
        held_out: r with the curvature of an independent batch; infinite where the step isn't finite, or goes uphill without
            momentum.
        own: with that of the step's own batch, None where it wasn't asked for.
        direction: along which.
        reach: how far one gradient moves the weights in all, in steps of length one; at least 1.
    """

    held_out: float
    own: float | None
    direction: Direction
    reach: float = 1.0

    @property
    def value(self) -> float:
        """The larger in size, times the reach: what the damping follows."""
        larger = self.held_out if self.own is None or abs(self.held_out) >= abs(self.own) else self.own
        return larger * self.reach


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

    def ratio(self, held_out: LossFunction | None, own: LossFunction | None = None) -> Ratio:
        """``r = d'H d / (-g.d)`` for a learning rate of one, H of a loss before the step.

        Args:
            held_out: of an independent batch; the same function as ``own`` where there is none, and that has to do.
            own: of the step's own batch, if that is to count too.

        Raises:
            NoCalibrationError: some rank can't say, or momentum takes the step uphill.
        """
        directions: list[Direction] = []

        def measure() -> list[float]:
            if held_out is None:
                raise NoCalibrationError(
                    "no independent batch is at hand: none was passed as held_out or, in a Trainer, this is the first step "
                    "since the training began or was resumed"
                )
            directions.append(self.taken.proposed())
            curvatures = [math.nan, math.nan]
            for place, loss in enumerate((held_out, None if own is held_out else own)):
                if loss is not None and math.isfinite(directions[0].length):
                    self.products += 1
                    curvatures[place] = self.taken.curvature(loss, directions[0].unit)
            if own is held_out:
                curvatures[1] = curvatures[0]
            return [*curvatures, directions[0].slope]

        *curvatures, slope = self._means(measure, 3)
        direction = directions[0]
        # damped curvature that isn't positive makes steps uphill
        if not math.isfinite(direction.length) or (slope >= 0 and direction.pure):
            return Ratio(math.inf, None if own is None else math.inf, direction, self.taken.reach)
        if not slope < 0:
            raise NoCalibrationError(
                "the step doesn't go downhill on its own batch (momentum outweighs the gradient), so its length says nothing"
            )
        ratios = [direction.length * curvature / -slope for curvature in curvatures]
        if math.isnan(ratios[0]) or (own is not None and math.isnan(ratios[1])):
            raise NoCalibrationError("the curvature along the step isn't a number")
        return Ratio(ratios[0], None if own is None else ratios[1], direction, self.taken.reach)

    def losses(self, loss: LossFunction, before: Tensor | float | None) -> tuple[float, float]:
        """The step's own batch's loss before and after it; taken once.

        Args:
            loss: of that batch.
            before: its value before the step, where it is known.

        Raises:
            NoCalibrationError: it can't be had on some rank.
        """

        def measure() -> list[float]:
            start = before.detach() if isinstance(before, Tensor) else before
            if start is None:
                with self.taken.at_start():
                    start = self.taken.value(loss)
            return [float(start), self.taken.value(loss)]

        if self._losses is None:
            start, end = self._means(measure, 2)
            self._losses = start, end
        return self._losses

    def check_gradients(self) -> None:
        """Whether the step may be taken again.

        Raises:
            NoCalibrationError: its gradients are missing, sparse or not finite on some rank.
        """

        def check() -> list[float]:
            self.taken.check_gradients()
            return []

        self._means(check, 0)

    def loss_at(self, start: TakenStep, loss: LossFunction) -> float:
        """The step's own batch's loss at the weights that an earlier step started from.

        Raises:
            NoCalibrationError: it can't be had on some rank.
        """

        def measure() -> list[float]:
            with start.at_start():
                return [self.taken.value(loss)]

        return self._means(measure, 1)[0]

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

        def measure() -> list[float]:
            direction = self.taken.applied()
            if not math.isfinite(direction.length):
                return [math.nan]
            self.products += 1
            curvature = self.taken.curvature(loss, direction.unit)
            return [direction.length * (direction.slope + direction.length * curvature / 2)]

        (predicted,) = self._means(measure, 1)
        start, end = self.losses(loss, before)
        return (end - start) / predicted if predicted < 0 and math.isfinite(end) else -math.inf

    def clipped_share(self, clipped: bool, before: float | None) -> float:
        """Share of clipped steps among the last ones, with this one: a mean that forgets.

        Args:
            clipped: whether this one was; of several ranks the share counts.
            before: the share before it, None for the first.
        """
        (share,) = self._means(lambda: [float(clipped)], 1)
        return share if before is None else before + (share - before) / MEMORY

    def _means(self, measure: Callable[[], list[float]], count: int) -> list[float]:
        """Means over the ranks of what each of them measures: so many numbers; where one fails, all do.

        Raises:
            NoCalibrationError: some rank can't say. Of several ranks that goes for whatever its loss raises; where nobody
                waits, that is raised itself.
        """
        found, reason = [math.nan] * count, None
        try:
            found = measure()
        except NoCalibrationError as error:
            reason = error
        except Exception as error:
            if self._group is None:
                raise
            reason = NoCalibrationError(f"{type(error).__name__}: {error}")
        *found, failed = mean_over_ranks([*found, float(reason is not None)], self._group, self.taken.device)
        if failed:
            raise reason or NoCalibrationError("another rank couldn't measure the step")
        return found


def same_direction(one: Ratio, other: Ratio) -> bool:
    """Whether two steps are the same bit for bit."""
    return one.direction.length == other.direction.length and torch.equal(one.direction.unit, other.direction.unit)
