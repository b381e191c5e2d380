"""When a probe has seen enough: rules that read the runs so far and end them before the ceiling on their steps."""

from __future__ import annotations

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.outliers import STEPS_FOR_COUNT, OutlierSide
from lightning_rmt.spectra.spectrum import Spectrum

#: Fewest steps of a probe that is to show the density.
FEWEST_STEPS = 40
#: Largest shift of a bulk edge between two looks of one that has settled, relative to the larger of its positions; an edge
#: is known to about one percent of the bulk's width.
EDGE_SHIFT = 0.02


class CertifiedEnds:
    """Ends a probe as soon as so many of the outermost eigenvalues are certified.

    Measured on networks of 650 to 9000 parameters in training, float32: lambda_max takes 9 to 21 steps, nine outliers 19 to
    28; at initialisation, where nothing stands apart, lambda_max takes 20 to 40.

    Args:
        size: n of the operator.
        noise: relative rounding error of its products.
        top: eigenvalues to certify from the largest down, at least 1; with fewer than that many positive ones the probe goes
            on to its ceiling.
        bottom: eigenvalues to certify from the smallest up.
        every: steps from one look to the next; a look takes some milliseconds, whatever a product takes.
        confirm: further looks at which the certificates must hold. A probe that ends at once ends more often where a close
            pair still looks like one level: of pairs as close as products are precise, the outer one was missed in 3 to 4 %
            of the runs that ended at once, in 0.1 to 0.6 % two steps later, and in none eight steps later.
    """

    def __init__(
        self, size: int, noise: float, *, top: int = 1, bottom: int = 0, confirm: int = 1, every: int = 1
    ) -> None:
        self.every = every
        self._size, self._noise = size, noise
        self._top, self._bottom = top, bottom
        self._confirm, self._held = confirm, 0

    def __call__(self, runs: tuple[Tridiagonal, ...], /) -> bool:
        """Whether they are certified by these runs, and were by the last few."""
        self._held = self._held + 1 if self._certified(runs) else 0
        return self._held > self._confirm

    def _certified(self, runs: tuple[Tridiagonal, ...]) -> bool:
        if runs[0].steps < max(self._top + self._bottom, 2):
            return False
        spectrum = Spectrum(runs, self._size, runs[0].steps, self._noise)
        if self._top == 1 and not spectrum.lambda_max.certified:
            return False
        return len(spectrum.top) >= self._top and len(spectrum.bottom) >= self._bottom


class Settled:
    """Ends a probe when its outlier counts and bulk edges are the same as at the look before, and can be trusted to stay so.

    An answer can be trusted from `STEPS_FOR_COUNT` steps on: none of 50 spectra of networks changed its count after that.
    Before, only a count above a gap can, once all levels among which a wider gap could be are resolved: exact eigenvalues
    don't depend on the number of steps. (The levels that the gap itself is judged by are not enough: of spectra with one
    group above another, 10 % showed the first gap early and the wider second one later.)

    Args:
        size: n of the operator.
        noise: relative rounding error of its products.
    """

    every = 10

    def __init__(self, size: int, noise: float) -> None:
        self._size, self._noise = size, noise
        self._before: tuple[OutlierSide, OutlierSide] | None = None

    def __call__(self, runs: tuple[Tridiagonal, ...], /) -> bool:
        """Whether these runs say what the ones of the look before said."""
        steps = runs[0].steps
        if steps < FEWEST_STEPS or not runs[0].reorthogonalised:
            return False
        outliers = Spectrum(runs, self._size, steps, self._noise).outliers
        sides = outliers.high, outliers.low
        before, self._before = self._before, sides
        if before is None or not all(_same(a, b) for a, b in zip(before, sides, strict=True)):
            return False
        return steps >= STEPS_FOR_COUNT or (outliers.high.kind == "gap" and not outliers.high.at_least)


def _same(one: OutlierSide, other: OutlierSide) -> bool:
    if (one.kind, one.count) != (other.kind, other.count):
        return False
    if one.edge is None or other.edge is None:
        return one.edge is other.edge
    return abs(one.edge - other.edge) <= EDGE_SHIFT * max(abs(one.edge), abs(other.edge))
