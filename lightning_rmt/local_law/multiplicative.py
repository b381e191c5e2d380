"""Noise of few samples in a Gauss-Newton matrix: multiplicative, not additive.

A Gauss-Newton matrix or a gradient covariance of a batch is a sample covariance ``S = (1/N) sum_i x_i x_i'`` of
``C = E[x x']``; its noise is largest where C is, and Wigner's model doesn't fit. Marchenko and Pastur's does. With
``dof(d) = tr S (S + d)^-1``, the number of directions that the damping leaves,

    (S + d)^-1  =  (k / d) (C + k)^-1  in any fixed direction,    k = d / (1 - dof(d) / N).                       (1)

So noise of this kind *adds* damping: a step with the matrix of few samples is one with a larger damping k, k / d times as
long (Marchenko and Pastur 1967; for the resolvent itself Knowles and Yin 2017). For an eigenvector u of S whose eigenvalue l
stands apart from the bulk the cleaning of Ledoit and Peche 2011 is

    u'Cu = l / (1 - dof_l / N)^2,    dof_l = sum over the other eigenvalues m of m / (m - l) ,                    (2)

which is ``l / |1 - q + q l g(l)|^2`` with ``q = n / N`` and the Stieltjes transform g. Nothing else need be known of C.

The number of samples N is that of independent rank-one terms. One sample of a batch gives as many as the model has outputs,
weighted by the loss; their effective number ``(sum w)^2 / sum w^2`` is what counts when the weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import positive, spectrum_argument, vector
from lightning_rmt.local_law.cleaning import Cleaned, sampling_error, standing_apart
from lightning_rmt.local_law.errors import NoDampingError
from lightning_rmt.local_law.resolvent import rising_root
from lightning_rmt.spectra.bulk import Bulk
from lightning_rmt.spectra.spectrum import Spectrum

#: A negative eigenvalue of this share of the largest is more than rounding.
ROUNDING = 1e-4


def ggn_effective_damping(damping: float, samples: float, spectrum: Spectrum) -> float:
    """The damping of the true matrix that a damping of the noisy one amounts to: k of equation (1), above ``damping``.

    The step is ``k / damping`` times as long besides.

    Args:
        damping: d, in the operator's units, positive.
        samples: N, the number of independent rank-one terms in the matrix.
        spectrum: of the noisy Gauss-Newton matrix or gradient covariance.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the damping isn't positive and finite, ``samples`` isn't positive, or the spectrum isn't that of a
            positive semidefinite matrix.
        NoDampingError: the matrix has a larger rank than samples: ``samples`` is too small.
    """
    damping = positive(damping, "damping")
    law = FewSamples.of(samples, spectrum)
    left = law.left(damping)
    if left <= 0:
        raise NoDampingError(
            f"a damping of {damping:.6g} leaves {law.freedom(damping):.6g} directions of this spectrum, {samples:.6g} "
            "samples have no more than that: count one sample per example and output of the model, or raise the damping"
        )
    return damping / left


def ggn_damping_for(effective: float, samples: float, spectrum: Spectrum) -> float:
    """The damping of the noisy matrix that amounts to this one of the true: the inverse of `ggn_effective_damping`.

    Args:
        effective: k wanted, in the operator's units, positive.
        samples: as for `ggn_effective_damping`.
        spectrum: as for `ggn_effective_damping`.

    Raises:
        TypeError: the spectrum is none.
        ValueError: as for `ggn_effective_damping`.
        NoDampingError: the noise alone amounts to more damping than that, or the matrix has a larger rank than samples.
    """
    effective = positive(effective, "effective")
    law = FewSamples.of(samples, spectrum)

    def equation(damping: float) -> tuple[float, float]:
        return damping - effective * law.left(damping), 1 - effective * law.slope(damping)

    damping = rising_root(equation, effective, concave=False)
    if not damping > 0 or abs(equation(damping)[0]) > 1e-6 * effective:
        raise NoDampingError(
            f"no damping amounts to {effective:.6g}: the noise of {samples:.6g} samples alone does to more, or they are "
            "fewer than the matrix has rank; ask for more damping or take more samples"
        )
    return damping


def ggn_clean(eigenvalues: ArrayLike, samples: float, spectrum: Spectrum) -> Cleaned:
    """What the outliers of a noisy Gauss-Newton matrix say about the true one: equation (2).

    Args:
        eigenvalues: positive eigenvalues of the noisy matrix that stand apart from its bulk, shape (k,), perhaps none.
        samples: as for `ggn_effective_damping`.
        spectrum: as for `ggn_effective_damping`.

    Returns:
        As for `clean`; `Cleaned.stderr` is NaN, since the fluctuation of such a matrix isn't known here.

    Raises:
        TypeError: the spectrum is none.
        ValueError: as for `ggn_effective_damping`, or an eigenvalue is not finite.
    """
    found = vector(eigenvalues, "eigenvalues")
    FewSamples.of(samples, spectrum)  # refuses what is no covariance
    curvature, location, overlap, error = (np.full(found.size, math.nan) for _ in range(4))
    for index, nodes, weights in standing_apart(found.clip(0), spectrum):
        value = found[index]
        kept = spectrum.size * weights * nodes / (nodes - value)
        left = 1 - float(kept.sum()) / samples
        slope = -float((kept / (nodes - value)).sum()) / samples  # of that, by the eigenvalue
        # location(l) = l / left(l); the overlap is location / (l location')
        change = (left - value * slope) / left**2
        if left > 0 and change > 0:
            location[index], curvature[index] = value / left, value / left**2
            overlap[index] = location[index] / (value * change)
            spread = sampling_error(value, lambda x, value: x / (x - value), spectrum)
            error[index] = 2 * curvature[index] / left * spread * spectrum.size / samples
    return Cleaned(found, curvature, location, overlap, error, np.full(found.size, math.nan))


@dataclass(frozen=True, eq=False)
class FewSamples:
    """How much of a fit to N samples is left in new ones: ``1 - dof(d) / N``.

    Attributes:
        eigenvalues: of the noisy matrix, at least 0; outliers are among them, since each takes a whole direction.
        counts: how many there are of each.
        samples: N.
        bulk: where the counts' sampling errors come from.
        known: 1 where the counts were calibrated to the rank that N samples give, else 0.
    """

    eigenvalues: NDArray[np.float64]
    counts: NDArray[np.float64]
    samples: float
    bulk: Bulk
    known: float

    @classmethod
    def of(cls, samples: float, spectrum: Spectrum) -> FewSamples:
        """From a measured spectrum.

        Raises:
            TypeError: the spectrum is none.
            ValueError: ``samples`` isn't positive, or the spectrum has negative eigenvalues.
        """
        bulk = spectrum_argument(spectrum).bulk
        nodes, weights = bulk.pooled()
        values = np.concatenate([nodes, bulk.outliers])
        counts = np.concatenate([weights * bulk.size, np.ones(bulk.outliers.size)])
        if values.min() < -ROUNDING * np.abs(values).max():
            raise ValueError(
                f"this spectrum reaches down to {values.min():.4g}: a Gauss-Newton matrix or a gradient covariance has no "
                "negative eigenvalues; for a Hessian use effective_damping, whose noise is additive"
            )
        law = cls(values.clip(0), counts, positive(samples, "samples"), bulk, 0.0)
        return law._calibrated() if bulk.zero_mass > 0 and samples < spectrum.size else law

    def _calibrated(self) -> FewSamples:
        """With the rank that N samples give, where the measured one doesn't differ from it by more than three errors.

        What is left of a fit vanishes with the damping then, and has to do so exactly: the step divides by its square.
        """
        zero = np.append(self.bulk.is_zero(self.bulk.pooled()[0]), np.zeros(self.bulk.outliers.size, dtype=bool))
        rank = float(self.counts[~zero].sum())
        error = self._spread(lambda x: (~self.bulk.is_zero(x)).astype(float))
        if not (rank > 0 and abs(rank - self.samples) <= 3 * error):
            return self
        return replace(self, counts=np.where(zero, self.counts, self.counts * (self.samples / rank)), known=1.0)

    def _spread(self, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
        """Standard error of a function's sum over the eigenvalues, from the random weights of those that aren't resolved."""
        variance = float(self.bulk.covariance(lambda x: function(x)[None, :])[0, 0])
        return self.bulk.size * math.sqrt(max(variance, 0.0))

    def freedom(self, damping: float) -> float:
        """``dof(d) = tr S (S + d)^-1``."""
        return float(self.counts @ (self.eigenvalues / (self.eigenvalues + damping)))

    def left(self, damping: float) -> float:
        """``1 - dof(d) / N``; not positive where the matrix has a larger rank than samples."""
        return 1 - self.freedom(damping) / self.samples

    def error(self, damping: float) -> float:
        """Standard error of `left`."""
        share = self.known * self.freedom(damping) / self.samples  # of the rank: its error cancels where that is known
        spread = self._spread(lambda x: x.clip(0) / (x.clip(0) + damping) - share * ~self.bulk.is_zero(x))
        return spread / self.samples

    def slope(self, damping: float) -> float:
        """Derivative of `left`."""
        return float(self.counts @ (self.eigenvalues / (self.eigenvalues + damping) ** 2)) / self.samples
