"""Cleaning the eigenvalues of a weighted sample covariance: factors of Shampoo, SOAP and K-FAC.

Such a factor is ``L = sum_k T_k x_k x_k'``, with columns ``x_k`` of covariance A and weights from an exponential moving
average and from the other factor's spectrum. With ``m(z) = (1/p) tr (L - z)^-1`` and ``e = tr A (aA - z)^-1`` the local law
is ``(L - z)^-1 = (a A - z)^-1`` with ``a e = Phi(e)``, so that

    Phi(e) = sum_k T_k e / (1 + T_k e) = p (1 + z m(z)),     u'Au = Im e(l + i0) / (p Im m(l + i0))               (1)

for an eigenvector u of L with eigenvalue l. Equal weights give back Ledoit and Peche 2011, ``l / |1 - q - q l m|^2``. The
transform m is estimated with the kernels of Ledoit and Wolf 2020, whose bandwidth is proportional to the eigenvalue.

A diagnostic: how far the factor's eigenvalues are from the truth. It speeds no optimizer up: at the sizes that were tried
the bias costs 0 to 2 % of the regret bound, and SOAP's eigenvalues, held out, have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import vector

#: Below this share of the largest, an eigenvalue is zero.
ZERO = 1e-12
#: Moments 0, 2, 4, ... of the kernel ``3 / (4 sqrt 5) (1 - u^2 / 5)``, and from where on they give its Hilbert transform.
MOMENTS = tuple(3 * 5.0**k / ((2 * k + 1) * (2 * k + 3)) for k in range(6))
FAR = 20.0
#: Steps of Newton's method; twenty are plenty unless an eigenvalue sits far outside.
STEPS = 100


@dataclass(frozen=True, eq=False)
class MovingAverageWeights:
    """Weights ``T_k = w_t b_j`` of an exponential moving average over matrices whose columns share a spectrum.

    ``w_t = (1 - beta) beta^age / (1 - beta^steps)`` for ages 0 to ``steps - 1``, and b the other factor's eigenvalues over
    their sum. Sums over t are taken as integrals, in closed form.

    Attributes:
        beta: decay per step, above 0 and below 1.
        steps: matrices so far, at least 1.
        spectrum: eigenvalues of the other factor, shape (d,), at least 0; their scale doesn't matter.

    Raises:
        ValueError: a number is out of its range.
    """

    beta: float
    steps: int
    spectrum: NDArray[np.float64]

    def __post_init__(self) -> None:
        found = vector(self.spectrum, "spectrum")
        if not 0 < self.beta < 1 or self.steps < 1 or not found.size or (found < 0).any() or not found.sum() > 0:
            raise ValueError(
                "a moving average has 0 < beta < 1, at least one step and a spectrum of at least 0 with a positive sum; got "
                f"beta {self.beta}, {self.steps} steps, {found.size} eigenvalues"
            )
        object.__setattr__(self, "spectrum", found / found.sum())

    @property
    def effective(self) -> float:
        """``(sum T)^2 / sum T^2``: how many columns of equal weight would be as noisy."""
        b, forgotten = self.beta, self.beta**self.steps
        return (1 - forgotten) ** 2 * (1 + b) / ((1 - b) * (1 - forgotten**2)) / float((self.spectrum**2).sum())

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return 1.0

    @property
    def count(self) -> float:
        """Number of columns."""
        return self.steps * float((self.spectrum > 0).sum())

    @property
    def inverse_sum(self) -> float:
        """Sum of ``1 / T``."""
        ages = self.beta ** -np.arange(self.steps, dtype=np.float64)
        share = (1 - self.beta) / (1 - self.beta**self.steps)
        return float(ages.sum() / share * (1 / self.spectrum[self.spectrum > 0]).sum())

    def phi(self, e: NDArray[np.complex128]) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
        """``Phi(e)`` and ``e Phi'(e)``, shape of ``e``."""
        # midpoint rule: the ages' weights are taken from half a step before the first to half a step after the last
        newest = (1 - self.beta) / (1 - self.beta**self.steps) * self.beta**-0.5
        new = newest * self.spectrum * e[:, None]
        old = new * self.beta**self.steps
        rate = -math.log(self.beta)
        value = (np.log1p(new) - np.log1p(old)).sum(axis=1) / rate
        slope = (new / (1 + new) - old / (1 + old)).sum(axis=1) / rate
        return value, slope


@dataclass(frozen=True, eq=False)
class _Weights:
    """Weights one by one; the same interface."""

    weights: NDArray[np.float64]

    @property
    def effective(self) -> float:
        return float(self.weights.sum() ** 2 / (self.weights**2).sum())

    @property
    def total(self) -> float:
        return float(self.weights.sum())

    @property
    def count(self) -> float:
        return float(self.weights.size)

    @property
    def inverse_sum(self) -> float:
        return float((1 / self.weights).sum())

    def phi(self, e: NDArray[np.complex128]) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
        te = self.weights * e[:, None]
        return (te / (1 + te)).sum(axis=1), (te / (1 + te) ** 2).sum(axis=1)


def clean_weighted(eigenvalues: ArrayLike, weights: ArrayLike | MovingAverageWeights) -> NDArray[np.float64]:
    """True second moments along the eigenvectors of a weighted sample covariance: equation (1).

    Args:
        eigenvalues: all of the factor's, shape (p,), at least 0. Rows that are always zero left out before.
        weights: of the columns, each above 0, or those of a moving average.

    Returns:
        Shape (p,), in the same order; larger eigenvalues never get smaller ones.

    Raises:
        ValueError: there are no eigenvalues or weights, one is negative or not finite, or more eigenvalues are zero than the
            number of columns explains.
    """
    found = vector(eigenvalues, "eigenvalues")
    if not found.size or (found < 0).any() or not found.max() > 0:
        raise ValueError(
            f"expected the eigenvalues of a covariance, none negative and not all 0; got {found.size}, the smallest "
            f"{found.min() if found.size else 'missing'} (clip what is rounding)"
        )
    if isinstance(weights, MovingAverageWeights):
        measure: MovingAverageWeights | _Weights = weights
    else:
        measure = _Weights(vector(weights, "weights"))
        if not measure.weights.size or not (measure.weights > 0).all():
            raise ValueError("weights of columns must be above 0, and at least one: leave out columns without weight")
    order = np.argsort(found)
    levels = found[order]
    positive = levels > ZERO * levels[-1]
    zeros = int((~positive).sum())
    if zeros > max(levels.size - measure.count, 0):
        raise ValueError(
            f"{zeros} of {levels.size} eigenvalues are zero, though {measure.count:g} columns leave "
            f"{max(levels.size - measure.count, 0):g}: leave out rows that are always zero, their curvature isn't noise"
        )
    cleaned = np.empty(levels.size)
    transform = _transform(levels[positive], zeros, measure.effective)
    target = levels.size * (1 + levels[positive] * transform)
    cleaned[positive] = _solve(measure, target).imag / (levels.size * transform.imag)
    if zeros:
        # z -> 0: e ~ E / |z| with E = tr A P_0, and the next order of (1) gives E
        cleaned[~positive] = measure.inverse_sum / (zeros * float((1 / levels[positive]).sum()))
    result = np.empty(levels.size)
    result[order] = _ascending(cleaned)
    return result


def _transform(levels: NDArray[np.float64], zeros: int, samples: float) -> NDArray[np.complex128]:
    """``m(l + i0)`` at every level by the kernels of Ledoit and Wolf 2020 (section 4.1); zeros are a pole."""
    width = levels * samples ** (-1 / 3)
    u = (levels[:, None] - levels) / width
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        edge = np.log(np.abs((math.sqrt(5) - u) / (math.sqrt(5) + u)))
        curved = 3 / (4 * math.sqrt(5) * math.pi) * (1 - u**2 / 5) * edge
        # far away the two terms cancel, and a spectrum may span many decades: there the moments of the kernel
        far = -sum(moment / u ** (2 * k + 1) for k, moment in enumerate(MOMENTS)) / math.pi
    near = -3 * u / (10 * math.pi) + np.where(np.isfinite(curved), curved, 0.0)
    hilbert = np.where(np.abs(u) > FAR, far, near)
    density = 3 / (4 * math.sqrt(5)) * (1 - u**2 / 5).clip(0)
    smooth = math.pi * ((hilbert + 1j * density) / width).sum(axis=1)
    return np.asarray((smooth - zeros / levels) / (levels.size + zeros))


def _solve(measure: MovingAverageWeights | _Weights, target: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """``Phi(e) = target`` for e in the upper half plane, by Newton's method in ``log e``."""
    share = target / measure.effective
    guess = share / (1 - share) * measure.effective / measure.total  # equal weights
    u = np.log(np.where(guess.imag > 0, guess, np.abs(guess) * 1j))
    for _ in range(STEPS):
        value, slope = measure.phi(np.exp(u))
        step = (target - value) / slope
        step = step / np.maximum(np.abs(step), 1.0)
        proposal = u + step
        low, high = u.imag / 2, (u.imag + math.pi) / 2  # halfway to the real axis at most
        u = proposal.real + 1j * np.clip(proposal.imag, low, high)
        if (np.abs(step) < 1e-12).all():
            break
    return np.asarray(np.exp(u))


def _ascending(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest ascending sequence (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            total = counts[-2] + counts[-1]
            means[-2:] = [(means[-2] * counts[-2] + means[-1] * counts[-1]) / total]
            counts[-2:] = [total]
    return np.repeat(means, counts)
