"""What a damping controller is told once, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Method: TypeAlias = Literal["heldout", "local-law", "two-part"]
Mode: TypeAlias = Literal["log", "suggest", "control"]
GuardSteps: TypeAlias = Literal["probe", "every"]


@dataclass(frozen=True)
class DampingSettings:
    """See `DampingController` for what each means.

    Raises:
        ValueError: a setting is out of its range; the message says which.
    """

    method: Method = "heldout"
    every: int = 25
    init: Literal["local-law"] | float = "local-law"
    bounds: tuple[float, float] = (1e-8, 1e3)
    rel_bounds: tuple[float, float] | None = None
    max_change: float = 2.0
    ema: float = 0.0
    deadband: tuple[float, float] = (0.7, 1.3)
    guard: float | None = 1.5
    guard_factor: float = 4.0
    guard_steps: GuardSteps = "probe"
    rewind: float | None = 1.5
    mode: Mode = "log"
    search: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("method", Method), ("mode", Mode), ("guard_steps", GuardSteps)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(f"{name} is one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
        if self.every < 1:
            raise ValueError(f"every is a number of steps, at least 1, got {self.every}")
        if self.init != "local-law" and not (isinstance(self.init, (int, float)) and 0 < self.init < math.inf):
            raise ValueError(f"init is 'local-law' or a damping above 0, got {self.init!r}")
        for name in ("bounds", "rel_bounds"):
            pair = getattr(self, name)
            if pair is not None and not 0 < pair[0] <= pair[1] < math.inf:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, got {pair}: updates multiply")
        if not 0 < self.deadband[0] <= 1 <= self.deadband[1]:
            raise ValueError(f"deadband must contain the ratio 1, at which the damping is right, got {self.deadband}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is the share of the old damping that is kept, in [0, 1), got {self.ema}")
        for name in ("max_change", "guard", "guard_factor", "rewind"):
            value = getattr(self, name)
            if value is not None and not 1 < value < math.inf:
                raise ValueError(f"{name} is a factor above 1, got {value}")

    def within(self, damping: float, largest: float | None = None) -> float:
        """The damping clipped to the bounds.

        Args:
            damping: in the curvature's units.
            largest: largest absolute eigenvalue, for ``rel_bounds``; None where it isn't known yet.
        """
        low, high = self.bounds
        if self.rel_bounds is not None and largest:
            low, high = max(low, self.rel_bounds[0] * largest), min(high, self.rel_bounds[1] * largest)
            high = max(low, high)  # where they exclude each other the lower one is the safer
        return min(max(damping, low), high)
