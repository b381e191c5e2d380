"""What is left of a measured spectrum without its outliers, with or without its zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.spectra.masses import ZeroMass
from lightning_rmt.spectra.moments import LEAST_LEVELS
from lightning_rmt.spectra.outliers import Outliers, OutlierSide
from lightning_rmt.spectra.quadrature import Quadrature


@dataclass(frozen=True, eq=False)
class Bulk:
    """Nodes and weights of every probe, the outliers taken out and the rest rescaled to mass 1.

    The node at an atom stands for the continuous spectrum around it too, for about as much of it as its neighbours do. The
    lighter of the two next nodes is taken for that share: at the end of a gap around the atom it weighs next to nothing.

    Attributes:
        size: number of eigenvalues in the bulk.
        random_size: how many of them no run resolves; only their weights are random.
        nodes: per probe, ascending.
        weights: per probe, summing to 1.
        random: per probe, which of the nodes stand for eigenvalues that aren't resolved.
        outliers: the eigenvalues taken out, ascending.
        removed_mass: their share of all eigenvalues.
        zero_mass: share of the bulk in its atom at zero, 0 without one.
        zero_width: how far that atom reaches.
        around_zero: per probe, weight of the continuous spectrum within the atom's reach.
    """

    size: int
    random_size: int
    nodes: tuple[NDArray[np.float64], ...]
    weights: tuple[NDArray[np.float64], ...]
    random: tuple[NDArray[np.bool_], ...]
    outliers: NDArray[np.float64]
    removed_mass: float
    zero_mass: float
    zero_width: float
    around_zero: tuple[float, ...]

    def is_zero(self, x: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which points belong to the atom at zero, shape of ``x``."""
        return np.asarray(np.abs(x) <= self.zero_width) & (self.zero_mass > 0)

    def probe(self, index: int, zeros: bool = True) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes and weights of one probe, summing to 1, its zeros left out if so wanted.

        What is continuous around zero stays, as a node at zero. Where the atom is all that a probe sees, nothing is left.
        """
        nodes, weights = self.nodes[index], self.weights[index]
        if zeros:
            return nodes, weights
        kept, around = ~self.is_zero(nodes), self.around_zero[index]
        if around > 0:
            place = int(np.searchsorted(nodes[kept], 0.0))
            nodes, weights = np.insert(nodes[kept], place, 0.0), np.insert(weights[kept], place, around)
        else:
            nodes, weights = nodes[kept], weights[kept]
        total = weights.sum()
        return nodes, weights / (total if total > 0 else 1.0)

    def pooled(self, zeros: bool = True) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Nodes (ascending) and weights of all probes together, summing to 1."""
        parts = [self.probe(index, zeros) for index in range(len(self.nodes))]
        parts = [part for part in parts if part[0].size]
        if not parts:
            return np.empty(0), np.empty(0)
        nodes, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(nodes)
        return nodes[order], weights[order] / len(parts)

    def mean(self, functions: Callable[[NDArray[np.float64]], ArrayLike]) -> NDArray[np.float64]:
        """Mean over the bulk of functions of an eigenvalue.

        Args:
            functions: from nodes, shape (j,), to values, shape (k, j).

        Returns:
            Shape (k,).
        """
        per_probe = [np.asarray(functions(x)) @ w for x, w in zip(self.nodes, self.weights, strict=True)]
        return np.asarray(np.mean(per_probe, axis=0))

    def covariance(self, functions: Callable[[NDArray[np.float64]], ArrayLike]) -> NDArray[np.float64]:
        """Covariance of the sampling errors of `mean`, shape (k, k).

        A Gaussian start vector is uniform on the sphere, so that over b eigenvalues a probe's means of f and g have the
        covariance ``2/(b + 2) (m(f g) - m(f) m(g))``. As in ``moments.raw_moments`` no node counts for less than half a
        level.
        """
        total: NDArray[np.float64] | float = 0.0
        for x, w, random in zip(self.nodes, self.weights, self.random, strict=True):
            values, weights = np.asarray(functions(x[random])), w[random]
            if not weights.size:
                continue
            centred = values - (values @ weights / weights.sum())[:, None]
            raised = np.maximum(weights, LEAST_LEVELS / self.size) * (self.size / self.random_size)
            total = total + (centred * raised) @ centred.T
        probes, share = len(self.nodes), self.random_size / self.size
        scale = share**2 * 2 / (self.random_size + 2) / probes**2
        width = np.asarray(functions(np.empty(0))).shape[0]
        return np.asarray(total * scale + np.zeros((width, width)))


def bulk_of(quadrature: Quadrature, outliers: Outliers, zero: ZeroMass) -> Bulk:
    """Takes the counted outliers out of a measure.

    Args:
        quadrature: the measure.
        outliers: those of its eigenvalues that stand apart, where they could be counted.
        zero: its atom at zero, if any.
    """
    apart = np.sort(np.concatenate([outliers.low.values, outliers.high.values]))
    nodes, weights, masks, zeros, around = [], [], [], [], []
    for index in range(len(quadrature.rests)):
        x, w = quadrature.probe(index)
        random = np.ones(x.size, dtype=bool)
        random[: quadrature.low.size] = False
        random[x.size - quadrature.high.size :] = False
        kept = ~np.isin(x, apart)
        # where exact weights couldn't be used, the outliers are among the other nodes, and not to the last digit
        kept &= ~(random & ((x > _cut(outliers.high, 1.0)) | (x < _cut(outliers.low, -1.0))))
        nodes.append(x[kept])
        weights.append(w[kept] / max(w[kept].sum(), np.finfo(np.float64).tiny))
        masks.append(random[kept])
        at_zero = (np.abs(nodes[-1]) <= zero.width) & zero.found
        around.append(_around(at_zero, weights[-1]))
        zeros.append(weights[-1][at_zero].sum() - around[-1])
    exact = int(np.sum(~np.isin(quadrature.levels, apart)))
    size = quadrature.size - apart.size
    return Bulk(
        size=size,
        random_size=max(size - exact, 0),
        nodes=tuple(nodes),
        weights=tuple(weights),
        random=tuple(masks),
        outliers=apart,
        removed_mass=apart.size / quadrature.size,
        zero_mass=float(np.mean(zeros)),
        zero_width=zero.width if zero.found else 0.0,
        around_zero=tuple(around),
    )


def _around(at_zero: NDArray[np.bool_], weights: NDArray[np.float64]) -> float:
    """Weight of the continuous spectrum among the nodes at zero: as much as the lighter neighbour, none at an end."""
    places = np.flatnonzero(at_zero)
    if not places.size or places[0] == 0 or places[-1] == weights.size - 1:
        return 0.0
    return float(min(weights[places[0] - 1], weights[places[-1] + 1], weights[at_zero].sum()))


def _cut(side: OutlierSide, sign: float) -> float:
    """A quarter of the way from the innermost outlier to the bulk; infinite without outliers."""
    if not side.values.size:
        return sign * np.inf
    innermost = sign * float((sign * side.values).min())
    return innermost if side.edge is None else innermost - (innermost - side.edge) / 4
