"""A law fitted to a measured bulk, with what can be said about it: never that it is the law."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_rmt.laws.law import UNSURE, Law
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
    def vanishing(self) -> dict[str, str]:
        """Parameters that can't be told from zero, where the law becomes another family's, and that family's name."""
        # x and 1/x are as many standard errors from zero
        found = ((k, family, self.parameters.get(k.removeprefix("1/"))) for k, family in self.law.limits.items())
        return {name: family for name, family, e in found if e is not None and e.mean < UNSURE * e.stderr}

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
        for name, family in self.vanishing.items():
            said += f"; the {name} can't be told from zero (see {family})"
        if self.removed_outliers:
            said += f"; without {self.removed_outliers} outliers ({self.removed_outlier_mass:.2g} of all)"
        if self.removed_zero_mass:
            said += f"; without the {self.removed_zero_mass:.3g} at zero"
        return said
