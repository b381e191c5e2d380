"""The spectral measure of a few runs, with exact weights wherever they are known.

A probe's weight on a simple eigenvalue is ``chi^2_1 / n``: pure noise around 1/n. For every resolved simple level the
weight is therefore *set* to 1/n, and the rest of the probe's mass is renormalised to ``(n - k) / n``. That is unbiased,
and it takes away the noise that the outliers dominate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.levels import SIMPLE_WEIGHT, RitzLevels, noise_floor


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
    """

    size: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    low_cut: float
    high_cut: float
    rests: tuple[Rest, ...]
    rounding: float

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
            first = np.flatnonzero(np.append(True, np.diff(nodes) > self.rounding))
            mass = np.add.reduceat(weights, first)
            nodes = np.add.reduceat(weights * nodes, first) / np.where(mass > 0, mass, 1.0)
            bears = mass * self.rest_size >= 1e-3
            nodes, weights = nodes[bears], mass[bears] / mass[bears].sum()
        all_weights = [
            np.full(self.low.size, 1 / self.size),
            weights * (self.rest_size / self.size),
            np.full(self.high.size, 1 / self.size),
        ]
        return np.concatenate([self.low, nodes, self.high]), np.concatenate(all_weights)


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
    if levels is not None:
        high, high_cut = _simple_from_the_top(levels, size)
        mirrored, cut = _simple_from_the_top(levels.mirrored(), size)
        low, low_cut = -mirrored[::-1], -cut
    rests = tuple(_rest(run, low_cut, high_cut) for run in runs)
    rounding = noise_floor(noise) * max(float(np.abs(run.nodes).max()) for run in runs)
    return Quadrature(size, low, high, low_cut, high_cut, rests, rounding)


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
