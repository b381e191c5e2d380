"""Which directions a preconditioner shrinks, and by how much: the rank is chosen by the spectrum, not tuned.

In the subspace of the k largest levels the step is multiplied by

    c_i = min(1, (e + d) / (|xi_i| + d)),

with xi_i the true curvature along the direction that the noisy matrix shows (`clean`), e the largest level that is left and
d the damping. A learning rate that is right for curvature e then is for the k directions too. It never amplifies: with a
scale of ``1 / curvature`` on everything, a cross-entropy whose curvature vanishes sent the step to infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import not_negative, spectrum_argument
from lightning_rmt.local_law.cleaning import clean
from lightning_rmt.local_law.damping import noise_edge
from lightning_rmt.spectra.levels import noise_floor
from lightning_rmt.spectra.spectrum import Spectrum

#: Without a gap of this factor below the last level there is nothing to win: on a power-law spectrum deflation lost.
SMALLEST_GAP = 2.0


@dataclass(frozen=True, eq=False)
class Deflation:
    """The levels that are shrunk, largest magnitude first; none where nothing stands apart.

    Attributes:
        values: shape (k,), as measured.
        curvature: shape (k,), cleaned of the noise.
        edge: magnitude of the largest level that is left, at least the rounding of the largest one; all in the units of the
            matrix.
        reason: in words, why there are no more levels.
    """

    values: NDArray[np.float64]
    curvature: NDArray[np.float64]
    edge: float
    reason: str

    @classmethod
    def nothing(cls, reason: str) -> Deflation:
        """No levels, and why."""
        return cls(np.empty(0), np.empty(0), 0.0, reason)

    @property
    def rank(self) -> int:
        """How many directions are shrunk, k."""
        return self.values.size

    def factors(self, damping: float = 0.0) -> NDArray[np.float64]:
        """c_i, shape (k,), above 0 and at most 1.

        Args:
            damping: d, in the units of the matrix.

        Raises:
            ValueError: the damping is negative or not finite.
        """
        damping = not_negative(float(damping), "damping", "it is added to the curvature")
        return np.asarray(np.minimum(1.0, (self.edge + damping) / (np.abs(self.curvature) + damping)))


def find_deflation(
    values: ArrayLike,
    residuals: ArrayLike,
    spectrum: Spectrum,
    *,
    noise: float = 0.0,
    most: int = 10,
    rank: int | Literal["auto"] = "auto",
    gap: float = SMALLEST_GAP,
) -> Deflation:
    """Chooses the levels: those beyond the noise edge and apart from the bulk, down to one with a gap below it.

    Args:
        values: of the eigenpairs, shape (k,), largest magnitude first.
        residuals: theirs, shape (k,).
        spectrum: of the same matrix.
        noise: scale s of the noise in that matrix.
        most: the largest rank.
        rank: ``"auto"`` takes as many as there are above the last gap; a number takes that many, or all that are apart where
            those are fewer, and none where there is no gap below the last.
        gap: factor from a level to the next one that makes a gap.

    Raises:
        TypeError: the spectrum is none.
        ValueError: the noise is negative or not finite; or the values aren't of the spectrum's matrix.
    """
    nodes = _nodes(spectrum_argument(spectrum))
    found = np.asarray(values, dtype=np.float64)[: most if rank == "auto" else rank]
    errors = np.asarray(residuals, dtype=np.float64)[: found.size]
    magnitudes = np.sort(np.abs(nodes))[::-1]
    if not found.size or magnitudes[0] == 0:
        return Deflation.nothing("no eigenpair was found")
    _same_matrix(float(np.abs(found[0])), float(magnitudes[0]))
    cleaned = clean(_onto_nodes(found, errors, nodes), noise, spectrum)
    told = found.size if cleaned.told.all() else int(np.argmin(cleaned.told))
    if told == 0:
        edge = f"the edge of the noise, {noise_edge(noise):.3g}, and of the bulk" if noise else "the bulk"
        return Deflation.nothing(f"the largest level, {found[0]:.3g}, doesn't stand apart from {edge}")
    beyond = np.append(np.abs(np.asarray(values, dtype=np.float64)), 0.0)
    left = np.append(magnitudes, np.zeros(found.size + 1))
    floor = noise_floor(spectrum.noise) * magnitudes[0]
    # the spectrum may have seen a level that the pairs miss, and the other way round
    edges = np.array([max(left[k], beyond[k], floor) for k in range(1, told + 1)])
    gaps = np.abs(found[:told]) / edges
    wide = np.flatnonzero(gaps >= gap)
    if rank != "auto":
        wide = wide[wide == told - 1]
    if not wide.size:
        return Deflation.nothing(
            f"no gap: of {told} levels that stand apart the last is {gaps[-1]:.2g} times the next one, and shrinking "
            f"them wins nothing below {gap:g}"
        )
    k = int(wide[-1]) + 1
    return Deflation(
        found[:k], cleaned.curvature[:k], float(edges[k - 1]), f"level {k} is {gaps[k - 1]:.3g} times the next"
    )


def _nodes(spectrum: Spectrum) -> NDArray[np.float64]:
    """Ritz values of the run that levels are read from."""
    runs = [run for run in spectrum.runs if run.reorthogonalised]
    return (runs or list(spectrum.runs))[0].nodes


def _onto_nodes(
    values: NDArray[np.float64], residuals: NDArray[np.float64], nodes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Each value as the spectrum's run has it, where that is within the residual: cleaning takes a level out of its bulk.

    From another start vector the same level, not quite converged, comes out a little different.
    """
    nearest = nodes[np.abs(values[:, None] - nodes[None, :]).argmin(1)]
    moved = np.where(np.abs(nearest - values) <= residuals, nearest, values)
    # two values may not become one
    return values if np.unique(moved).size < values.size else np.asarray(moved)


def _same_matrix(largest: float, largest_node: float) -> None:
    """Raises ValueError where the pairs are obviously not of the spectrum's matrix."""
    if not 0.5 <= largest / largest_node <= 2:
        raise ValueError(
            f"the largest eigenpair is {largest:.4g} and the spectrum ends at {largest_node:.4g}: they are of different "
            "matrices. Measure both on optimizer.in_metric(operator), or let optimizer.refresh(operator) do it"
        )
