"""How far a measured distribution is from a law, and how far it has to be at its resolution: Wasserstein-1 distances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.laws.law import Law
from lightning_rmt.spectra.bulk import Bulk

#: Points per interval of a law's support at which the distribution functions are compared, beside the nodes.
POINTS = 400


@dataclass(frozen=True, eq=False)
class Comparison:
    """Points at which a law and a measured bulk are compared.

    A law that has an atom at zero is compared with the whole bulk, one without with what is left without the zeros.

    Attributes:
        zeros: whether the whole bulk is compared.
        x: the points, ascending; the atom and every node are among them.
    """

    zeros: bool
    x: NDArray[np.float64]

    @property
    def cells(self) -> NDArray[np.float64]:
        """Lengths of the cells between the points."""
        return np.diff(self.x)

    def law_at(self, law: Law) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The law's distribution function at both ends of each cell."""
        atom = law.atom * (self.x >= law.atom_location)
        smooth = law.cdf(self.x) - atom
        return smooth[:-1] + atom[:-1], smooth[1:] + atom[:-1]

    def step_at(self, nodes: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The step function of a quadrature on each cell."""
        upto = np.append(0.0, np.cumsum(weights))
        return upto[np.searchsorted(nodes, self.x[:-1], side="right")]


def comparison(law: Law, bulk: Bulk) -> Comparison:
    """The points for a law and a bulk."""
    zeros = bool(law.atom > 0)  # a NumPy bool, where a parameter is a NumPy scalar, doesn't repeat lists
    nodes, _ = bulk.pooled(zeros)
    angle = np.linspace(0, np.pi, POINTS)
    grids = [(a + b) / 2 - (b - a) / 2 * np.cos(angle) for a, b in law.support]
    return Comparison(zeros, np.unique(np.concatenate([nodes, *grids, [law.atom_location] * zeros])))


def wasserstein(
    cells: NDArray[np.float64], step: NDArray[np.float64], left: NDArray[np.float64], right: NDArray[np.float64]
) -> float:
    """Integral of ``|step - straight line|`` over cells on which the line goes from ``left`` to ``right``."""
    a, b = left - step, right - step
    total = np.abs(a) + np.abs(b)
    crossing = (a**2 + b**2) / np.where(total > 0, total, 1.0)
    return float(np.sum(cells * np.where(a * b < 0, crossing, total)) / 2)


def law_distance(law: Law, bulk: Bulk, at: Comparison) -> float:
    """Wasserstein-1 distance of the law to the mean over the probes, in the operator's units."""
    return wasserstein(at.cells, at.step_at(*bulk.pooled(at.zeros)), *at.law_at(law))


def resolution_floor(bulk: Bulk, zeros: bool, left: float) -> float:
    """Wasserstein-1 distance of a measured bulk to a law fitted to it that is its own, in the operator's units.

    The root of the sum of two squares. The quadrature's: a node stands for a continuous density up to a quarter of the
    distance between its two neighbours (0.31 to 0.33 widths over the number of steps for smooth bulks; less where an atom
    takes part of the mass). The sampling's: the mean absolute error of the distribution function,
    ``sqrt(2/pi) sqrt(2 F (1 - F) / (b + 2) / probes)``, over the axis, or, where it is more, the mean distance between
    probes, divided by the ``sqrt(2 probes)`` by which the error of their mean is smaller; of either the share that
    a fit's parameters don't absorb.

    Args:
        bulk: the measured bulk.
        zeros: whether the whole bulk is compared.
        left: share of the sampling error that the fit leaves.
    """
    parts = [bulk.probe(index, zeros) for index in range(len(bulk.nodes))]
    parts = [(x, w) for x, w in parts if x.size > 1]
    probes = len(parts)
    quadrature = 0.0
    for x, w in parts:
        smooth = ~bulk.is_zero(x) | (not zeros)
        quadrature += float(w[smooth] @ np.gradient(x)[smooth]) / 4 / probes
    nodes, weights = bulk.pooled(zeros)
    share = np.cumsum(weights)[:-1]
    scale = np.sqrt(2 / np.pi * 2 / (bulk.random_size + 2) / probes) * bulk.random_size / bulk.size
    sampling = float(scale * (np.sqrt((share * (1 - share)).clip(0)) @ np.diff(nodes)))
    if probes > 1:
        at = Comparison(zeros, np.unique(nodes))
        steps = [at.step_at(x, w) for x, w in parts]
        pairs = [np.abs(steps[i] - steps[j]) @ at.cells for i in range(probes) for j in range(i)]
        sampling = max(sampling, float(np.mean(pairs) / np.sqrt(2 * probes)))
    return float(np.hypot(quadrature, left * sampling))
