"""What the outliers of a noisy curvature matrix say about the true one.

For ``H = A + GOE(s)`` and an eigenvalue l outside of the bulk, with ``G(l) = (1/n) tr (l - H)^-1`` over the other
eigenvalues (Benaych-Georges and Nadakuditi 2011; the local law extends it to batch Hessians, arXiv:2205.08601):

    location    the eigenvalue of A that made it:                    l - s^2 G(l),
    overlap     squared cosine between its eigenvector and H's:      1 / (1 - s^2 G'(l)),
    curvature   u'Au along the eigenvector u that H shows:           l - 2 s^2 G(l)  (Bun, Allez, Bouchaud and Potters 2016).

The last one is what a step along u meets. It isn't one to divide by: noise makes u longer along A's small eigenvalues, and
``1 / curvature`` in a preconditioner diverged in simulations (2.3 times the target's norm, against .6 for the best rule).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import noise_scale_argument, spectrum_argument, vector
from lightning_rmt.spectra.spectrum import Spectrum

#: An eigenvalue is outside of pure noise when it is above ``2 s (1 + EDGE n^(-2/3))``: three fluctuations of its edge.
EDGE = 3.0
#: A value isn't outside of the bulk where one eigenvalue as near as the nearest would make up more than this share of
#: ``mean 1 / (value - x)^2``.
OF_NEAREST = 0.1
#: A node of the spectrum this near to an eigenvalue, relatively, is that eigenvalue.
SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Cleaned:
    """Outliers, cleaned; shape (k,) each, in the operator's units. NaN where an eigenvalue isn't told from noise or bulk.

    Attributes:
        eigenvalues: as given.
        curvature: true curvature along the eigenvector that the noisy matrix shows.
        location: eigenvalue of the true matrix behind it.
        overlap: squared cosine between that eigenvector and the true one, from 0 to 1.
        error: standard error of the curvature that the probes' sampling of the bulk causes; that of the location is half of
            it.
        stderr: standard error of the curvature from all that is known to make it uncertain: that sampling, the noise scale's
            own error, the eigenvalues' residuals, and the fluctuation of the noise matrix itself. The last is
            ``a sqrt(1 + 2 s^2 m)``, m the mean of ``1 / (l - x)^2`` over the bulk and a the standard deviation of ``u'Nu``:
            ``s sqrt(2 / n)`` for a GOE, and with n = 1500 then 0.3 % of the curvature at 12 s, 3 % at 2 s and 7 % at 1.5 s;
            far more along the outliers of a network.
    """

    eigenvalues: NDArray[np.float64]
    curvature: NDArray[np.float64]
    location: NDArray[np.float64]
    overlap: NDArray[np.float64]
    error: NDArray[np.float64]
    stderr: NDArray[np.float64]

    @property
    def told(self) -> NDArray[np.bool_]:
        """Which of them stand apart from noise and bulk."""
        return np.isfinite(self.curvature)


def wigner_gap(cleaned: Cleaned, anisotropy: float) -> float | None:
    """How far noise that is the same in all directions is from what the outliers see: for a network, mostly far.

    With it a noisy eigenvalue l is cleaned to ``l - d``, d from the local law. Noise whose variance is a times as large in
    the outliers' own directions moves them a times as far (`NoiseScale.anisotropy`, to first order): ``l - a d``.

    Args:
        cleaned: outliers by the local law.
        anisotropy: a.

    Returns:
        The largest ``|(l - d) - (l - a d)| / |l - a d|`` over the outliers that are told from noise, infinite where that
        much noise leaves no curvature; None without any.
    """
    told = cleaned.told
    if not told.any():
        return None
    shift = cleaned.eigenvalues[told] - cleaned.curvature[told]
    left = cleaned.eigenvalues[told] - anisotropy * shift
    if (left <= 0).any():
        return math.inf
    return float(np.max(np.abs(anisotropy - 1.0) * shift / left))


def clean(
    eigenvalues: ArrayLike,
    noise: float,
    spectrum: Spectrum,
    *,
    noise_stderr: float = 0.0,
    residuals: ArrayLike = 0.0,
    along: float = 0.0,
) -> Cleaned:
    """Cleans outliers of a matrix with additive noise.

    An eigenvalue is told from noise when it lies above the edge of pure noise, ``2 s (1 + 3 n^(-2/3))``, *and* outside of
    the bulk that the spectrum shows, by so much that no single neighbour decides the sums. Both are needed: where the true
    bulk is wide, all of it is above the noise edge; where noise is alone, its largest eigenvalue may pass that by chance.
    With n = 1500 that is from spikes of 1.3 s on, 3.5 % above the edge; nearer than that the formulas are biased besides
    (7 % and 20 % too much for location and curvature at 1.2 s).

    Args:
        eigenvalues: exact ones, of either sign, shape (k,): those of ``spectrum.outliers`` or ``spectrum.top``.
        noise: scale s of the noise in the matrix.
        spectrum: of the matrix.
        noise_stderr: standard error of ``noise``, for `Cleaned.stderr`; NaN where it isn't known.
        residuals: how far an eigenvalue may be from the given ones, shape (k,) or one for all, for `Cleaned.stderr`.
        along: standard deviation of the noise's own quadratic form in an outlier's direction (`NoiseScale.along`), for
            `Cleaned.stderr`, where it is more than a GOE's.

    Returns:
        The cleaned outliers, in the order given; without noise, each is its own curvature and the overlap is 1.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the noise is negative or not finite, or an eigenvalue is not finite.
    """
    noise = noise_scale_argument(noise)
    found = vector(eigenvalues, "eigenvalues")
    away = np.broadcast_to(np.asarray(residuals, dtype=np.float64), found.shape)
    curvature, location, overlap, error, stderr = (np.full(found.size, math.nan) for _ in range(5))
    edge = 2 * noise * (1 + EDGE * spectrum_argument(spectrum).size ** (-2 / 3))
    for index, nodes, weights in standing_apart(np.where(np.abs(found) > edge, found, 0.0), spectrum):
        value = found[index]
        apart = 1 / (value - nodes)
        pull = noise**2 * float(weights @ apart)
        curvature[index], location[index] = value - 2 * pull, value - pull
        steep = noise**2 * float(weights @ apart**2)
        overlap[index] = 1 / (1 + steep)
        error[index] = 2 * noise**2 * sampling_error(value, lambda x, value: 1 / (value - x), spectrum)
        stderr[index] = math.hypot(
            error[index],
            4 * pull * noise_stderr / noise if noise > 0 else 0.0,
            (1 + 2 * steep) * away[index],
            max(along, noise * math.sqrt(2 / spectrum.size)) * math.sqrt(1 + 2 * steep),
        )
    return Cleaned(found, curvature, location, overlap, error, stderr)


def standing_apart(
    eigenvalues: NDArray[np.float64], spectrum: Spectrum
) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    """Which eigenvalues lie outside of the bulk, each with the bulk's nodes and their shares of all n eigenvalues.

    From the bulk outwards, since an eigenvalue that doesn't stand apart belongs to the bulk of those beyond it: a few of
    the bulk's largest ones, asked for together, must not vouch for each other.
    """
    nodes, weights = spectrum.bulk.pooled()
    weights = weights * (1 - spectrum.bulk.removed_mass)
    own = np.zeros(nodes.size, dtype=bool)
    for value in eigenvalues:
        own |= _same(nodes, value)
    kept = ~own
    middle = float(np.median(nodes[kept])) if kept.any() else 0.0
    for index in np.argsort(np.abs(eigenvalues - middle), kind="stable"):
        value = float(eigenvalues[index])
        if value != 0 and _well_apart(value, nodes[kept], weights[kept], spectrum.size):
            yield int(index), nodes[kept], weights[kept]
        else:
            kept |= own & _same(nodes, value)


def sampling_error(
    value: float, function: Callable[[NDArray[np.float64], float], NDArray[np.float64]], spectrum: Spectrum
) -> float:
    """Standard error of the mean of ``function(x, value)`` over the bulk without the value, from the probes' weights."""
    bulk = spectrum.bulk

    def finite(x: NDArray[np.float64]) -> NDArray[np.float64]:
        same = _same(x, value)
        return np.where(same, 0.0, function(np.where(same, value + 1, x), value))[None, :]

    return math.sqrt(max(float(bulk.covariance(finite)[0, 0]), 0.0)) * (1 - bulk.removed_mass)


def _same(nodes: NDArray[np.float64], value: float) -> NDArray[np.bool_]:
    return np.asarray(np.abs(nodes - value) <= SAME * abs(value))


def _well_apart(value: float, nodes: NDArray[np.float64], weights: NDArray[np.float64], size: int) -> bool:
    """Whether a value lies outside of these nodes, and one at the nearest makes up little of ``mean 1 / (value - x)^2``."""
    if not nodes.size or not (value > nodes.max() or value < nodes.min()):
        return not nodes.size
    distance = (value - nodes) ** 2
    return bool(1 / size / distance.min() <= OF_NEAREST * (weights / distance).sum())
