"""How far a law is from a measured bulk with all its zeros, and the nearest member of a family by that distance.

`rank_laws` reads a family's parameters from free cumulants and compares laws without an atom with the bulk without its
zeros. A paper's claim about a shape deserves more: the whole bulk, and the member that comes nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lightning_rmt import estimate_spectrum
from lightning_rmt.laws import Law
from lightning_rmt.laws.distance import Comparison, comparison, law_distance, resolution_floor
from lightning_rmt.spectra.bulk import Bulk
from lightning_rmt.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class Misfit:
    """A law beside a bulk.

    Attributes:
        law: the law; of the eigenvalues plus `shift`.
        shift: added to the eigenvalues.
        distance: Wasserstein-1 distance, over the bulk's standard deviation.
        floor: what a bulk's own law shows, over the same. No part of it is taken off for fitted parameters, so that a fit
            may come below 1 floor.
    """

    law: Law
    shift: float
    distance: float
    floor: float

    @property
    def relative(self) -> float:
        """Distance in floors."""
        return self.distance / self.floor


def without_largest(spectrum: Spectrum, count: int) -> Bulk:
    """The spectrum without so many of its largest eigenvalues, whether they were counted as outliers or not.

    Raises:
        ValueError: fewer are certified.
    """
    counted = spectrum.outliers.high.count or 0
    if counted >= count:
        return spectrum.bulk
    if len(spectrum.top) <= count:
        raise ValueError(f"only {len(spectrum.top)} eigenvalues are certified: take more Lanczos steps")
    bulk, cut = spectrum.bulk, (spectrum.top[count - 1].value + spectrum.top[count].value) / 2
    kept = [nodes < cut for nodes in bulk.nodes]
    weights = [w[k] for w, k in zip(bulk.weights, kept, strict=True)]
    return replace(
        bulk,
        size=bulk.size - (count - counted),
        nodes=tuple(x[k] for x, k in zip(bulk.nodes, kept, strict=True)),
        weights=tuple(w / w.sum() for w in weights),
        random=tuple(r[k] for r, k in zip(bulk.random, kept, strict=True)),
    )


def misfit(law: Law, bulk: Bulk, shift: float = 0.0) -> Misfit:
    """The law beside the bulk, its zeros included whether the law has an atom or not."""
    floor = resolution_floor(bulk, True, 1.0)
    bulk = replace(bulk, nodes=tuple(nodes + shift for nodes in bulk.nodes))
    nodes, weights = bulk.pooled()
    scale = math.sqrt(float(weights @ (nodes - weights @ nodes) ** 2))
    grid = comparison(law, bulk).x
    at = Comparison(True, np.unique(np.concatenate([grid, nodes, [law.atom_location]])))
    return Misfit(law, shift, law_distance(law, bulk, at) / scale, floor / scale)


def kolmogorov(levels: np.ndarray, law: Law) -> float:
    """Largest distance of the distribution functions of eigenvalues and law, the steps at an atom included."""
    places, counts = np.unique(levels, return_counts=True)
    after, theirs = np.cumsum(counts) / len(levels), law.cdf(places)
    before = theirs - law.atom * (places == law.atom_location)
    return float(max(np.abs(after - theirs).max(), np.abs(after - counts / len(levels) - before).max()))


def nearest(
    make: Callable[..., Law],
    starts: Sequence[Sequence[float]],
    bulk: Bulk,
    *,
    spread: float = 0.2,
    shifted: bool = False,
    evaluations: int = 350,
) -> Misfit:
    """The member of a family nearest to the bulk, from the best of several starts downhill.

    Args:
        make: the law with these parameters, a ValueError or an IndexError where there is none.
        starts: parameters.
        bulk: the measured bulk.
        spread: how far the first steps go, besides a fifth of each parameter.
        shifted: whether the last parameter is a shift of the eigenvalues instead.
        evaluations: of the distance, at most, after those of the starts.
    """

    def at(parameters: Sequence[float]) -> Misfit | None:
        values = [float(value) for value in parameters]
        own, shift = (values[:-1], values[-1]) if shifted else (values, 0.0)
        try:
            return misfit(make(*own), bulk, shift)
        except (ValueError, IndexError, np.linalg.LinAlgError):
            return None

    def distance(parameters: Sequence[float]) -> float:
        found = at(parameters)
        return 1e3 if found is None or not math.isfinite(found.distance) else found.distance

    best = np.array(min(starts, key=distance))
    for share in (0.7, 0.3):  # started afresh, since Nelder and Mead's simplex may collapse
        corners = np.vstack([best, best + np.diag(0.2 * np.abs(best) + spread)])
        options = {"fatol": 1e-5, "maxfev": round(share * evaluations), "initial_simplex": corners}
        best = minimize(distance, best, method="Nelder-Mead", options=options).x
    found = at(best)
    if found is None:
        raise ValueError(f"no member of the family can be compared with this bulk, the best of {starts} is at {best}")
    return found


@dataclass(frozen=True)
class Dense:
    """A matrix as an operator: for simulated ones, whose spectra are to be measured the way a network's is."""

    matrix: Tensor

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def matmat(self, vectors: Tensor) -> Tensor:
        return vectors @ self.matrix


@dataclass(frozen=True)
class Diagonal(Dense):
    """Eigenvalues as an operator; to Lanczos from a random start any matrix that has them is the same."""

    def matmat(self, vectors: Tensor) -> Tensor:
        return vectors * self.matrix


def measured(levels: np.ndarray, steps: int = 100, probes: int = 1, seed: int = 0) -> Spectrum:
    """Eigenvalues as Lanczos sees them."""
    return estimate_spectrum(Diagonal(torch.from_numpy(levels)), steps=steps, probes=probes, seed=seed)
