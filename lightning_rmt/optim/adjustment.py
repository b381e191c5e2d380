"""How a measured ratio changes a damping. Numbers only.

The ratio is ``r = d'H d / (-g.d)`` along the applied direction d, for a learning rate of one: the inverse of the step length
that the curvature of an independent batch calls for. Where r = 1 the damping is right, above it is too small.
"""

from __future__ import annotations

import math

#: The first calibration changes the damping by at most this factor at a time, and takes at most so many products.
WIDE = 10.0
FIRST_PRODUCTS = 24
#: A damping falls by at most the fourth root of the factor by which it may rise: single batches' ratios scatter by tens,
#: and one decade too small is fatal where one too large is merely slow. With `TakenStep.reach` it is a matter of the worst
#: runs: of six seeds of a classifier at lr 0.1 the worst ended at .0047, falling as fast as rising at .011; medians agree.
FALL = 0.25
#: It ends where the ratio is this near to one.
TOLERANCE = 0.01
#: Ratios count as at least this in logarithms.
MINUTE = 1e-12
#: Levenberg-Marquardt: below the first share of the predicted reduction the trust part grows, above the second it shrinks.
TRUST = (0.25, 0.75)


def change(ratio: float, limit: float, deadband: tuple[float, float] = (1.0, 1.0), slowly: float = 1.0) -> float:
    """Factor for the damping.

    Args:
        ratio: r. Negative curvature never shrinks a damping: below -1 it outweighs the slope, and the step is too long by
            its size; from -1 to 0 there is nothing to go by. Not a number counts as far too small a damping.
        limit: largest factor, and the inverse of the smallest.
        deadband: ratios that are right as they are.
        slowly: share of the limit, in logarithms, by which the damping may fall; see `FALL`.
    """
    if math.isnan(ratio):
        return limit
    if deadband[0] <= ratio <= deadband[1] or -1 <= ratio <= 0:
        return 1.0
    return min(max(abs(ratio), limit**-slowly), limit)


def smoothed(before: float, after: float, keep: float) -> float:
    """Between the two, in logarithms: ``keep`` is the share of the old one."""
    return after if keep == 0 else before**keep * after ** (1 - keep)


def trust_change(reduction: float, limit: float) -> float:
    """Factor for the trust part from the actual over the predicted reduction of the same batch's loss."""
    if not reduction >= TRUST[0]:
        return limit
    return 1 / limit if reduction > TRUST[1] else 1.0


class RootSearch:
    """The largest damping with the ratio one: up in steps of `WIDE` until it is too large, then down between the two.

    From above, since the ratio may stay near one over decades of dampings on the way down (where the curvature itself, and
    not the damping, sets the step), of which the largest is the safest. In logarithms, false position and bisection in
    turn: the ratio falls like some power of the damping that isn't known, and ``damping * ratio`` alone would swing for ever
    where it is the second.

    Negative curvature counts by its size. Where that is below one the ratio may be on its way from one sign to the other, so
    a second damping is tried before it is believed.

    Args:
        deadband: ratios to be content with where no smaller damping was seen to be too small.
        from_above: it begins with so large a damping that a small ratio of either sign is believed.
    """

    def __init__(self, deadband: tuple[float, float], *, from_above: bool = False) -> None:
        self._deadband = deadband
        self._from_above = from_above
        self._small: tuple[float, float] | None = None  # log damping, log |ratio| > 0
        self._large: tuple[float, float] | None = None  # log damping, log |ratio| < 0
        self._doubted: tuple[float, float] | None = None
        self._halve = False

    def following(self, damping: float, ratio: float) -> float | None:
        """The damping to try next, None where there is nothing left to find.

        Args:
            damping: that was tried.
            ratio: measured with it.
        """
        size = math.inf if math.isnan(ratio) else max(abs(ratio), MINUTE)
        here = math.log(damping), math.log(size)
        low, high = self._deadband
        if self._large is None:
            if size >= low:
                self._small, self._doubted = here if size > 1 else self._small, None
                return damping * WIDE
            if ratio <= 0 and self._doubted is None and not self._from_above:
                self._doubted = here
                return damping * WIDE
            self._large = self._doubted if ratio <= 0 and self._doubted is not None else here
            if ratio <= 0 and self._small is None and not self._from_above:
                return None
        elif size > 1:
            self._small = here
        else:
            self._large = here
        if abs(here[1]) < TOLERANCE or (self._small is None and low <= size <= high):
            return None
        return self._between() if self._small is not None else damping * change(size, WIDE)

    def _between(self) -> float:
        assert self._small is not None
        assert self._large is not None
        (bottom, above), (top, below) = self._small, self._large
        self._halve = not self._halve
        share = above / (above - below) if self._halve and math.isfinite(above) else 0.5
        return math.exp(bottom + share * (top - bottom))
