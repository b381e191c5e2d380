"""Mass at zero and below zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_rmt.spectra.quadrature import Quadrature

#: The node that owns zero must weigh this many times the median of its neighbours to count as an atom.
STANDS_OUT = 5.0
#: Neighbours on each side that it is compared with.
NEIGHBOURS = 3


@dataclass(frozen=True)
class ZeroMass:
    """Share of eigenvalues that can't be told from zero.

    Attributes:
        mass: that share; 0 where no node at zero stands out.
        width: "zero" means within plus or minus this, half the distance to the next node; 0 without an atom.
    """

    mass: float
    width: float


def zero_mass(quadrature: Quadrature) -> ZeroMass:
    """Finds the atom at zero in every probe and averages; a probe without one contributes 0.

    The node nearest to zero is an atom at zero when zero lies within half its distance to the neighbouring nodes, and it
    weighs more than five times the median of its six neighbours.
    """
    found = [_of_probe(*quadrature.probe(index)) for index in range(len(quadrature.rests))]
    mass = float(np.mean([m for m, _ in found]))
    width = max(w for _, w in found)
    return ZeroMass(mass, width)


def _of_probe(nodes: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    if nodes.size == 1:
        scale = float(np.abs(nodes[0]))
        return (float(weights[0]), 0.0) if scale == 0 else (0.0, 0.0)
    own = int(np.argmin(np.abs(nodes)))
    gaps = np.diff(nodes)
    room = min(gaps[own - 1] if own > 0 else np.inf, gaps[own] if own < gaps.size else np.inf)
    width = 0.5 * float(room)
    if abs(nodes[own]) > width:
        return 0.0, 0.0
    around = np.r_[weights[max(own - NEIGHBOURS, 0) : own], weights[own + 1 : own + 1 + NEIGHBOURS]]
    if weights[own] <= STANDS_OUT * np.median(around):
        return 0.0, 0.0
    return float(weights[own]), width
