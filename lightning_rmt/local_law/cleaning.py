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
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import noise_scale_argument, spectrum_argument, vector
from lightning_rmt.local_law.resolvent import OF_ONE
from lightning_rmt.spectra.spectrum import Spectrum

#: An eigenvalue is outside of pure noise when it is above ``2 s (1 + EDGE n^(-2/3))``: three fluctuations of its edge.
EDGE = 3.0
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
    """

    eigenvalues: NDArray[np.float64]
    curvature: NDArray[np.float64]
    location: NDArray[np.float64]
    overlap: NDArray[np.float64]

    @property
    def told(self) -> NDArray[np.bool_]:
        """Which of them stand apart from noise and bulk."""
        return np.isfinite(self.curvature)


def clean(eigenvalues: ArrayLike, noise: float, spectrum: Spectrum) -> Cleaned:
    """Cleans outliers of a matrix with additive noise.

    An eigenvalue is told from noise when it lies above the edge of pure noise, ``2 s (1 + 3 n^(-2/3))``, *and* outside of
    the bulk that the spectrum shows, by more than its nearest neighbour's share of the statistics. Both are needed: where
    the true bulk is wide, all of it is above the noise edge; where noise is alone, its largest eigenvalue may lie
    beyond all others by chance. Within 3 % of the edge the results are biased: for a spike of 1.2 s, n = 2000, location and
    curvature come out 7 % and 20 % too large; from 1.5 s on 2 % and 3 %.

    Args:
        eigenvalues: exact ones, of either sign, shape (k,): those of ``spectrum.outliers`` or ``spectrum.top``.
        noise: scale s of the noise in the matrix.
        spectrum: of the matrix.

    Returns:
        The cleaned outliers, in the order given; without noise, each is its own curvature and the overlap is 1.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the noise is negative or not finite, or an eigenvalue is not finite.
    """
    noise = noise_scale_argument(noise)
    found = vector(eigenvalues, "eigenvalues")
    nodes, weights = without(found, spectrum_argument(spectrum))
    curvature, location, overlap = (np.full(found.size, math.nan) for _ in range(3))
    edge = 2 * noise * (1 + EDGE * spectrum.size ** (-2 / 3))
    for index, value in enumerate(found):
        if abs(value) > edge and well_apart(float(value), nodes, weights):
            apart = 1 / (value - nodes)
            pull = noise**2 * float(weights @ apart)
            curvature[index], location[index] = value - 2 * pull, value - pull
            overlap[index] = 1 / (1 + noise**2 * float(weights @ apart**2))
    return Cleaned(found, curvature, location, overlap)


def without(eigenvalues: NDArray[np.float64], spectrum: Spectrum) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bulk of a spectrum without these eigenvalues, should it hold any of them; the weights keep their share of all n."""
    nodes, weights = spectrum.bulk.pooled()
    same = np.zeros(nodes.size, dtype=bool)
    for value in eigenvalues:
        same |= np.abs(nodes - value) <= SAME * abs(value)
    return nodes[~same], weights[~same] * (1 - spectrum.bulk.removed_mass)


def well_apart(value: float, nodes: NDArray[np.float64], weights: NDArray[np.float64]) -> bool:
    """Whether a value lies outside of these nodes, and the nearest makes up less than half of ``mean 1 / (value - x)^2``."""
    if not nodes.size or not (value > nodes.max() or value < nodes.min()):
        return not nodes.size
    terms = weights / (value - nodes) ** 2
    # where a run can't resolve the bulk's end, its last node is heavy, and far from the next
    return bool(np.max(terms) <= max(OF_ONE, float(weights[np.argmax(terms)])) * terms.sum())
