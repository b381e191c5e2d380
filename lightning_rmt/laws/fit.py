"""A law fitted to a measured bulk, with what can be said about it: never that it is the law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_rmt.laws.law import Law
from lightning_rmt.laws.parameters import law_from_dict, law_to_dict
from lightning_rmt.spectra.moments import Estimate

#: Distances up to so many floors are no misfit, up to so many a weak one.
INDISTINGUISHABLE, WEAK = 1.3, 2.0
#: A law so many standard errors outside certain bounds is excluded.
EXCLUDED = 5.0


@dataclass(frozen=True)
class Fit:
    """One member of a family of laws beside a measured bulk.

    Attributes:
        law: the member.
        distance: Wasserstein-1 distance of the law to the bulk, over the bulk's standard deviation.
        stderr: standard error of the distance.
        floor: the distance that a bulk measured like this one has to a fitted law that is its own.
        exclusion_z: by how many standard errors the law leaves the Chebyshev-Markov-Stieltjes bounds; 0 if nowhere.
        kurtosis_z: fourth free cumulant of the law less that of the bulk, in standard errors; None where the law was
            fitted to it, or nothing is random.
        removed_outliers: number of outliers that were taken out.
        removed_outlier_mass: their share of all eigenvalues.
        removed_zero_mass: share of the remaining eigenvalues that was taken out as an atom at zero; 0 where the law has one.
        parameters: of the law, with standard errors over start vectors; NaN where the family ends beside this member.
        steps: m, the number of Lanczos steps.
        size: n, the dimension of the operator.
        probes: number of start vectors.
    """

    law: Law
    distance: float
    stderr: float
    floor: float
    exclusion_z: float
    kurtosis_z: float | None
    removed_outliers: int
    removed_outlier_mass: float
    removed_zero_mass: float
    parameters: dict[str, Estimate]
    steps: int
    size: int
    probes: int

    @property
    def relative(self) -> float:
        """Distance over its floor, about 1 for the bulk's own law."""
        return self.distance / self.floor if self.floor > 0 else math.inf

    @property
    def excluded(self) -> bool:
        """Whether the law leaves the certain bounds by more than five standard errors."""
        return self.exclusion_z > EXCLUDED

    @property
    def word(self) -> str:
        """``"indistinguishable"``, ``"weak misfit"`` or ``"rejected"``; an excluded law always is."""
        if self.excluded or not self.relative <= WEAK:
            return "rejected"
        return "indistinguishable" if self.relative <= INDISTINGUISHABLE else "weak misfit"

    @property
    def verdict(self) -> str:
        """One sentence for the user."""
        resolution = f"at resolution 1/{self.steps}, n = {self.size}"
        bounds = (
            f"excluded by its distribution function (z = {self.exclusion_z:.1f})"
            if self.excluded
            else f"not excluded at Lanczos resolution 1/{self.steps}"
        )
        said = f"{self.word} {resolution}: distance {self.relative:.2g} floors ({self.distance:.3g} sd); {bounds}"
        if self.kurtosis_z is not None and abs(self.kurtosis_z) > EXCLUDED:
            said += f"; its fourth free cumulant is off by {abs(self.kurtosis_z):.1f} standard errors"
        if self.removed_outliers:
            said += f"; without {self.removed_outliers} outliers ({self.removed_outlier_mass:.2g} of all)"
        if self.removed_zero_mass:
            said += f"; without the {self.removed_zero_mass:.3g} at zero"
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinity become None."""
        plain = {name: _number(getattr(self, name)) for name in _NUMBERS}
        errors = {name: [_number(e.mean), _number(e.stderr)] for name, e in self.parameters.items()}
        return {"law": law_to_dict(self.law), "parameters": errors, "verdict": self.verdict, **plain}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Fit:
        """What `to_dict` gave; other entries are ignored.

        Raises:
            ValueError: entries are missing, or the law isn't known here.
        """
        try:
            numbers = {name: saved[name] for name in _NUMBERS}
            errors = {name: Estimate(*map(_float, pair)) for name, pair in saved["parameters"].items()}
            law = law_from_dict(saved["law"])
            for name in ("distance", "stderr", "floor", "exclusion_z"):
                numbers[name] = _float(numbers[name])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this saved fit is damaged: {error}") from error
        return cls(law=law, parameters=errors, **numbers)


_NUMBERS = tuple(name for name in Fit.__dataclass_fields__ if name not in ("law", "parameters"))


def _number(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
