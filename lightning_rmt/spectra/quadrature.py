"""The spectral measure of a few runs, with exact weights wherever they are known.

A probe's weight on a simple eigenvalue is ``chi^2_1 / n``: pure noise around 1/n. For every resolved simple level the
weight is therefore *set* to 1/n, and the rest of the probe's mass is renormalised to ``(n - k) / n``. That is unbiased,
and it takes away the noise that the outliers dominate.

It would be far off for degenerate levels, and the weight of one level hardly tells a double one from a simple one. Two
things do: a second copy, which rounding lets into a reorthogonalised run some steps after the first has converged, and the
weights of all the levels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.levels import SIMPLE_WEIGHT, RitzLevels, noise_floor

#: Levels whose weights together are so heavy that simple ones would be with less than this probability aren't simple.
HEAVY_TOGETHER = 1e-3


@dataclass(frozen=True, eq=False)
class Rest:
    """What one probe says about the levels that are not known exactly.

    Attributes:
        nodes: shape (j,), ascending.
        weights: shape (j,), summing to 1 over the rest.
        below: the probe's own mass on the exact levels below the rest.
        above: the probe's own mass on the exact levels above it.
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    below: float
    above: float


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Exact levels of weight 1/n each, and per probe a quadrature of the rest.

    Attributes:
        size: n, the number of eigenvalues.
        low: exact levels below the rest, ascending.
        high: exact levels above the rest, ascending.
        low_cut: boundary between ``low`` and the rest (minus infinity without low levels).
        high_cut: boundary between the rest and ``high`` (infinity without high levels).
        rests: one entry per probe.
        rounding: nodes nearer than this are not told apart.
        product_error: rounding error of a product, in the operator's units: no eigenvalue is known better.
    """

    size: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    low_cut: float
    high_cut: float
    rests: tuple[Rest, ...]
    rounding: float
    product_error: float

    @property
    def levels(self) -> NDArray[np.float64]:
        """Exact levels, ascending."""
        return np.concatenate([self.low, self.high])

    @property
    def rest_size(self) -> int:
        """Number of eigenvalues that are not known exactly."""
        return self.size - self.low.size - self.high.size

    def probe(self, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes (ascending, told apart) and weights (summing to 1) of one probe, exact levels included.

        Nodes within rounding of each other are one, and nodes that stand for less than a thousandth of a level are left
        out: both are copies made by rounding, and would pass for resolution that isn't there.
        """
        rest = self.rests[index]
        nodes, weights = rest.nodes, rest.weights
        if nodes.size:
            nodes, mass = told_apart(rest, self.rounding)
            bears = mass * self.rest_size >= 1e-3
            nodes, weights = nodes[bears], mass[bears] / mass[bears].sum()
        all_weights = [
            np.full(self.low.size, 1 / self.size),
            weights * (self.rest_size / self.size),
            np.full(self.high.size, 1 / self.size),
        ]
        return np.concatenate([self.low, nodes, self.high]), np.concatenate(all_weights)


def told_apart(rest: Rest, rounding: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights, nodes within rounding of each other taken together. There must be nodes."""
    first = np.flatnonzero(np.append(True, np.diff(rest.nodes) > rounding))
    mass = np.add.reduceat(rest.weights, first)
    return np.add.reduceat(rest.weights * rest.nodes, first) / np.where(mass > 0, mass, 1.0), mass


def exact_weight_quadrature(
    runs: Sequence[Tridiagonal], levels: RitzLevels | None, size: int, noise: float
) -> Quadrature:
    """Puts the exact weights of the resolved simple levels into every probe.

    The levels come from one reorthogonalised run. In every probe, also a three-vector one in which each converged level
    sits in several copies, all nodes beyond the midpoint between the last of those levels and the next node are
    those levels, whatever their number.

    Args:
        runs: all probes of the operator.
        levels: of the run whose levels are trusted; None where no run was reorthogonalised.
        size: n.
        noise: relative rounding error of a product.
    """
    none = np.empty(0)
    low, high, low_cut, high_cut = none, none, -np.inf, np.inf
    if levels is not None and _seem_simple(next(run for run in runs if run.reorthogonalised), levels, size):
        high, high_cut = _simple_from_the_top(levels, size)
        mirrored, cut = _simple_from_the_top(levels.mirrored(), size)
        low, low_cut = -mirrored[::-1], -cut
    rests = tuple(_rest(run, low_cut, high_cut) for run in runs)
    if _too_heavy(rests, low.size + high.size, size):
        low, high, low_cut, high_cut = none, none, -np.inf, np.inf
        rests = tuple(_rest(run, low_cut, high_cut) for run in runs)
    scale = max(float(np.abs(run.nodes).max()) for run in runs)
    return Quadrature(size, low, high, low_cut, high_cut, rests, noise_floor(noise) * scale, noise * scale)


def with_node_at_zero(quadrature: Quadrature, runs: Sequence[Tridiagonal]) -> Quadrature:
    """The same measure by the quadrature that has a node at zero, exact for one moment less or more.

    An atom of mass a at zero adds a to the weight of that node and moves nothing else, whatever the number of steps. The
    plain nodes of a symmetric spectrum lie at plus and minus something where that number is even, and share the atom with
    what lies between them.

    Args:
        quadrature: the measure.
        runs: of which it was made.
    """
    fixed = (_fixed_at_zero(run, quadrature.rounding) for run in runs)
    return replace(quadrature, rests=tuple(_rest(run, quadrature.low_cut, quadrature.high_cut) for run in fixed))


def _fixed_at_zero(run: Tridiagonal, rounding: float) -> Tridiagonal:
    """A run with another last diagonal entry, so that zero is a node (Golub and Meurant 2010, section 6.2).

    Of the entries that do so for m and for m + 1 steps the smaller one is taken: for a symmetric spectrum one of them is
    infinite, and the node that a large one puts outside of the spectrum bears weight in short runs. A run that has a node
    at zero stays as it is, and so does one whose nodes are all on one side of it, or which is exhausted.
    """
    nodes = run.nodes
    if run.exhausted or not nodes[0] < -rounding or not nodes[-1] > rounding or np.abs(nodes).min() <= rounding:
        return run
    inner = Tridiagonal(run.alpha[:-1], run.beta[:-1])  # two nodes at least, on either side of zero
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        longer, shorter = (float((of.residuals**2 / of.nodes).sum()) for of in (run, inner))
    if not np.isfinite(longer):
        return run
    if abs(shorter - run.alpha[-1]) < abs(longer - run.alpha[-1]):
        return Tridiagonal(np.append(run.alpha[:-1], shorter), run.beta, run.reorthogonalised)
    return Tridiagonal(np.append(run.alpha, longer), np.append(run.beta, run.beta[-1]), run.reorthogonalised)


def _seem_simple(run: Tridiagonal, levels: RitzLevels, size: int) -> bool:
    """Whether the levels may be taken for simple ones: a copy of the outermost, at one end at least, would be there by now.

    A copy starts from rounding where the level itself started from ``1/sqrt(n)``, and grows as fast: it is there a few
    steps after the residual has fallen to rounding. Multiplicity comes with structure (several outputs that don't
    mix), which one level at one end betrays. A run that is exhausted ended before that could happen; in it there may be
    one degenerate value, such as zero, and no second one.
    """
    if levels.complete:
        return int((levels.weights * size > SIMPLE_WEIGHT).sum()) <= 1
    steps = max(2 * run.steps // 3, 1)
    before = Tridiagonal(run.alpha[:steps], run.beta[:steps])
    ends = (0, -1)
    return any(levels.copies[end] == 1 and before.residuals[end] <= levels.rounding for end in ends)


def _too_heavy(rests: Sequence[Rest], count: int, size: int) -> bool:
    """Whether so many levels have more weight together than simple ones would."""
    if count == 0 or count == size:
        return False
    from scipy.special import betainc  # SciPy is slow to import

    mass, probes = float(np.mean([rest.below + rest.above for rest in rests])), len(rests)
    return bool(betainc((size - count) * probes / 2, count * probes / 2, max(1 - mass, 0.0)) < HEAVY_TOGETHER)


def _simple_from_the_top(levels: RitzLevels, size: int) -> tuple[NDArray[np.float64], float]:
    """Resolved simple levels above the noise floor, ascending, and the cut below them."""
    values, weights = levels.values[::-1], levels.weights[::-1]
    simple = (weights * size < SIMPLE_WEIGHT) & (levels.copies[::-1] == 1) & (values > levels.floor)
    if levels.complete and values.size < size:
        # Fewer distinct values than eigenvalues: some value is degenerate, most likely the heaviest.
        simple[np.argmax(weights)] = False
    trusted = levels.resolved_high
    if trusted and not levels.certified()[-trusted]:
        # Which level comes last depends on the weights: a heavy one converges earlier, and would then lose its surplus. To
        # leave the last one out unless it is beyond doubt halves that bias, and spares the rare last level that is one off.
        trusted -= 1
    simple[trusted:] = False
    count = int(simple.size if simple.all() else np.argmin(simple))
    if count == 0:
        return np.empty(0), np.inf
    cut = (values[count - 1] + values[count]) / 2 if count < values.size else -np.inf
    return values[:count][::-1], float(cut)


def _rest(run: Tridiagonal, low_cut: float, high_cut: float) -> Rest:
    nodes, weights = run.nodes, run.weights
    below, above = nodes < low_cut, nodes > high_cut
    inside = ~(below | above)
    total = weights[inside].sum()
    if total <= 0:
        return Rest(np.empty(0), np.empty(0), float(weights[below].sum()), float(weights[above].sum()))
    return Rest(nodes[inside], weights[inside] / total, float(weights[below].sum()), float(weights[above].sum()))
