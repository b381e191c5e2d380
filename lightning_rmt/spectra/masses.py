"""Mass at zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        width: "zero" means within plus or minus this; 0 without an atom.
        found: whether there is an atom.
    """

    mass: float
    width: float
    found: bool


def zero_mass(quadrature: Quadrature) -> ZeroMass:
    """Finds the atom at zero.

    A continuous density gives neighbouring nodes similar weights; a node at an atom outweighs them. In a probe, the atom at
    zero is the node nearest to zero, if zero lies within half its distance to its neighbours and it weighs more than five
    times the median of its six neighbours, together with the nodes next to it for which the same holds (a density that
    diverges at zero is shared by a few). It takes a quadrature with a node at zero (`with_node_at_zero`) to keep an atom
    amid a symmetric bulk in one node. Its width reaches halfway to the next node. There is an atom when at least half of
    the probes show one; its width is the largest of theirs, its mass the average over the probes of what lies within.
    """
    probes = [quadrature.probe(index) for index in range(len(quadrature.rests))]
    widths = [width for width in (_atom_width(*probe, quadrature.rounding) for probe in probes) if width is not None]
    if 2 * len(widths) < len(probes) or not widths:
        return ZeroMass(0.0, 0.0, False)
    width = max(widths)
    mass = np.mean([weights[np.abs(nodes) <= width].sum() for nodes, weights in probes])
    return ZeroMass(float(mass), width, True)


def _atom_width(nodes: NDArray[np.float64], weights: NDArray[np.float64], rounding: float) -> float | None:
    """How far from zero the atom of one probe reaches, or None where no node at zero stands out."""
    own = int(np.argmin(np.abs(nodes)))
    if nodes.size == 1:
        return rounding if abs(nodes[own]) <= rounding else None
    gaps = np.append(np.append(np.inf, np.diff(nodes)), np.inf)
    first, last = own, own + 1  # the atom is nodes[first:last]

    def stands_out(index: int) -> bool:
        around = np.append(weights[max(first - NEIGHBOURS, 0) : first], weights[last : last + NEIGHBOURS])
        return bool(weights[index] > STANDS_OUT * np.median(around))

    if abs(nodes[own]) > 0.5 * min(gaps[own], gaps[own + 1]) or not stands_out(own):
        return None
    while True:
        reach = float(np.abs(nodes[first:last]).max())
        outside = [index for index in (first - 1, last) if 0 <= index < nodes.size]
        if not outside:
            return max(reach, rounding)
        nearest = min(outside, key=lambda index: float(abs(nodes[index])))
        if not stands_out(nearest):
            return (reach + float(abs(nodes[nearest]))) / 2
        first, last = min(first, nearest), max(last, nearest + 1)
