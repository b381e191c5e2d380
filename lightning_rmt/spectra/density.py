"""Spectral density and distribution function from quadrature nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.spectra.levels import RESOLVED_SHARE, SIMPLE_WEIGHT, RitzLevels
from lightning_rmt.spectra.masses import ZeroMass
from lightning_rmt.spectra.quadrature import Quadrature


@dataclass(frozen=True)
class Atom:
    """A point mass, drawn as a stem and not part of the density: a level that stands apart, or a degenerate one.

    Attributes:
        location: in the operator's units.
        mass: share of all eigenvalues.
    """

    location: float
    mass: float


@dataclass(frozen=True, eq=False)
class Pieces:
    """The measure cut into atoms and, per probe, nodes that stand for a continuous part.

    Attributes:
        atoms: ascending.
        nodes: per probe, ascending, at least two; no entry for a probe that sees atoms only.
        weights: per probe, summing to one minus the atoms' mass.
    """

    atoms: tuple[Atom, ...]
    nodes: tuple[NDArray[np.float64], ...]
    weights: tuple[NDArray[np.float64], ...]


def pieces(quadrature: Quadrature, levels: RitzLevels | None, apart: Sequence[float], zero: ZeroMass) -> Pieces:
    """Splits the measure.

    Atoms are the levels that stand apart, the mass at zero, converged nodes of a weight that no simple level has, and
    whatever has no neighbour to be spread towards.

    Args:
        quadrature: the measure.
        levels: of the trusted run.
        apart: levels that stand apart.
        zero: the atom at zero, if any.
    """
    probes = [quadrature.probe(index) for index in range(len(quadrature.rests))]
    locations, reach = _atom_places(quadrature, levels, apart, zero)
    masses = np.zeros(locations.size)
    nodes, weights = [], []
    for x, w in probes:
        if locations.size:
            distance = np.abs(x[:, None] - locations[None, :])
            owner = np.argmin(np.where(distance <= reach, distance, np.inf), axis=1)
            taken = distance[np.arange(x.size), owner] <= reach[owner]
            masses += np.bincount(owner[taken], weights=w[taken], minlength=locations.size)
            x, w = x[~taken], w[~taken]
        nodes.append(x)
        weights.append(w)
    masses /= len(probes)
    atoms = [Atom(float(x), float(m)) for x, m in zip(locations, masses, strict=True)]
    # Each probe's continuous part is scaled to the common mass, so that the density and the atoms make one.
    remaining = 1 - float(masses.sum())
    smooth = [(x, w * (remaining / w.sum())) for x, w in zip(nodes, weights, strict=True) if x.size > 1]
    if not smooth and remaining > 1e-12:
        lone = [x[0] for x in nodes if x.size]
        atoms.append(Atom(float(np.mean(lone)), remaining))
    atoms.sort(key=lambda atom: atom.location)
    return Pieces(tuple(atoms), tuple(x for x, _ in smooth), tuple(w for _, w in smooth))


def _atom_places(
    quadrature: Quadrature, levels: RitzLevels | None, apart: Sequence[float], zero: ZeroMass
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Locations of the atoms, and within what distance a probe's nodes belong to each."""
    places: dict[float, float] = {}
    if levels is not None:
        gaps = np.append(np.append(np.inf, np.diff(levels.values)), np.inf)
        room = np.minimum(gaps[:-1], gaps[1:])
        heavy = (levels.weights * quadrature.size > SIMPLE_WEIGHT) & (
            levels.residuals + levels.rounding <= RESOLVED_SHARE * room
        )
        chosen = heavy | np.isin(levels.values, np.asarray(apart))
        places = {float(x): float(r) / 2 for x, r in zip(levels.values[chosen], room[chosen], strict=True)}
    if zero.found:
        places = {x: r for x, r in places.items() if abs(x) > zero.width} | {0.0: zero.width}
    return np.array(list(places)), np.array(list(places.values()))


def widths(nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kernel width of each node: half the distance between its two neighbours, shape of ``nodes``.

    No constant width works: the nodes are far apart where the spectrum is thin and close where it is dense.
    """
    return np.asarray(np.gradient(nodes))


def density(parts: Pieces, x: ArrayLike, stretch: float = 1.0) -> NDArray[np.float64]:
    """Density of the continuous part at x, shape of x, in one over the operator's units.

    Args:
        parts: the measure, cut.
        x: points.
        stretch: factor on the kernel widths.
    """
    points = np.asarray(x, dtype=np.float64)
    total = np.zeros(points.shape)
    for nodes, weights in zip(parts.nodes, parts.weights, strict=True):
        total += _kernels(points, nodes, stretch * widths(nodes)) @ weights
    return total / max(len(parts.nodes), 1)


def density_band(
    parts: Pieces, x: ArrayLike, size: int, z: float = 2.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Band around the density: sampling and resolution.

    The density at x is a linear statistic of the spectrum, with a probe's sampling variance
    ``2/(n + 2) (m(f^2) - m(f)^2)`` for the kernel f. What the smoothing itself does is bounded by
    how much the density changes when the kernels are half as wide again.
    """
    points = np.asarray(x, dtype=np.float64)
    middle = density(parts, points)
    variance = np.zeros(points.shape)
    for nodes, weights in zip(parts.nodes, parts.weights, strict=True):
        kernels = _kernels(points, nodes, widths(nodes))
        variance += (kernels**2) @ weights - (kernels @ weights) ** 2
    probes = max(len(parts.nodes), 1)
    sampling = z * np.sqrt(2 / (size + 2) * (variance / probes).clip(0) / probes)
    resolution = np.abs(density(parts, points, stretch=1.5) - middle)
    half = sampling + resolution
    return (middle - half).clip(0), middle + half


def _kernels(
    points: NDArray[np.float64], nodes: NDArray[np.float64], sigma: NDArray[np.float64]
) -> NDArray[np.float64]:
    argument = (points[..., None] - nodes) / sigma
    return np.asarray(np.exp(-0.5 * argument**2) / (sigma * np.sqrt(2 * np.pi)))


@dataclass(frozen=True, eq=False)
class Distribution:
    """Cumulative distribution function: steps at eigenvalues and atoms, straight lines through the mid-weights between.

    Attributes:
        x: breakpoints, ascending; a step is two equal ones.
        share: values there, ascending from 0 to 1.
    """

    x: NDArray[np.float64]
    share: NDArray[np.float64]

    def at(self, x: ArrayLike) -> NDArray[np.float64]:
        """Share of eigenvalues at or below x."""
        points = np.asarray(x, dtype=np.float64)
        right = np.searchsorted(self.x, points, side="right")
        left = (right - 1).clip(0)
        right = right.clip(0, self.x.size - 1)
        run = self.x[right] - self.x[left]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(run > 0, (points - self.x[left]) / run, 0.0)
        value = self.share[left] + part * (self.share[right] - self.share[left])
        return np.where(points < self.x[0], 0.0, value)

    def quantile(self, p: float) -> float:
        """Smallest x with at least the share p at or below it, for p from 0 to 1."""
        index = int(np.searchsorted(self.share, p, side="left").clip(0, self.x.size - 1))
        if index == 0 or self.share[index] <= p:
            return float(self.x[index])
        part = (p - self.share[index - 1]) / (self.share[index] - self.share[index - 1])
        return float(self.x[index - 1] + part * (self.x[index] - self.x[index - 1]))


def distribution(quadrature: Quadrature, parts: Pieces) -> Distribution:
    """The distribution function of the measure."""
    atom_x = np.array([atom.location for atom in parts.atoms])
    atom_mass = np.array([atom.mass for atom in parts.atoms])
    lone = np.setdiff1d(quadrature.levels, atom_x)
    steps = np.concatenate([atom_x, lone])
    heights = np.concatenate([atom_mass, np.full(lone.size, 1 / quadrature.size)])
    order = np.argsort(steps)
    steps, heights = steps[order], heights[order]
    curves = []
    for nodes, weights in zip(parts.nodes, parts.weights, strict=True):
        keep = ~np.isin(nodes, lone)
        if keep.any():
            curves.append(_smooth_part(nodes[keep], weights[keep], quadrature.low_cut, quadrature.high_cut))
    grid = np.unique(np.concatenate([steps, *(x for x, _ in curves)]))
    smooth = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0) if curves else np.zeros(grid.size)
    jumps = np.concatenate([[0.0], np.cumsum(heights)])
    before = smooth + jumps[np.searchsorted(steps, grid, side="left")]
    after = smooth + jumps[np.searchsorted(steps, grid, side="right")]
    share = np.maximum.accumulate(np.stack([before, after], axis=1).ravel())
    return Distribution(np.repeat(grid, 2), share / share[-1])


def _smooth_part(
    nodes: NDArray[np.float64], weights: NDArray[np.float64], low_cut: float, high_cut: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mid-weight curve, from 0 half a node's distance outside the first node to the full mass outside the last."""
    upto = np.cumsum(weights)
    if nodes.size == 1:
        return np.append(nodes, nodes), np.array([0.0, upto[-1]])
    first = max(nodes[0] - (nodes[1] - nodes[0]) / 2, low_cut)
    last = min(nodes[-1] + (nodes[-1] - nodes[-2]) / 2, high_cut)
    return np.r_[first, nodes, last], np.r_[0.0, upto - weights / 2, upto[-1]]
