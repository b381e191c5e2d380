"""What a controller remembers from step to step, and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_rmt.optim.adjustment import FIRST_PRODUCTS
from lightning_rmt.optim.settings import Mode
from lightning_rmt.optim.targets import UNKNOWN


@dataclass
class ControllerState:
    """Plain numbers only, so that a checkpoint holds no objects.

    Attributes:
        mode: the current one.
        damping: the largest of the target's values.
        trust: at least so large is the damping in the method ``"two-part"``.
        ratios: of the target's values to the largest.
        steps: seen so far.
        products: curvature products so far.
        rejections: how often steps were undone so far.
        first_products: left for the first calibration; 0 once it is over.
        started: whether the damping comes from a measurement already.
        local_law: of the last spectrum, None before one.
        effective: what is left of the damping by that spectrum.
        largest: its largest absolute eigenvalue.
        noise_free: whether it came with no noise to speak of.
        suggested: whether a suggestion was made already.
        distrusted: whether the noise was far from the local law's, so that held-out curvature has its say in any method.
        guarded_until: steps up to which every one is guarded.
        given_up: whether somebody else set the damping, so that this controller only logs.
        settled: whether the damping was right, or too small, once: from there on it falls slowly.
        clipped: share of clipped steps among the last measured ones, None where nobody said.
    """

    mode: Mode
    damping: float = UNKNOWN
    trust: float = 0.0
    ratios: tuple[float, ...] | None = None
    steps: int = 0
    products: int = 0
    rejections: int = 0
    first_products: int = FIRST_PRODUCTS
    started: bool = False
    local_law: float | None = None
    effective: float | None = None
    largest: float | None = None
    noise_free: bool = False
    suggested: bool = False
    distrusted: bool = False
    guarded_until: int = 0
    given_up: bool = False
    settled: bool = False
    clipped: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ControllerState:
        """From what `to_dict` gave.

        Raises:
            ValueError: something is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(saved) != names:
            raise ValueError(
                f"this is no state of a DampingController: {sorted(names - set(saved))} missing, "
                f"{sorted(set(saved) - names)} unknown"
            )
        ratios = saved["ratios"]
        return cls(**{**saved, "ratios": None if ratios is None else tuple(ratios)})
