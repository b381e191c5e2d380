"""How far a preconditioned training is: steps, refreshes, and whether the basis can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_rmt.optim.subspace import Subspace, subspace_from_state, subspace_to_state

#: Mean squared cosine between one basis and the next, below which the directions turn faster than they are measured.
STALE = 0.5
#: The interval between refreshes is halved so many times at most: beyond that they cost more than anything could win.
HALVINGS = 3


class Progress:
    """The part of a `SpectralPreconditioner` that changes from step to step.

    Args:
        refresh: steps from one refresh to the next, at most.

    Attributes:
        steps: steps taken.
        every: steps from one refresh to the next as it is now.
        refreshed_at: steps taken at the last refresh, None before the first.
        refreshes: how many there were.
        subspace: the newest one, None before the first refresh and where it wasn't saved.
        cosine: mean squared cosine of the newest subspace to the one before, None where there weren't two.
    """

    def __init__(self, refresh: int) -> None:
        self._refresh = refresh
        self.steps = self.refreshes = 0
        self.every = refresh
        self.refreshed_at: int | None = None
        self.subspace: Subspace | None = None
        self.cosine: float | None = None

    @property
    def stale(self) -> bool:
        """Whether the last refresh found that the one before was out of date: the newest will be, soon."""
        return self.cosine is not None and self.cosine < STALE

    @property
    def active(self) -> Subspace | None:
        """The subspace to shrink steps in; None where steps are the base's."""
        usable = self.subspace is not None and self.subspace.deflation.rank > 0 and not self.stale
        return self.subspace if usable else None

    @property
    def due(self) -> bool:
        """Whether the next refresh is due."""
        return self.refreshed_at is None or self.steps - self.refreshed_at >= self.every

    @property
    def reason(self) -> str:
        """In words, why so many directions are shrunk, or none."""
        if self.subspace is None:
            return "nothing was measured yet: call refresh(operator), or update(spectrum, pairs)"
        if self.stale:
            return (
                f"the directions turn faster than they are measured (mean squared cosine to the last ones {self.cosine:.2g}"
                f"); the next refresh is due {self.every} steps after the last"
            )
        return self.subspace.deflation.reason

    def take(self, subspace: Subspace) -> None:
        """Goes on with a new subspace; where it has turned away from the last one, it only serves to compare the next."""
        self.cosine = None if self.subspace is None else self.subspace.overlap(subspace)
        self.subspace = subspace
        self.refreshed_at = self.steps
        self.refreshes += 1
        shortest = max(1, self._refresh >> HALVINGS)
        self.every = max(shortest, self.every // 2) if self.stale else min(self._refresh, 2 * self.every)

    def to_state(self, optimized: Sequence[Tensor], save_basis: bool) -> dict[str, Any]:
        """Plain types and at most one tensor, for a checkpoint."""
        saved = subspace_to_state(self.subspace, optimized) if self.subspace is not None and save_basis else None
        numbers = {name: getattr(self, name) for name in ("steps", "every", "refreshed_at", "refreshes", "cosine")}
        return {**numbers, "subspace": saved}

    def load(self, state: dict[str, Any], optimized: Sequence[Tensor]) -> None:
        """Takes over what `to_state` gave."""
        for name in ("steps", "every", "refreshed_at", "refreshes", "cosine"):
            setattr(self, name, state[name])
        saved = state["subspace"]
        self.subspace = None if saved is None else subspace_from_state(saved, optimized)
        if self.subspace is None:
            self.forget()

    def forget(self) -> None:
        """The base's steps until the next refresh, which is due at once."""
        self.subspace = self.cosine = self.refreshed_at = None
