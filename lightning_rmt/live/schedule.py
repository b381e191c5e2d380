"""When to probe: every n optimizer steps, or as often as a share of the training time pays for."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

# Steps after a probe before the next one is decided on: enough for a median step time that a slow first step can't spoil.
STEPS_TO_MEASURE = 10
# How many times the share early probes may take while they borrow from later ones: a training may end long before it was
# meant to (early stopping, Ctrl-C, a max_epochs of 1000 that nobody waits for), and then nothing is ever paid back.
MAX_BORROWED = 4.0
NEVER = 2**62


class Schedule:
    """Says, for every optimizer step, whether its batches are collected and whether a probe follows it.

    A probe that wants several batches collects them over the steps before it: the window opens at a multiple of
    ``every_n_steps`` and the probe is taken at its end. In that mode the answer depends on the step's number alone, so a
    resumed run probes where the uninterrupted one would have. With ``every_n_steps=None`` the first window opens at step
    0, and the next ones as the budget allows. That needs a clock, so it is decided by one rank (`decide`) and told to the
    others.

    Steps are counted as Lightning's loggers count them: batches after which an optimizer stepped, whatever the
    accumulation and the number of optimizers.

    Args:
        every_n_steps: distance of the probes, or None for the budget.
        max_overhead: the probes' share of the training time, for the budget.
        batches: curvature batches per probe.
    """

    def __init__(self, every_n_steps: int | None, max_overhead: float, batches: int) -> None:
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self.batches = batches
        self.probe_seconds = 0.0
        self.training_seconds = 0.0
        self._next: int | None = 0
        self._review: int | None = None
        self._last_probe: int | None = None
        self._last_cost = 0.0
        self._step_seconds: deque[float] = deque(maxlen=100)

    def window(self, accumulate: int) -> int:
        """Steps that a probe's batches take, with ``accumulate`` batches to a step."""
        return math.ceil(self.batches / accumulate)

    def collects(self, step: int, accumulate: int) -> bool:
        """Whether the batches of this step go into a probe."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps < self.window(accumulate)
        return self._next is not None and step >= self._next

    def due(self, step: int, accumulate: int) -> bool:
        """Whether a probe follows this step."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps == self.window(accumulate) - 1
        return self._next is not None and step >= self._next + self.window(accumulate) - 1

    @property
    def overhead(self) -> float | None:
        """Time spent on probes over time spent on training so far; None before the first step was timed."""
        return self.overhead_with(0.0)

    def overhead_with(self, seconds: float) -> float | None:
        """`overhead` once a probe that took ``seconds`` is counted in."""
        return (self.probe_seconds + seconds) / self.training_seconds if self.training_seconds > 0 else None

    def stepped(self, seconds: float) -> None:
        """Notes how long a step of the training took, without the probe."""
        self.training_seconds += seconds
        self._step_seconds.append(seconds)

    def probed(self, step: int, seconds: float, recurring: float | None = None) -> None:
        """Notes that a probe was taken (or tried) after this step.

        Args:
            step: the step.
            seconds: what it cost in all, with drawing and logging.
            recurring: what the next one will cost: without the imports of the first and the figures of some.
        """
        self.probe_seconds += seconds
        self._last_probe, self._last_cost = step, seconds if recurring is None else recurring
        self._next, self._review = None, step + STEPS_TO_MEASURE
        self._step_seconds.clear()

    def undecided(self, step: int) -> bool:
        """Whether the next probe's step is to be decided, or decided anew, after this step; the same on every rank."""
        return self.every_n_steps is None and self._review is not None and step >= self._review

    def decide(self, step: int, total_steps: float, seconds_left: float = math.inf) -> int:
        """The step at which the next window opens, from this rank's clock.

        Where the training's length is known, the probes that its whole time pays for are spread evenly in the square root
        of the step: the curvature changes fastest at the beginning, so early probes borrow from later ones, and the share
        is kept at the end of the training rather than at every moment of it, where it may be up to `MAX_BORROWED` times
        that. Without a known end they are spread evenly.

        Args:
            step: now.
            total_steps: steps that the whole training takes, infinity if that isn't known.
            seconds_left: time until the training is stopped, whatever its steps; infinity if there is no limit.
        """
        if self._last_probe is None or not self._step_seconds:
            return step + 1
        step_seconds = max(statistics.median(self._step_seconds), 1e-9)
        cost = max(self._last_cost, 1e-9)
        if not math.isinf(seconds_left):
            left = max(seconds_left, 0.0) / (1.0 + self.max_overhead)
            total_steps = min(total_steps, step + math.floor(left / step_seconds))
        if total_steps <= step or math.isinf(total_steps):
            following = self._last_probe + cost / (self.max_overhead * step_seconds)
        else:
            budget = self.max_overhead * (self.training_seconds + (total_steps - step) * step_seconds)
            affordable = math.floor((budget - self.probe_seconds) / cost)
            if affordable < 1:
                return NEVER
            position = math.sqrt(self._last_probe / total_steps)
            following = total_steps * (position + (1.0 - position) / affordable) ** 2
            paid_for = (self.probe_seconds + cost) / (MAX_BORROWED * self.max_overhead)
            following = max(following, step + (paid_for - self.training_seconds) / step_seconds)
            if following > total_steps - self.batches:  # the last one comes just before the end
                following = total_steps - self.batches
                if following <= step:
                    return NEVER
        return max(step + 1, math.ceil(following))

    def set_next(self, step: int, following: int) -> None:
        """Takes over, at ``step``, the deciding rank's answer; it is looked at again half-way, as steps get slower."""
        self._next = following
        distance = following - step
        soon = distance <= 2 * STEPS_TO_MEASURE
        self._review = None if soon else step + max(min(distance // 2, step), STEPS_TO_MEASURE)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, for a checkpoint."""
        return {
            "next": self._next,
            "review": self._review,
            "last_probe": self._last_probe,
            "last_cost": self._last_cost,
            "probe_seconds": self.probe_seconds,
            "training_seconds": self.training_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._next = state["next"]
        self._review = state["review"]
        self._last_probe = state["last_probe"]
        self._last_cost = float(state["last_cost"])
        self.probe_seconds = float(state["probe_seconds"])
        self.training_seconds = float(state["training_seconds"])
