"""Level statistics of the certified eigenvalues at one end of a measured spectrum.

Lanczos finds eigenvalues from the ends inwards, and what it has found it knows: a run of consecutive eigenvalues, each to
a small share of the spacing. Ratios of spacings need no unfolding, so the edge's falling density doesn't matter
(measured: .526 to .541 for the top 10, 10 to 50 and 50 to 100 levels of GOE and of sample covariance matrices, .38 to .39
for independent levels). A million parameters and a hundred steps give some tens of levels, mostly too few.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lightning_rmt.levels.statistics import LevelStatistics, level_statistics
from lightning_rmt.levels.verdict import FEWEST_LEVELS
from lightning_rmt.spectra.spectrum import Spectrum

#: A level belongs to the run while its residual is below this share of the mean spacing around it. Jitter of 3 % of a
#: spacing takes .0015 off the ratio.
CERTIFIED_SHARE = 0.02
#: Levels on either side over which that mean is taken.
_WINDOW = 3


def edge_statistics(spectrum: Spectrum, side: Literal["high", "low"]) -> LevelStatistics | str:
    """Level statistics of the certified run at one end, without the outliers where they could be counted.

    The products must be exact: finite differences err by far more than what tells neighbours apart.

    Args:
        spectrum: as measured.
        side: ``"high"`` for the largest eigenvalues, ``"low"`` for the smallest.

    Returns:
        The statistics, or the reason why there are none, with the number of levels found and the number needed.

    Raises:
        ValueError: ``side`` is another word.
    """
    if side not in ("high", "low"):
        raise ValueError(f'side must be "high" or "low", got {side!r}')
    values, residuals = spectrum.resolved_levels(side)
    gaps = np.abs(np.diff(values))
    index = np.arange(values.size)
    first, last = np.maximum(index - _WINDOW, 0), np.minimum(index + _WINDOW, gaps.size)
    upto = np.append(0.0, np.cumsum(gaps))
    mean = (upto[last] - upto[first]) / np.maximum(last - first, 1)
    certified = residuals <= CERTIFIED_SHARE * mean
    count = int(values.size if certified.all() else np.argmin(certified))
    apart = spectrum.outliers.high if side == "high" else spectrum.outliers.low
    outliers = apart.count or 0
    if count - outliers < FEWEST_LEVELS:
        end = "upper" if side == "high" else "lower"
        return (
            f"insufficient levels: {max(count - outliers, 0)} certified at the {end} end besides outliers, "
            f"{FEWEST_LEVELS} needed; more Lanczos steps certify more"
        )
    scale = max(abs(spectrum.lambda_max.value), abs(spectrum.lambda_min.value))
    return level_statistics(
        np.sort(values[outliers:count]),
        noise=spectrum.noise * scale,
        size=spectrum.size,
        norm=scale,
        source=f"edge_{side}",
    )
