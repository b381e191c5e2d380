"""When to probe, and how much: every n optimizer steps, or as often as a share of the training time pays for."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal, NamedTuple

#: A full probe shows the density and the outliers; a light one ends once the outermost eigenvalues are certified.
Speed = Literal["full", "light"]

# Steps after a probe before the next one is decided on: enough for a median step time that a slow first step can't spoil.
STEPS_TO_MEASURE = 10
# How many times the share early probes may take while they borrow from later ones: a training may end long before it was
# meant to (early stopping, Ctrl-C, a max_epochs of 1000 that nobody waits for), and then nothing is ever paid back.
MAX_BORROWED = 4.0
# Light probes between two full ones take about as much time as a full one, at most this many of them.
MAX_LIGHT = 10
# What a light probe is taken to cost before one was measured, as a share of a full one's cost.
LIGHT_SHARE = 0.25
# Weight of the last light probe's cost in their running mean: one takes 8 products and the next 19, and a plan that follows
# each of them is irregular.
NEW_COST = 0.3
NEVER = 2**62


class Decision(NamedTuple):
    """The next probe in a schedule by budget; plain integers, to be told to other ranks.

    Attributes:
        step: at which its window opens; `NEVER` if there is to be none.
        light: 1 for a light probe, 0 for a full one.
    """

    step: int
    light: int


class Schedule:
    """Says, for every optimizer step, whether its batches are collected and which probe follows it.

    A probe that wants several batches collects them over the steps before it: the window opens at a multiple of
    ``every_n_steps`` and the probe is taken at its end. In that mode the answer depends on the step's number alone, so a
    resumed run probes where the uninterrupted one would have. With ``every_n_steps=None`` the first window opens at step
    0, and the next ones as the budget allows. That needs a clock, so it is decided by one rank (`decide`) and told to the
    others. The budget goes in halves to full probes and to light ones between them, as far as light ones are cheap.

    Steps are counted as Lightning's loggers count them: batches after which an optimizer stepped, whatever the
    accumulation and the number of optimizers.

    Attributes:
        steps_of_a_full_probe: how many steps take as long as one, if `decide` found that the rest of the training pays for
            none; None else.

    Args:
        every_n_steps: distance of the full probes, or None for the budget.
        max_overhead: the probes' share of the training time, for the budget.
        batches: curvature batches per probe.
        light_every_n_steps: distance of the light probes where ``every_n_steps`` is given, which is a multiple of it.
    """

    def __init__(
        self, every_n_steps: int | None, max_overhead: float, batches: int, light_every_n_steps: int | None = None
    ) -> None:
        self.every_n_steps = every_n_steps
        self.light_every_n_steps = light_every_n_steps
        self.max_overhead = max_overhead
        self.batches = batches
        self.probe_seconds = 0.0
        self.training_seconds = 0.0
        self._timed = 0
        self._next: Decision | None = Decision(0, 0)
        self._review: int | None = None
        self._last_probe: int | None = None
        self._last_full = 0
        self._light_since_full = 0
        self._full_cost = 0.0
        self._light_cost: float | None = None
        self.steps_of_a_full_probe: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=100)

    @property
    def arguments(self) -> dict[str, float | None]:
        """What it was made with."""
        return {
            "every_n_steps": self.every_n_steps,
            "light_every_n_steps": self.light_every_n_steps,
            "max_overhead": self.max_overhead,
            "batches": self.batches,
        }

    @property
    def agreed(self) -> dict[str, Decision | int | None]:
        """What must be the same on every rank."""
        return {"next probe": self._next, "next decision": self._review}

    def window(self, accumulate: int) -> int:
        """Steps that a probe's batches take, with ``accumulate`` batches to a step."""
        return math.ceil(self.batches / accumulate)

    def collects(self, step: int, accumulate: int) -> bool:
        """Whether the batches of this step go into a probe."""
        if self.every_n_steps is not None:
            return step % (self.light_every_n_steps or self.every_n_steps) < self.window(accumulate)
        return self._next is not None and step >= self._next.step

    def due(self, step: int, accumulate: int) -> Speed | None:
        """The probe that follows this step, if any."""
        last_of_window = self.window(accumulate) - 1
        if self.every_n_steps is not None:
            if step % self.every_n_steps == last_of_window:
                return "full"
            light = self.light_every_n_steps is not None and step % self.light_every_n_steps == last_of_window
            return "light" if light else None
        if self._next is None or step < self._next.step + last_of_window:
            return None
        return "light" if self._next.light else "full"

    @property
    def overhead(self) -> float | None:
        """Time spent on probes over time spent on training so far; None before enough steps were timed to say so.

        A probe over one step or two is no share of a training: the first probe takes hundreds of steps, and the first step
        is a slow one.
        """
        return self.overhead_with(0.0)

    def overhead_with(self, seconds: float) -> float | None:
        """`overhead` once a probe that took ``seconds`` is counted in."""
        enough = self._timed >= STEPS_TO_MEASURE and self.training_seconds > 0
        return (self.probe_seconds + seconds) / self.training_seconds if enough else None

    def stepped(self, seconds: float) -> None:
        """Notes how long a step of the training took, without the probe."""
        self.training_seconds += seconds
        self._timed += 1
        self._step_seconds.append(seconds)

    def probed(self, step: int, seconds: float, recurring: float | None = None, speed: Speed = "full") -> None:
        """Notes that a probe was taken (or tried) after this step.

        Args:
            step: the step.
            seconds: what it cost in all, with drawing and logging.
            recurring: what the next one will cost: without the imports of the first and the figures of some.
            speed: which probe it was.
        """
        self.probe_seconds += seconds
        cost = max(seconds if recurring is None else recurring, 1e-9)
        self._last_probe = step
        if speed == "full":
            self._full_cost, self._last_full, self._light_since_full = cost, step, 0
            if not self._between:  # light ones were too dear; one is tried again: they get cheaper as training goes on
                self._light_cost = None
        else:
            known = self._light_cost
            self._light_cost = cost if known is None else (1 - NEW_COST) * known + NEW_COST * cost
            self._light_since_full += 1
        self._next, self._review = None, step + STEPS_TO_MEASURE
        self._step_seconds.clear()

    def undecided(self, step: int) -> bool:
        """Whether the next probe is to be decided on, or decided anew, after this step; the same on every rank."""
        return self.every_n_steps is None and self._review is not None and step >= self._review

    def decide(self, step: int, total_steps: float, seconds_left: float = math.inf) -> Decision:
        """The next probe, from this rank's clock.

        Where the training's length is known, the full probes that its whole time pays for are spread evenly in the square
        root of the step: the curvature changes fastest at the beginning, so early probes borrow from later ones, and the
        share is kept at the end of the training rather than at every moment of it, where it may be up to `MAX_BORROWED`
        times that. Without a known end they are spread evenly. Light ones lie at equal distances between two full ones.

        Args:
            step: now.
            total_steps: steps that the whole training takes, infinity if that isn't known.
            seconds_left: time until the training is stopped, whatever its steps; infinity if there is no limit.
        """
        if self._last_probe is None or not self._step_seconds:
            return Decision(step + 1, 0)
        step_seconds = max(statistics.median(self._step_seconds), 1e-9)
        if not math.isinf(seconds_left):
            left = max(seconds_left, 0.0) / (1.0 + self.max_overhead)
            total_steps = min(total_steps, step + math.floor(left / step_seconds))
        full, light = self._full_cost, self._light_cost or LIGHT_SHARE * self._full_cost
        between = self._between
        self.steps_of_a_full_probe = None
        to_come = max(between - self._light_since_full, 0)

        if total_steps <= step or math.isinf(total_steps):
            next_full = self._last_full + (full + between * light) / (self.max_overhead * step_seconds)
            next_full = max(next_full, self._paid(step, to_come * light, step_seconds, self.max_overhead))
        else:
            budget = self.max_overhead * (self.training_seconds + (total_steps - step) * step_seconds)
            affordable = budget - self.probe_seconds
            cycles = math.floor((affordable + self._light_since_full * light) / (full + between * light))
            last = total_steps - self.batches  # the last one comes just before the end
            if cycles < 1:
                self.steps_of_a_full_probe = full / step_seconds
                return self._light_to_the_end(step, last, math.floor(affordable / light) if between else 0)
            position = math.sqrt(self._last_full / total_steps)
            next_full = total_steps * (position + (1.0 - position) / cycles) ** 2
            borrowing = MAX_BORROWED * self.max_overhead
            next_full = max(next_full, self._paid(step, to_come * light + full, step_seconds, borrowing))
            if next_full > last:
                next_full = last
                if next_full <= step:
                    return Decision(NEVER, 0)
        if to_come:
            next_light = self._last_probe + (next_full - self._last_probe) / (to_come + 1)
            if not math.isinf(total_steps):
                next_light = max(next_light, self._paid(step, light, step_seconds, MAX_BORROWED * self.max_overhead))
            opens = max(step + 1, math.ceil(next_light))
            if next_full - opens >= max(self.batches, (opens - self._last_probe) / 2):  # not just before a full one
                return Decision(opens, 1)
        return Decision(max(step + 1, math.ceil(next_full)), 0)

    @property
    def _between(self) -> int:
        """Light probes between two full ones; none where one costs more than half a full one."""
        light = LIGHT_SHARE * self._full_cost if self._light_cost is None else self._light_cost
        return 0 if 2 * light > self._full_cost else min(int(self._full_cost / light), MAX_LIGHT)

    def _light_to_the_end(self, step: int, last: float, affordable: int) -> Decision:
        """What to do where no further full probe is paid for."""
        if affordable < 1 or last <= step:
            return Decision(NEVER, 0)
        assert self._last_probe is not None
        return Decision(max(step + 1, math.ceil(self._last_probe + (last - self._last_probe) / affordable)), 1)

    def _paid(self, step: int, cost: float, step_seconds: float, share: float) -> float:
        """The first step at which no more than this share was spent, this cost included."""
        worth = (self.probe_seconds + cost) / share
        return step + (worth - self.training_seconds) / step_seconds

    def set_next(self, step: int, following: Decision) -> None:
        """Takes over, at ``step``, the deciding rank's answer; it is looked at again half-way, as steps get slower."""
        self._next = following
        distance = following.step - step
        soon = distance <= 2 * STEPS_TO_MEASURE
        self._review = None if soon else step + max(min(distance // 2, step), STEPS_TO_MEASURE)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, for a checkpoint."""
        return {
            "next": None if self._next is None else list(self._next),
            "review": self._review,
            "last_probe": self._last_probe,
            "last_full": self._last_full,
            "light_since_full": self._light_since_full,
            "full_cost": self._full_cost,
            "light_cost": self._light_cost,
            "probe_seconds": self.probe_seconds,
            "training_seconds": self.training_seconds,
            "timed": self._timed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._next = None if state["next"] is None else Decision(*state["next"])
        self._review = state["review"]
        self._last_probe = state["last_probe"]
        self._last_full = int(state["last_full"])
        self._light_since_full = int(state["light_since_full"])
        self._full_cost = float(state["full_cost"])
        self._light_cost = None if state["light_cost"] is None else float(state["light_cost"])
        self.probe_seconds = float(state["probe_seconds"])
        self.training_seconds = float(state["training_seconds"])
        self._timed = int(state.get("timed", STEPS_TO_MEASURE))
