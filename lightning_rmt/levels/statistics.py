"""Level statistics of exact spectra; so far the spacing ratio alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class LevelStatistics:
    """What is known of a spectrum's spacings.

    Attributes:
        spacing_ratio: mean ratio of neighbouring spacings, smaller over larger; 0.5307 for the GOE, 0.3863 for Poisson.
        stderr: its standard error if levels repel as those of the GOE.
        levels: levels kept, over all spectra.
    """

    spacing_ratio: float
    stderr: float
    levels: int


def level_statistics(eigenvalues: ArrayLike, *, noise: float = 0.0) -> LevelStatistics:
    """The mean spacing ratio of one spectrum or several of the same size, ascending along the last axis."""
    ratios, levels = [], 0
    for spectrum in np.atleast_2d(np.asarray(eigenvalues, dtype=np.float64)):
        kept = spectrum[np.abs(spectrum) > max(1e-12 * np.abs(spectrum).max(), 10 * noise)]
        gaps = np.diff(kept)
        ratios.append(np.minimum(gaps[1:], gaps[:-1]) / np.maximum(gaps[1:], gaps[:-1]))
        levels += kept.size
    pooled = np.concatenate(ratios)
    return LevelStatistics(float(pooled.mean()), float(0.308 / np.sqrt(pooled.size)), levels)
