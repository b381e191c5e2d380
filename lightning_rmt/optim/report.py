"""What a controller saw in one step and what it did about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DampingReport:
    """One look at a step; every number is in the curvature's units or has none.

    Attributes:
        step: that the controller counted, from 0.
        mode: ``"log"``, ``"suggest"`` or ``"control"``.
        damping: in use from now on.
        suggested: what the measurement asks for; in ``"control"`` it is ``damping`` unless the step was rejected.
        ratio: held-out r with the damping that the step was taken with; 1 is right, above 1 it was too small. None where it
            wasn't measured.
        own_ratio: the same with the curvature of the step's own batch; the larger of the two is followed.
        reach: what both are multiplied by before they are followed: ``lr / (1 - momentum)`` of heavy-ball momentum, at least
            1; None where there is no ratio.
        reduction: actual over predicted reduction of the batch's own loss, for the trust part; None where not measured.
        rejected: whether the step was undone.
        undone: steps undone with it: 1, or all since the losses of the batches were lowest; 0 where none was.
        rejections: how often that happened so far.
        products: curvature products so far.
        refused: why there is no ratio, or why nothing was changed; None where all is well.
        local_law: the damping of the local law at the last spectrum, None before one.
        effective: what noise leaves of the damping, by that spectrum; None where it can't be said.
    """

    step: int
    mode: str
    damping: float
    suggested: float
    ratio: float | None
    own_ratio: float | None
    reduction: float | None
    rejected: bool
    undone: int
    rejections: int
    products: int
    refused: str | None
    reach: float | None
    local_law: float | None
    effective: float | None
