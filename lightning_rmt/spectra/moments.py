"""Moments of the spectral measure with their sampling errors: trace, Frobenius norm, free cumulants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.spectra.quadrature import Quadrature, told_apart

#: A node counts for at least this many levels in an error...
LEAST_LEVELS = 0.5
#: ...unless it weighs less than this many: a copy of another that rounding has made.
COPY_LEVELS = 1e-6


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the number's own units."""

    mean: float
    stderr: float


@dataclass(frozen=True)
class FreeCumulants:
    """Free cumulants of the bulk, the outliers removed, each with its standard error.

    Attributes:
        k1: mean.
        k2: variance.
        k3: third free cumulant, zero for a semicircle.
        k4: fourth free cumulant, zero for a semicircle.
        skew: ``k3 / k2^1.5``; sqrt(c) for a Marchenko-Pastur law of ratio c.
        kurtosis: ``k4 / k2^2``; c for a Marchenko-Pastur law of ratio c.
        removed: number of outliers taken out.
    """

    k1: Estimate
    k2: Estimate
    k3: Estimate
    k4: Estimate
    skew: Estimate
    kurtosis: Estimate
    removed: int


def raw_moments(
    quadrature: Quadrature, orders: Sequence[int], drop: NDArray[np.float64] | None = None, about: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Moments ``(1/n) sum (lambda - about)^k`` and the covariance of their sampling errors.

    The exact levels carry no error. On the rest, of ``b`` eigenvalues, a Gaussian start vector is uniform on the sphere,
    so that ``cov(m_j, m_k) = 2/(b + 2) (m_{j+k} - m_j m_k)`` there, which the same run estimates.

    Where a few large levels share the rest's mass, their own weights can't be trusted to say how uncertain those are: a
    level that happens to weigh a tenth of its share is missed nine tenths, and would claim a third of the error. In the
    covariance no node therefore counts for less than half a level.

    Args:
        quadrature: the measure.
        orders: exponents.
        drop: exact levels to leave out (the measure is then that of the others).
        about: what is taken off every eigenvalue.

    Returns:
        Means, shape (len(orders),), and covariance, shape (len(orders), len(orders)), of the average over the probes.
    """
    orders = list(orders)
    levels = quadrature.levels
    if drop is not None and drop.size:
        levels = levels[~np.isin(levels, drop)]
    rest_size = quadrature.rest_size
    size = levels.size + rest_size
    if size == 0:
        return np.zeros(len(orders)), np.zeros((len(orders), len(orders)))
    share = rest_size / size
    rests = [rest for rest in quadrature.rests if rest.nodes.size]

    def rest_moment(order: int) -> float:
        return float(np.mean([rest.weights @ (rest.nodes - about) ** order for rest in rests])) if rests else 0.0

    rest_means = np.array([rest_moment(order) for order in orders])
    means = np.array([np.sum((levels - about) ** order) / size for order in orders]) + share * rest_means
    spread = np.zeros((len(orders), len(orders)))
    for rest in rests:
        # Nodes within rounding of each other are raised together, but keep their places: a bulk that is narrow beside the
        # largest eigenvalue is a chain of such neighbours, and all of the trace's variance.
        _, mass = told_apart(rest, quadrature.rounding)
        raised = np.where(mass * rest_size > COPY_LEVELS, np.maximum(mass, LEAST_LEVELS / rest_size), mass)
        group = np.append(0, np.cumsum(np.diff(rest.nodes) > quadrature.rounding))
        weights = rest.weights * (raised / np.where(mass > 0, mass, 1.0))[group]
        deviations = np.stack([(rest.nodes - about) ** order for order in orders]) - rest_means[:, None]
        spread += (deviations * weights) @ deviations.T / len(rests)
    covariance = share**2 * 2 / (rest_size + 2) * spread / max(len(rests), 1)
    return means, covariance


def trace_estimate(quadrature: Quadrature) -> Estimate:
    """Trace of the operator; its error holds the sampling and the rounding of the exact levels, taken as independent."""
    means, covariance = raw_moments(quadrature, [1])
    rounding = quadrature.product_error * math.sqrt(quadrature.levels.size)
    return Estimate(quadrature.size * float(means[0]), math.hypot(quadrature.size * _root(covariance[0, 0]), rounding))


def frobenius_estimate(quadrature: Quadrature) -> Estimate:
    """Frobenius norm of the operator; its sampling error by the delta method from that of the squared norm.

    Rounding comes on top: an operator with one huge eigenvalue has no sampling error to speak of.
    """
    means, covariance = raw_moments(quadrature, [2])
    norm = math.sqrt(quadrature.size * max(float(means[0]), 0.0))
    squared_error = quadrature.size * _root(covariance[0, 0])
    return Estimate(norm, math.hypot(squared_error / (2 * norm), quadrature.product_error) if norm > 0 else 0.0)


def free_cumulants(quadrature: Quadrature, outliers: NDArray[np.float64]) -> FreeCumulants:
    """Free cumulants of what is left without the outliers (Nica and Speicher 2006, lecture 11), errors by the delta method.

    Args:
        quadrature: the measure.
        outliers: exact levels to remove.
    """
    (centre,), _ = raw_moments(quadrature, [1], drop=outliers)
    # about the mean: of a bulk far from zero powers about zero would leave nothing but rounding
    (m1, m2, m3, m4), covariance = raw_moments(quadrature, [1, 2, 3, 4], drop=outliers, about=float(centre))
    k2 = m2 - m1**2
    k3 = m3 - 3 * m1 * m2 + 2 * m1**3
    k4 = m4 - 4 * m1 * m3 - 2 * m2**2 + 10 * m1**2 * m2 - 5 * m1**4
    d1 = np.array([1.0, 0.0, 0.0, 0.0])
    d2 = np.array([-2 * m1, 1.0, 0.0, 0.0])
    d3 = np.array([-3 * m2 + 6 * m1**2, -3 * m1, 1.0, 0.0])
    d4 = np.array([-4 * m3 + 20 * m1 * m2 - 20 * m1**3, -4 * m2 + 10 * m1**2, -4 * m1, 1.0])

    def estimate(value: float, gradient: NDArray[np.float64]) -> Estimate:
        return Estimate(float(value), _root(float(gradient @ covariance @ gradient)))

    if k2 > 0:
        skew = estimate(k3 / k2**1.5, d3 / k2**1.5 - 1.5 * k3 / k2**2.5 * d2)
        kurtosis = estimate(k4 / k2**2, d4 / k2**2 - 2 * k4 / k2**3 * d2)
    else:
        skew = kurtosis = Estimate(math.nan, math.nan)
    return FreeCumulants(
        estimate(centre + m1, d1),
        estimate(k2, d2),
        estimate(k3, d3),
        estimate(k4, d4),
        skew,
        kurtosis,
        int(outliers.size),
    )


def _root(variance: float) -> float:
    return math.sqrt(max(float(variance), 0.0))
