"""A loss that rises from batch to batch, each time by too little for the guard."""

from __future__ import annotations

import math
from collections import deque

from lightning_rmt.optim.taken_step import TakenStep

#: Batches whose losses are averaged.
WINDOW = 4
#: Standard errors between two means before one is above the other. With it, of stretches of 25 batches whose losses are
#: drawn from one lognormal distribution with a relative scatter of .1, .3, .5 and 1, it calls 0, 5, 3 and 1 % a rise by 1.5.
SIGNIFICANT = 3.5


class LossRise:
    """Watches the losses of successive batches, each before its step, and knows where they were lowest.

    A step that is too long lowers the loss of its own batch all the same, so what the guard sees of one step is fine, while
    the loss of any other batch rises. Successive batches are others to each other, and their losses cost nothing.

    Args:
        factor: a mean over `WINDOW` batches that is so many times the lowest such mean is a rise, if the two differ by
            `SIGNIFICANT` standard errors; of a negative loss, one that is above it by as much.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.forget()

    def forget(self) -> None:
        """Starts anew."""
        self._last: int | None = None
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._differences: list[float] = []
        self._lowest: tuple[float, int, TakenStep] | None = None
        self._bad = 0

    def see(self, step: int, loss: float, taken: TakenStep) -> tuple[int, TakenStep] | None:
        """One more batch.

        Args:
            step: its number; a gap to the last one starts the watch anew.
            loss: of its batch before it was taken, the same on all ranks.
            taken: where it started.

        Returns:
            Where to go back to, the number of the step at whose start the mean was lowest and that step; None: no rise.
        """
        if self._last != step - 1:
            self.forget()
        self._last = step
        if not math.isfinite(loss):  # one such batch is the guard's; where there are only such, the weights are bad
            self._bad += 1
            return self._lowest[1:] if self._lowest is not None and self._bad >= WINDOW else None
        self._bad = 0
        if self._losses:
            self._differences.append(_relative_difference(loss, self._losses[-1]))
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return None
        mean = math.fsum(self._losses) / WINDOW
        if self._lowest is None or mean < self._lowest[0]:
            self._lowest = mean, step, taken
            return None
        lowest, at, where = self._lowest
        # successive differences: a scatter that a trend has no part in
        scatter = math.sqrt(2 * math.fsum(d * d for d in self._differences) / len(self._differences))
        error = scatter * math.hypot(mean, lowest) / math.sqrt(WINDOW)
        return (at, where) if self.is_above(mean, lowest) and mean - lowest > SIGNIFICANT * error else None

    def is_above(self, loss: float, lowest: float) -> bool:
        """Whether a loss is so many times another: of a negative one, above it by as much."""
        return loss > lowest + (self._factor - 1) * abs(lowest)


def _relative_difference(one: float, other: float) -> float:
    size = abs(one) + abs(other)
    return (one - other) / size if size > 0 else 0.0
