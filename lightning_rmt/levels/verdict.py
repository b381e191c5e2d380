"""What the numbers say, in words that claim no more than they show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_rmt.levels.spacings import GOE_RATIO, GOE_RATIO_SD

#: ``repel``: as GOE levels do, unlike independent ones. ``no_repulsion``: as independent levels, or as four and more
#: blocks laid over each other. ``intermediate``: neither. ``regular``: more evenly spaced than GOE. ``insufficient``: too
#: few levels to tell. ``degenerate``: too many collapsed pairs.
VerdictKind = Literal["repel", "no_repulsion", "intermediate", "regular", "insufficient", "degenerate"]

#: Fewest levels for a verdict: with 50, three Poisson spectra in four are told from GOE.
FEWEST_LEVELS = 50
#: Largest share of collapsed levels with which a spacing ratio means something.
LARGEST_DEGENERATE = 0.02
#: Two-sided normal quantile at p = .01, which every verdict is held to, and the one-sided quantile at 95 %, for power.
Z_LIMIT, _Z_POWER = 2.576, 1.645
P_LIMIT = 0.01
#: Below this a p-value is not given as a number.
_SMALLEST_P = 1e-4


@dataclass(frozen=True)
class Evidence:
    """What a verdict is made from: see the attributes of the same names of `LevelStatistics`.

    ``brody_z_poisson`` is how many standard deviations Brody's exponent is above that of independent levels. It is the
    sharper of the two: two blocks of 300 levels laid over each other are told from independent levels by their ratio in
    about six of ten cases, by the exponent nearly always. ``brody`` and ``brody_goe`` are the exponent itself and its mean
    and standard deviation over GOE spectra.

    ``outliers_counted`` says whether levels that stand apart could be told from the rest; if not, some may be among them.
    """

    spacing_ratio: float
    stderr: float
    z_goe: float
    z_poisson: float
    brody_z_poisson: float | None
    p_value: float | None
    levels: int
    spectra: int
    effective_ratios: float
    brody: float | None = None
    brody_goe: tuple[float, float] | None = None
    outliers_counted: bool = True


def detectable_difference(effective_ratios: float) -> float:
    """Smallest difference of the spacing ratio from GOE's that is found at p < .01 in 95 % of the cases."""
    return (Z_LIMIT + _Z_POWER) * GOE_RATIO_SD / math.sqrt(effective_ratios)


def verdict(evidence: Evidence) -> tuple[VerdictKind, str]:
    """The kind of verdict, and a sentence with its numbers."""
    kind, words = _judge(evidence)
    p = evidence.p_value
    among = "" if evidence.spectra == 1 else f" of {evidence.spectra} spectra"
    goodness = "" if p is None else f", Anderson-Darling {p_words(p)}"
    power = detectable_difference(evidence.effective_ratios)
    return kind, (
        f"{words}: spacing ratio {evidence.spacing_ratio:.3f} +- {evidence.stderr:.3f} (GOE .531, Poisson .386) from "
        f"{evidence.levels} levels{among}, z {evidence.z_goe:+.1f} from GOE and {evidence.z_poisson:+.1f} from "
        f"Poisson{goodness}; at p<.01 so many levels show a ratio {power:.3f} from GOE's in 95 % of cases"
    )


def insufficient(levels: int, worth: int) -> str:
    """The verdict on too few levels, or on levels of correlated spectra that are worth too few independent ones."""
    but = "" if worth == levels else f" over all spectra, worth {worth} independent ones"
    return f"insufficient levels (k<{FEWEST_LEVELS}): {levels} kept{but}, {FEWEST_LEVELS} needed"


def p_words(p: float) -> str:
    """A p-value as it may be printed."""
    return "p < 1e-4" if p <= _SMALLEST_P * (1 + 1e-9) else f"p = {p:.2g}"


def _judge(evidence: Evidence) -> tuple[VerdictKind, str]:
    below_goe = evidence.z_goe < -Z_LIMIT
    above_poisson = max(evidence.z_poisson, evidence.brody_z_poisson or 0.0) > Z_LIMIT
    misfit = evidence.p_value is not None and evidence.p_value < P_LIMIT
    if evidence.z_goe > Z_LIMIT:
        return "regular", "more regular than GOE"
    if below_goe and not above_poisson:
        if evidence.z_poisson < -Z_LIMIT:
            return "no_repulsion", "no repulsion detected (levels cluster even more than Poisson's)"
        return "no_repulsion", "no repulsion detected (consistent with Poisson or >= 4 independent blocks)"
    if below_goe:
        return "intermediate", "intermediate (levels repel less than GOE's, and more than Poisson's)"
    uncounted = "" if evidence.outliers_counted else ", which outliers that couldn't be counted bring about too"
    if misfit and above_poisson:
        words = f"intermediate (the ratio is consistent with GOE, the unfolded spacings aren't{uncounted})"
        return "intermediate", words
    if misfit:
        return "intermediate", f"intermediate (the ratio can't tell, the unfolded spacings aren't GOE's{uncounted})"
    if above_poisson and evidence.brody is not None and evidence.brody_goe is not None:
        mean, sd = evidence.brody_goe
        if abs(evidence.brody - mean) > Z_LIMIT * sd:
            return "repel", (
                "levels repel (the ratio is consistent with GOE and excludes Poisson; the spacings' Brody exponent, "
                f"{evidence.brody:.2f}, isn't GOE's {mean:.2f} +- {sd:.2f})"
            )
    if above_poisson:
        return "repel", "levels repel (consistent with GOE, excludes Poisson)"
    return "insufficient", f"insufficient levels (the ratio, {GOE_RATIO} for GOE, excludes neither GOE nor Poisson)"
