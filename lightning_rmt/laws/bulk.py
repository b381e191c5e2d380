"""What a law is fitted to: the free cumulants of a bulk, with and without its atom at zero."""

from __future__ import annotations

from dataclasses import dataclass


class NoFitError(ValueError):
    """No member of the family has these cumulants; the message says why."""


@dataclass(frozen=True)
class FreeCumulantsOf:
    """Free cumulants of one measure of total mass 1.

    Attributes:
        k1: mean.
        k2: variance.
        k3: third free cumulant.
        k4: fourth free cumulant.
    """

    k1: float
    k2: float
    k3: float
    k4: float


@dataclass(frozen=True)
class BulkMoments:
    """What the families read their parameters from; outliers were removed and the rest rescaled to mass 1.

    Attributes:
        whole: of the bulk, its atom at zero included.
        continuous: of the bulk without the atom, rescaled to mass 1.
        zero_mass: share of the bulk at zero.
        zero_error: standard error of that share.
        third_error: standard error of k3 of the continuous part.
        excess_error: standard error of ``k2 - sqrt(k1 k3)`` of the continuous part, its variance beyond that of a
            Marchenko-Pastur law of this mean and this k3; zero where k1 or k3 isn't positive.
    """

    whole: FreeCumulantsOf
    continuous: FreeCumulantsOf
    zero_mass: float
    zero_error: float = 0.0
    third_error: float = 0.0
    excess_error: float = 0.0
