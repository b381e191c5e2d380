"""How a measured ratio changes a damping. Numbers only.

The ratio is ``r = d'H d / (-g.d)`` along the applied direction d, for a learning rate of one: the inverse of the step length
that the curvature of an independent batch calls for. Where r = 1 the damping is right, above it is too small.
"""

from __future__ import annotations

import math

#: The first calibration changes the damping by at most this factor at a time, and takes at most so many products.
WIDE = 10.0
FIRST_PRODUCTS = 24
#: It ends where the ratio is this near to one.
TOLERANCE = 0.01
#: Levenberg-Marquardt: below the first share of the predicted reduction the trust part grows, above the second it shrinks.
TRUST = (0.25, 0.75)


def change(ratio: float, limit: float, deadband: tuple[float, float] = (1.0, 1.0)) -> float:
    """Factor for the damping.

    Args:
        ratio: r; at or below 0 the direction has negative curvature, and the damping shrinks by the limit and no more. Not a
            number counts as far too small a damping: the step left every scale.
        limit: largest factor, and the inverse of the smallest.
        deadband: ratios that are right as they are.
    """
    if math.isnan(ratio):
        return limit
    if deadband[0] <= ratio <= deadband[1]:
        return 1.0
    return min(max(ratio, 1 / limit), limit)


def smoothed(before: float, after: float, keep: float) -> float:
    """Between the two, in logarithms: ``keep`` is the share of the old one."""
    return after if keep == 0 else before**keep * after ** (1 - keep)


def trust_change(reduction: float, limit: float) -> float:
    """Factor for the trust part from the actual over the predicted reduction of the same batch's loss."""
    if not reduction >= TRUST[0]:
        return limit
    return 1 / limit if reduction > TRUST[1] else 1.0


class RootSearch:
    """The damping at which the ratio is one, by steps of at most `WIDE` and then between two that bracket it.

    In logarithms, false position and bisection in turn: the ratio falls like some power of the damping that isn't known, and
    ``damping * ratio`` alone would swing for ever where it is the second.
    """

    def __init__(self) -> None:
        self._small: tuple[float, float] | None = None  # log damping, log ratio > 0
        self._large: tuple[float, float] | None = None
        self._halve = False

    def following(self, damping: float, ratio: float) -> float | None:
        """The damping to try next, None where there is nothing left to find.

        Args:
            damping: that was tried.
            ratio: measured with it. At or below 0 it ends the search: along negative curvature no damping is right.
        """
        if ratio <= 0:
            return None
        here = math.log(damping), math.log(ratio) if math.isfinite(ratio) else math.inf
        if abs(here[1]) < TOLERANCE:
            return None
        if here[1] > 0:
            self._small = here
        else:
            self._large = here
        if self._small is None or self._large is None:
            return damping * change(ratio, WIDE)
        return self._between()

    def _between(self) -> float:
        assert self._small is not None
        assert self._large is not None
        (low, above), (high, below) = self._small, self._large
        self._halve = not self._halve
        share = above / (above - below) if self._halve and math.isfinite(above) else 0.5
        return math.exp(low + share * (high - low))
