"""Noise eats damping: what a damping is worth on a noisy curvature matrix, and which one to choose.

The matrix of a batch is ``H = A + N``: the true curvature A and noise N, GOE(s), with off-diagonal variance ``s^2 / n``. By
the isotropic local law (Knowles and Yin 2013; for batch Hessians Baskerville, Keating, Mezzadri, Najnudel and Granziol
2022, arXiv:2205.08601), with ``tau(d) = (1/n) tr (H + d)^-1``,

    (H + d)^-1  =  (A + d_eff)^-1  in any fixed direction,    d_eff = d - s^2 tau(d).                             (1)

With a flat true curvature that is ``d = d_eff + s^2 / d_eff``, at least 2s: below its noise edge no damping keeps the matrix
positive, and at the edge half of it is gone.

One often measures a spectrum with less noise than a step has: on more samples than a batch. Every function therefore takes
``spectrum_noise``, the noise in the measured matrix: by default all of it (the matrix is one like those that are damped),
0 where it is the true curvature, or something between. With the measured matrix ``H_0 = A + GOE(s_0)`` everything follows
from one parameter k, the damping that H_0 would need for the same resolvent:

    d = k + (s^2 - s_0^2) tau_0(k),     d_eff = k - s_0^2 tau_0(k).                                               (2)

Both known ways to invert (1) are special cases: ``s_0 = s`` solves it by iteration, ``s_0 = 0`` is the explicit
``d = d_eff + s^2 (1/n) tr (A + d_eff)^-1``. Neither is the better rule: each is right for its own spectrum and wrong for the
other's. Measured on four matrices (n = 1500; one probe, 100 steps): the right one recovers ``d_eff`` within 1.1 % at 1.05
times the edge and .3 % from 1.5 times on, the other errs by up to 23 %, or finds no answer. So it is an argument.

What enters tau is said in ``resolvent``. All of it is scale-covariant: c times the curvature and c times the noise make c
times the damping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_rmt.local_law.arguments import noise_scale_argument, not_negative, number, spectrum_argument
from lightning_rmt.local_law.errors import NoDampingError
from lightning_rmt.local_law.resolvent import Resolvent, rising_root
from lightning_rmt.spectra.spectrum import Spectrum

_POSITIVE = "a damping is added to the curvature; a negative one would take away from it"


def noise_edge(noise: float) -> float:
    """Where the spectrum of pure noise ends: ``2 s``.

    The smallest damping with flat true curvature, and the threshold that an eigenvalue must pass to say something.

    Args:
        noise: scale s of the noise, in the operator's units.

    Raises:
        ValueError: the noise is negative or not finite.
    """
    return 2 * noise_scale_argument(noise)


def effective_damping(
    damping: float, noise: float, spectrum: Spectrum, *, spectrum_noise: float | None = None
) -> float:
    """What is left of a damping once noise has eaten its share: ``d - s^2 tau(d)``, equation (1).

    Directions in which the matrix has an atom at zero, untouched by noise, keep all of it; the result is for the others.

    Args:
        damping: d, in the operator's units, at least 0.
        noise: scale s of the noise in the matrix that is damped.
        spectrum: of a curvature matrix.
        spectrum_noise: scale of the noise in that curvature matrix, from 0 to ``noise``; None where it is the damped matrix,
            or one like it.

    Returns:
        d_eff, below ``damping`` as a rule; without noise equal to it. Negative where the true curvature is so high that the
        noisy matrix needs no damping.

    Raises:
        TypeError: the spectrum is none.
        ValueError: an argument is negative, not finite, or the spectrum has more noise than the matrix.
        NoDampingError: the damping is below the bulk edge (see `smallest_damping`).

    Example:
        >>> import numpy as np
        >>> from lightning_rmt.krylov.tridiagonal import Tridiagonal
        >>> from lightning_rmt.spectra.spectrum import Spectrum
        >>> chain = Tridiagonal(np.zeros(100), np.ones(100))  # Lanczos on a GOE(1) matrix
        >>> round(effective_damping(2.5, 1.0, Spectrum((chain,), 10000, 100, 1e-14)), 6)  # 2.0 + 1 / 2.0
        2.0
    """
    damping = not_negative(damping, "damping", _POSITIVE)
    law = _Law.of(noise, spectrum, spectrum_noise)
    if damping < law.smallest:
        raise NoDampingError(
            f"a damping of {damping:.6g} is below the bulk edge: under {law.smallest:.6g} noise and negative curvature "
            "leave the damped matrix with eigenvalues of either sign; raise the damping, or the batch size"
        )
    left = law.effective(law.parameter(damping))
    if not math.isfinite(left):
        raise NoDampingError(
            f"a damping of {damping:.6g} is minus a degenerate eigenvalue: the matrix is singular; raise it"
        )
    return left


def damping_for(effective: float, noise: float, spectrum: Spectrum, *, spectrum_noise: float | None = None) -> float:
    """The damping of which so much is left: the inverse of `effective_damping`.

    Args:
        effective: d_eff wanted, in the operator's units.
        noise: as for `effective_damping`.
        spectrum: as for `effective_damping`.
        spectrum_noise: as for `effective_damping`.

    Raises:
        TypeError: the spectrum is none.
        ValueError: an argument is not finite, a noise scale negative, or the spectrum has more noise than the matrix.
        NoDampingError: no damping above the bulk edge leaves so little.
    """
    effective = number(effective, "effective")
    law = _Law.of(noise, spectrum, spectrum_noise)
    least = law.effective(law.start)
    if effective < least:
        raise NoDampingError(
            f"no damping leaves an effective damping of {effective:.6g}: the smallest that keeps the matrix positive, "
            f"{law.smallest:.6g}, leaves {least:.6g}; ask for at least that, or lower the noise with a larger batch"
        )
    return law.damping(law.solve(law.measured, effective))


def self_consistent_damping(noise: float, spectrum: Spectrum, *, spectrum_noise: float | None = None) -> float:
    """The damping at which a noisy Newton step of length one is neither too long nor too short: ``d = 2 s^2 tau(d)``.

    From Stein's identity, ``E[R A R] = R - (d - 2 s^2 tau) R^2`` with ``R = (H + d)^-1``: without noise in the gradient g
    the loss along ``-R g`` is lowest after exactly one step where the bracket vanishes. Then ``d_eff = d / 2``. With flat
    true curvature it is the noise edge 2s; with a bulk at mu, much above s, it is ``2 s^2 / mu``.

    It knows no noise of the gradient, and is too small for a single step where that dominates (up to six times the best loss
    in simulations): `joint_damping` does. Against Frobenius-optimal shrinkage (`ledoit_wolf`) it is the better default:
    that ignores that noise makes negative eigenvalues, and lost by a factor above 25 in 24 of 28 simulated cells.

    Args:
        noise: as for `effective_damping`.
        spectrum: as for `effective_damping`.
        spectrum_noise: as for `effective_damping`.

    Returns:
        The root; where negative curvature leaves none above the bulk edge, the smallest damping above it
        (`smallest_damping`). Without noise that is 0 for a positive semidefinite matrix: noise then gives no reason to damp,
        and something else has to (a trust region, since the loss isn't quadratic).

    Raises:
        TypeError: the spectrum is none.
        ValueError: a noise scale is negative or not finite, or the spectrum has more noise than the matrix.
    """
    law = _Law.of(noise, spectrum, spectrum_noise)
    # (2) in d = 2 s^2 tau(d), with tau(d) = tau_0(k): k = (s^2 + s_0^2) tau_0(k)
    return law.damping(law.solve(2 * law.measured + law.added, 0.0))


def self_consistent_damping_error(
    noise: float, spectrum: Spectrum, *, spectrum_noise: float | None = None, noise_stderr: float = 0.0
) -> float:
    """Standard error of `self_consistent_damping`, by the delta method.

    From the probes' sampling of the bulk, and from the noise scale's own error. Both scales are taken to come from one
    measurement (see `NoiseScale.at`), so that they err by the same factor. With ``k = f tau_0(k)`` both enter in the same
    way: ``d k (1 + f tau_0') = f (d tau_0 + 2 tau_0 d log s)``. That noise is no GOE is no part of it.

    Args:
        noise: as for `self_consistent_damping`.
        spectrum: as for `self_consistent_damping`.
        spectrum_noise: as for `self_consistent_damping`.
        noise_stderr: standard error of ``noise``, in its units.

    Returns:
        The error, in the operator's units; NaN where the damping is the smallest one above the bulk's edge, since nobody
        knows that edge's error.

    Raises:
        TypeError: as `self_consistent_damping`.
        ValueError: as `self_consistent_damping`.
    """
    law = _Law.of(noise, spectrum, spectrum_noise)
    factor = 2 * law.measured + law.added
    k = law.solve(factor, 0.0)
    if factor == 0 or k <= law.start:
        return math.nan
    tau, square = law.bulk.mean(k), law.bulk.mean(k, 2)
    slope = factor * (1 - law.added * square) / (1 + factor * square) + law.added
    relative = noise_stderr / noise if noise > 0 else 0.0
    return slope * math.hypot(law.bulk.mean_error(k, spectrum), 2 * tau * relative)


def smallest_damping(noise: float, spectrum: Spectrum, *, spectrum_noise: float | None = None) -> float:
    """The smallest damping that keeps the noisy matrix positive on its bulk, at least 0.

    A little above minus the lowest eigenvalue of the bulk: nearer than where that one eigenvalue makes up half of
    ``tr (H + d)^-2`` the local law is about it alone. Counted negative outliers don't raise it; to be above them as well,
    compare with ``-spectrum.lambda_min.value``.

    Args:
        noise: as for `effective_damping`.
        spectrum: as for `effective_damping`.
        spectrum_noise: as for `effective_damping`.

    Raises:
        TypeError: the spectrum is none.
        ValueError: a noise scale is negative or not finite, or the spectrum has more noise than the matrix.
    """
    return _Law.of(noise, spectrum, spectrum_noise).smallest


@dataclass(frozen=True, eq=False)
class _Law:
    """Equation (2).

    Attributes:
        bulk: tau_0.
        measured: ``s_0^2`` where the noise acts.
        added: ``s^2 - s_0^2`` there.
        start: smallest k; dampings below it aren't stable.
    """

    bulk: Resolvent
    measured: float
    added: float
    start: float

    @classmethod
    def of(cls, noise: float, spectrum: Spectrum, spectrum_noise: float | None) -> _Law:
        noise = noise_scale_argument(noise)
        inside = noise if spectrum_noise is None else noise_scale_argument(spectrum_noise, "spectrum_noise")
        if inside > noise:
            raise ValueError(
                f"the spectrum has noise {inside:.6g}, more than the {noise:.6g} of the matrix that is damped: measure the "
                "spectrum on as many samples as a batch, or more (a Trainer that accumulates batches: on as many of them, "
                "SpectrumMonitor(batches=accumulate_grad_batches))"
            )
        bulk = Resolvent.of(spectrum_argument(spectrum), inside)
        measured, added = bulk.variance * inside**2, bulk.variance * (noise - inside) * (noise + inside)
        return cls(bulk, measured, added, _start(bulk, added))

    @property
    def smallest(self) -> float:
        return max(self.damping(self.start), 0.0)

    def damping(self, k: float) -> float:
        return k + self.added * self.bulk.mean(k) if self.added > 0 else k

    def effective(self, k: float) -> float:
        return k - self.measured * self.bulk.mean(k) if self.measured > 0 else k

    def solve(self, factor: float, wanted: float) -> float:
        """The k with ``k - factor tau_0(k) = wanted``, at least `start`."""
        return self.bulk.damping_where(factor, wanted, self.start) if factor > 0 else max(wanted, self.start)

    def parameter(self, damping: float) -> float:
        """The k of this damping; the damping rises with k from `start` on, and is convex."""

        def equation(k: float) -> tuple[float, float]:
            return k + self.added * self.bulk.mean(k) - damping, 1 - self.added * self.bulk.mean(k, 2)

        if self.added == 0:
            return damping
        # at the start itself the slope may vanish
        return max(self.start, rising_root(equation, damping, concave=False)) if damping > self.smallest else self.start


def _start(bulk: Resolvent, added: float) -> float:
    """Smallest k: above the bulk, where the damping rises with k, and where it isn't negative."""
    start = bulk.floor
    if not bulk.nodes.size:
        return max(start, 0.0)
    if added > 0:
        # the damping rises where mean 1/(l + k)^2 < 1/added; that mean to the power -1/2 is concave in k
        def steepness(k: float) -> tuple[float, float]:
            square = bulk.mean(k, 2)
            return square**-0.5 - math.sqrt(added), bulk.mean(k, 3) * square**-1.5

        own = math.sqrt(added * float(bulk.weights[0]))
        start = max(start, rising_root(steepness, own - float(bulk.nodes[0]), concave=True))
    if start >= 0 or bulk.nodes[0] <= 0:
        return max(start, 0.0)
    if added == 0:
        return 0.0
    if start + added * bulk.mean(start) >= 0:
        return start

    def damping(k: float) -> tuple[float, float]:
        return k + added * bulk.mean(k), 1 - added * bulk.mean(k, 2)

    return rising_root(damping, 0.0, concave=False)
