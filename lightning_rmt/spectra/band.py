"""Rigorous bounds on the distribution function: the Chebyshev-Markov-Stieltjes inequalities.

Among all measures with the moments that a run has measured, the mass to the left of x lies between the two sums of the
quadrature that has x as a node (Akhiezer 1965, section 2.5; Golub and Meurant 2010, section 6.2, for the quadrature with
a prescribed node).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.quadrature import Quadrature


def stieltjes_bounds(run: Tridiagonal, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds on the mass that one run's start vector sees at or below x.

    Args:
        run: a run of m steps.
        x: points, any shape.

    Returns:
        Lower and upper bound, each of x's shape. No assumption but the run's coefficients enters.
    """
    points = np.asarray(x, dtype=np.float64)
    flat = points.ravel()
    m, beta = run.steps, float(run.beta[-1])
    # An eigenvalue that has converged is a node beside x when x is put on it: rounding must not decide its side.
    side = 1e-9 * max(float(np.abs(run.nodes).max()), beta)
    if beta == 0.0:
        # The quadrature is the measure.
        upto = np.append(0.0, np.cumsum(run.weights))
        low, high = (upto[np.searchsorted(run.nodes, flat + way * side, side="right")] for way in (-1, 1))
        return low.clip(0, 1).reshape(points.shape), high.clip(0, 1).reshape(points.shape)
    # The last diagonal entry that makes x an eigenvalue: x + beta^2 e_m' (T - x)^-1 e_m. At a node of T it is infinite, and
    # cut off where x is missed by 1e-8 of the scale at most.
    scale = max(float(np.abs(run.nodes).max()), beta)
    distance = run.nodes[None, :] - flat[:, None]
    distance = np.where(np.abs(distance) < 1e-14 * scale, 1e-14 * scale, distance)
    entry = flat + np.clip((run.residuals**2 / distance).sum(axis=1), -1e6 * scale, 1e6 * scale)

    matrix = np.zeros((flat.size, m + 1, m + 1))
    inner = np.arange(m)
    matrix[:, inner, inner] = run.alpha
    matrix[:, m, m] = entry
    matrix[:, inner, inner + 1] = matrix[:, inner + 1, inner] = run.beta
    nodes, vectors = np.linalg.eigh(matrix)
    mass = vectors[:, 0, :] ** 2
    own = nodes[np.arange(flat.size), np.argmin(np.abs(nodes - flat[:, None]), axis=1)]
    lower = np.where(nodes < (np.minimum(own, flat) - side)[:, None], mass, 0.0).sum(axis=1)
    upper = np.where(nodes <= (np.maximum(own, flat) + side)[:, None], mass, 0.0).sum(axis=1)
    return lower.clip(0, 1).reshape(points.shape), upper.clip(0, 1).reshape(points.shape)


def node_bounds(run: Tridiagonal, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds as `stieltjes_bounds`, wider by up to a node's weight, from the weights of T alone: no eigenproblem per x."""
    if run.beta[-1] == 0.0:
        return stieltjes_bounds(run, x)
    sums = np.concatenate([[0.0, 0.0], np.cumsum(run.weights), [1.0]])
    upto = np.searchsorted(run.nodes, np.asarray(x, dtype=np.float64), side="right")
    # The inequalities hold at the nodes: F(node i) lies between the sums without and with it.
    return sums[upto].clip(0, 1), sums[upto + 2].clip(0, 1)


def cdf_bounds(
    runs: tuple[Tridiagonal, ...],
    quadrature: Quadrature,
    x: ArrayLike,
    z: float,
    of_one: Callable[[Tridiagonal, ArrayLike], tuple[NDArray[np.float64], NDArray[np.float64]]] = stieltjes_bounds,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds on the share of eigenvalues at or below x.

    Beyond the cuts of the exact levels the share is known. Between them the bounds of each probe are averaged and widened
    by the sampling error of a probe's mass over the b eigenvalues that are not known exactly, whose standard deviation is
    ``sqrt(2 F (1 - F) / (b + 2) / probes)``.

    Args:
        runs: the probes.
        quadrature: the measure with its exact levels.
        x: points, any shape.
        z: how much of the sampling error, in standard deviations of a normal law; 0 leaves the bare inequalities.
        of_one: the bounds of one run, `stieltjes_bounds` or the cheaper and wider `node_bounds`.
    """
    points = np.asarray(x, dtype=np.float64)
    n, rest = quadrature.size, quadrature.rest_size
    known = np.searchsorted(quadrature.levels, points, side="right") / n
    above = points >= quadrature.high_cut
    known = np.where(above, (known * n + rest) / n, known)
    inside = (points > quadrature.low_cut) & ~above
    lower, upper = known.copy(), known.copy()
    used = [(run, part) for run, part in zip(runs, quadrature.rests, strict=True) if part.nodes.size]
    if not inside.any() or not used:
        return lower, upper
    low_sum, high_sum = np.zeros(int(inside.sum())), np.zeros(int(inside.sum()))
    for run, part in used:
        low, high = of_one(run, points[inside])
        mass = 1 - part.below - part.above
        low_sum += ((low - part.below) / mass).clip(0, 1)
        high_sum += ((high - part.below) / mass).clip(0, 1)
    low, high = low_sum / len(used), high_sum / len(used)
    below = quadrature.low.size
    lower[inside] = (below + rest - _most_levels(1 - low, rest, len(used), z)) / n
    upper[inside] = (below + _most_levels(high, rest, len(used), z)) / n
    return lower, upper


def share_stderr(runs: tuple[Tridiagonal, ...], quadrature: Quadrature, x: float) -> float:
    """Standard error of the share of eigenvalues at or below x.

    Two parts, taken as independent: the sampling error of `cdf_bounds`, for a mass amid its bare bounds, and the standard
    deviation of what lies anywhere between these. Among the exact levels both are zero.

    Args:
        runs: the probes.
        quadrature: the measure with its exact levels.
        x: the point.
    """
    lower, upper = (float(bound) for bound in cdf_bounds(runs, quadrature, x, 0.0))
    n, rest = quadrature.size, quadrature.rest_size
    probes = sum(part.nodes.size > 0 for part in quadrature.rests)
    if rest == 0 or probes == 0 or not quadrature.low_cut < x < quadrature.high_cut:
        return 0.0
    within = min(max(((lower + upper) / 2 * n - quadrature.low.size) / rest, 0.0), 1.0)
    sampling = rest / n * math.sqrt(2 * within * (1 - within) / (rest + 2) / probes)
    return math.hypot(sampling, (upper - lower) / math.sqrt(12))


def _most_levels(mass: NDArray[np.float64], levels: int, probes: int, z: float) -> NDArray[np.float64]:
    """The largest number of levels, of so many, that may hold a mass this small in the mean over probes.

    k of b levels hold a mass of law Beta(k/2, (b - k)/2) in one random direction, of about Beta(k p/2, (b - k) p/2) in
    the mean over p. Numbers that would leave so small a mass with a probability below that of -z standard deviations are
    ruled out. A normal approximation fails where it matters, for the few levels of a tail.
    """
    if z <= 0:
        return mass * levels
    from scipy.special import betainc, ndtr  # not before a band is asked for

    alpha = ndtr(-z)
    possible, ruled_out = np.zeros(mass.shape), np.full(mass.shape, levels + 1.0)
    while (ruled_out - possible > 1).any():
        k = np.floor((possible + ruled_out) / 2)
        # the law has no density for k = 0 or k = b
        inner = betainc(np.maximum(k, 0.5) * probes / 2, np.maximum(levels - k, 0.5) * probes / 2, mass)
        fits = np.where(k == 0, True, np.where(k == levels, mass >= 1 - 1e-12, inner >= alpha))
        possible, ruled_out = np.where(fits, k, possible), np.where(fits, ruled_out, k)
    return possible


def quantile_bounds(runs: tuple[Tridiagonal, ...], quadrature: Quadrature, p: float, z: float) -> tuple[float, float]:
    """Interval that holds the p-quantile: from where the upper to where the lower bound on the distribution reaches p.

    Among the exact levels it is one of them. Elsewhere the bounds at the nodes bracket it; within the bracket the sharp ones
    are taken on a grid of 32 cells, and the interval is rounded outwards to it. Where the bound has not reached p at the
    last node, the quantile may lie beyond all of them, and nothing says how far: that end is infinite (but for an
    exhausted run, which has seen all that there is).
    """
    exact = exact_quantile(quadrature, p)
    if exact is not None:
        return exact, exact
    nodes = np.unique(np.concatenate([*(run.nodes for run in runs), quadrature.levels]))
    start, stop = _crossings(nodes, *cdf_bounds(runs, quadrature, nodes, z, node_bounds), p)
    grid = np.linspace(max(start, nodes[0]), min(stop, nodes[-1]), 33)
    low, high = _crossings(grid, *cdf_bounds(runs, quadrature, grid, z), p)
    if any(run.exhausted for run in runs):
        low, high = max(low, float(nodes[0])), min(high, float(nodes[-1]))
    return low, high


def exact_quantile(quadrature: Quadrature, p: float) -> float | None:
    """The p-quantile where it is one of the exact levels, else None."""
    rank = math.ceil(p * quadrature.size - 1e-9)  # it is the level of this rank, from 1
    from_top = quadrature.size - rank
    if 1 <= rank <= quadrature.low.size:
        return float(quadrature.low[rank - 1])
    if 0 <= from_top < quadrature.high.size:
        return float(quadrature.high[-1 - from_top])
    return None


def _crossings(
    grid: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64], p: float
) -> tuple[float, float]:
    """Last point before the upper bound reaches p, and first point where the lower one has; infinite where none is."""
    reached_upper, reached_lower = np.flatnonzero(upper >= p), np.flatnonzero(lower >= p)
    first = int(reached_upper[0]) - 1 if reached_upper.size else grid.size - 1
    last = float(grid[reached_lower[0]]) if reached_lower.size else np.inf
    return float(grid[first]) if first >= 0 else -np.inf, last
