"""Damping and step length of one noisy Newton step, when curvature and gradient are both noisy.

A step ``-eta R g`` with ``R = (H + d)^-1``, H the curvature matrix and g the gradient of a batch, changes a quadratic loss
with true gradient ``g_0`` and true curvature A by ``-eta a + eta^2 q / 2``, where

    a = g_0' R g,    q = g' R A R g.                                                                              (1)

Neither contains what isn't measured. The gradients ``g_1`` and ``g_2`` of two halves of the batch have independent noise:
``a = g_1' R g_2 = g' R g - h' R h`` with ``h = (g_1 - g_2) / 2`` is unbiased. For q the local law replaces A:

    additive noise GOE(s) (Stein's identity):        E[R A R] = R - (d - 2 s^2 tau) R^2,                          (2)
    sample covariance of N samples (leave one out):  E[R A R] = (R - d R^2) / (1 - dof / N)^2,                     (3)

with ``tau = (1/n) tr R`` and ``dof = tr H R``. Equation (3) is the resolvent's form of the cleaning by Ledoit and Peche 2011
(see ``multiplicative``).

The best step is ``eta = a / q``, with the gain ``a^2 / (2 q)``. But the damping with the largest *estimated* gain is the one
whose estimates err most: near the bulk edge both fluctuate, and that rule lost by up to 5 times the best loss (median of a
simulated cell; by thousands in single draws). So a is taken one standard error lower and q one higher:

    sd(a) = 2 (|h| / sqrt(n)) |R g|    (noise of the gradient alike in all directions),
    sd(q) = 2 s sqrt(2 / n) |R g|^2    or    2 sqrt(2 / N) q    (the factor 2 from simulations; for d -> infinity it is 1).

Measured, loss over the best loss of all dampings and steps, found with the truth (n = 800, 180 draws: power law, and
Marchenko-Pastur bulk with spikes; s from .1 to 3, or N = n, 4 n; gradient noise 0, .3 and 1 times the signal): on average
1.045, 95 % below 1.14, at most 1.29; without the errors 1.48, 4.7 and 7400. For few samples and a gradient without noise
equation (3) is 1.05 to 1.07 times the best, equation (2) in its place 1.27 to 1.32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_rmt.local_law.arguments import noise_scale_argument, not_negative, spectrum_argument
from lightning_rmt.local_law.damping import smallest_damping
from lightning_rmt.local_law.errors import NoDampingError
from lightning_rmt.local_law.multiplicative import FewSamples, ggn_effective_damping
from lightning_rmt.local_law.resolvent import Resolvent
from lightning_rmt.local_law.vector_measure import VectorMeasure
from lightning_rmt.spectra.spectrum import Spectrum

#: Dampings that are looked at, from this far above the smallest one (in units of the largest curvature) to that far, and how
#: many of them; the best is refined.
NEAREST, FARTHEST, GRID = 1e-8, 1e3, 89
#: A curvature that is less than this share of its terms' absolute values isn't told from zero.
TOLD_FROM_ZERO = 0.1
#: Standard error of q in units of that of ``v' N v`` for a fixed vector v.
CURVATURE_ERROR = 2.0
#: What samples leave must be told from zero by so many standard errors, since q divides by its square.
LEFT_ERRORS = 3.0


@dataclass(frozen=True)
class JointDamping:
    """The damping of the best single step, and how long that step is.

    Attributes:
        damping: in the operator's units.
        step: eta, the factor on ``(H + damping)^-1 g``: about 1 where the damping fits and the gradient is clean, less where
            the gradient is noisy.
        gain: decrease of the loss that can be expected within a standard error.
        at_bound: the best damping is the largest one that was looked at: a plain gradient step would do.
    """

    damping: float
    step: float
    gain: float
    at_bound: bool


def joint_damping(
    noise: float, spectrum: Spectrum, gradient: VectorMeasure, difference: VectorMeasure | None = None
) -> JointDamping:
    """Damping and step length for additive noise, equations (1) and (2).

    Args:
        noise: scale s of the noise in the batch's curvature matrix.
        spectrum: of that matrix, or one like it; from random probes, not from the gradient.
        gradient: that matrix as the batch's gradient sees it.
        difference: as half the difference between the gradients of the batch's halves sees it; None for a gradient without
            noise.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the noise is negative or not finite.
        NoDampingError: for no damping the halves' gradients agree on a way down, or the true curvature along the step isn't
            positive: the quadratic model gives no step then.
    """
    noise = noise_scale_argument(noise)
    bulk = Resolvent.of(spectrum_argument(spectrum), noise)
    variance, error = bulk.variance * noise**2, noise * math.sqrt(bulk.variance * 2 / spectrum.size)

    def cost(vector: VectorMeasure, damping: float) -> _Curvature:
        value, terms = vector.curvature(damping, 2 * variance * bulk.mean(damping) if variance > 0 else 0.0)
        return _Curvature(value, terms, error * vector.resolvent(damping, 2))

    return _best(cost, smallest_damping(noise, spectrum), spectrum.size, gradient, difference)


def ggn_joint_damping(
    samples: float, spectrum: Spectrum, gradient: VectorMeasure, difference: VectorMeasure | None = None
) -> JointDamping:
    """Damping and step length for a Gauss-Newton matrix or a gradient covariance of few samples, equations (1) and (3).

    Args:
        samples: as for `ggn_effective_damping`.
        spectrum: of the batch's matrix.
        gradient: as for `joint_damping`.
        difference: as for `joint_damping`.

    Raises:
        TypeError: the spectrum is none.
        ValueError: ``samples`` isn't positive, or the spectrum isn't that of a positive semidefinite matrix.
        NoDampingError: as for `joint_damping`, or the matrix has a larger rank than samples.
    """
    law = FewSamples.of(samples, spectrum)

    def cost(vector: VectorMeasure, damping: float) -> _Curvature:
        left, error = law.left(damping), law.error(damping)
        if left <= LEFT_ERRORS * error:
            return _Curvature(-1.0, 1.0, 0.0)
        value = vector.curvature(damping, 0.0)[0] / (left - error) ** 2
        return _Curvature(value, value, math.sqrt(2 / samples) * value)

    return _best(cost, 0.0, spectrum.size, gradient, difference)


def expected_curvature(damping: float, noise: float, spectrum: Spectrum, vector: VectorMeasure) -> float:
    """``v' R A R v``, the true second-order cost of the step ``R v``, from the noisy matrix alone: equation (2).

    Args:
        damping: d in ``R = (H + d)^-1``, above `smallest_damping`.
        noise: scale s of the noise in H.
        spectrum: of H.
        vector: H as v sees it.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the damping or the noise is negative or not finite.
    """
    damping = not_negative(damping, "damping", "it is added to the curvature")
    noise = noise_scale_argument(noise)
    bulk = Resolvent.of(spectrum_argument(spectrum), noise)
    shift = 2 * bulk.variance * noise**2 * bulk.mean(damping) if noise > 0 else 0.0
    return vector.curvature(damping, shift)[0]


def ggn_expected_curvature(damping: float, samples: float, spectrum: Spectrum, vector: VectorMeasure) -> float:
    """``v' R A R v`` for a matrix that is a sample covariance of A: equation (3).

    Args:
        damping: d in ``R = (H + d)^-1``, positive.
        samples: as for `ggn_effective_damping`.
        spectrum: of H.
        vector: H as v sees it.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the damping is negative or not finite, or the samples don't fit the spectrum.
        NoDampingError: the matrix has a larger rank than samples.
    """
    return vector.curvature(damping, 0.0)[0] * (ggn_effective_damping(damping, samples, spectrum) / damping) ** 2


@dataclass(frozen=True)
class _Curvature:
    """True curvature along a step ``R v``, the absolute values of the terms that it is a sum of, and a standard error."""

    value: float
    terms: float
    error: float

    @property
    def at_most(self) -> float:
        """One standard error higher, infinite where it isn't told from zero or negative."""
        error = CURVATURE_ERROR * self.error
        highest = max(self.value, 0.0) + error
        return highest if self.value > -error and highest > TOLD_FROM_ZERO * self.terms else math.inf


def _best(
    cost: Callable[[VectorMeasure, float], _Curvature],
    smallest: float,
    size: int,
    gradient: VectorMeasure,
    difference: VectorMeasure | None,
) -> JointDamping:
    from scipy.optimize import minimize_scalar  # SciPy is slow to import

    seen = [vector.nodes.min() for vector in (gradient, difference) if vector is not None]
    start = max(smallest, -float(min(seen)))  # a gradient may see negative outliers, which no bulk edge knows of
    scale = float(np.abs(gradient.nodes).max())
    if scale == 0:
        raise NoDampingError("the curvature along the gradient is zero everywhere: no damping gives a step")

    def step(log_distance: float) -> tuple[float, float, float]:
        """Damping, and what is sure of a and q."""
        damping = start + math.exp(log_distance) * scale
        slope = gradient.resolvent(damping)
        if difference is not None:
            error = 2 * math.sqrt(difference.weights.sum() / size * gradient.resolvent(damping, 2))
            slope -= difference.resolvent(damping) + error
        return damping, max(slope, 0.0), cost(gradient, damping).at_most

    def loss(log_distance: float) -> float:
        _, slope, curvature = step(log_distance)
        return -slope * slope / curvature

    grid = np.linspace(math.log(NEAREST), math.log(FARTHEST), GRID)
    losses = np.array([loss(point) for point in grid])
    best = int(np.argmin(losses))
    if losses[best] == 0:
        raise NoDampingError(
            "no damping gives a step: the gradients of the batch's halves don't agree on a way down, or the curvature along "
            "it isn't positive; take more samples, or a method that follows negative curvature"
        )
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    refined = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-4})
    place = float(refined.x) if refined.fun < losses[best] else float(grid[best])
    damping, slope, curvature = step(place)
    return JointDamping(damping, slope / curvature, slope * slope / curvature / 2, best == GRID - 1)
