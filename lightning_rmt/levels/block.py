"""The exact levels of one block of the Hessian, and what is found in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.levels.statistics import LevelStatistics, level_statistics


@dataclass(frozen=True, eq=False)
class BlockLevels:
    """Exact eigenvalues of one block of parameters, on one batch or more.

    Only these are stored; the statistics are computed on first use, so that a saved reading profits from better ones later.

    Attributes:
        name: short, fit for a tag: a layer or a name pattern.
        description: which parameters, in words.
        eigenvalues: shape (spectra, k), ascending along the last axis, one row per batch and rank, float64.
        noise: error of the matrices in the spectral norm, as measured, in the eigenvalues' units; the largest of all rows.
        seconds: wall-clock time that it took.
    """

    name: str
    description: str
    eigenvalues: NDArray[np.float64]
    noise: float
    seconds: float

    @cached_property
    def statistics(self) -> LevelStatistics:
        """Level statistics, pooled over the spectra."""
        return level_statistics(self.eigenvalues, noise=self.noise)
