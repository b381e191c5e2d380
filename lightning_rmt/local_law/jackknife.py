"""The jackknife over groups: an estimate without its leading bias, and its standard error."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.spectra.moments import Estimate


def jackknife(values: NDArray[np.float64]) -> Estimate:
    """Combines a statistic of all groups with those of all groups but one.

    Args:
        values: shape (K + 1,): of all groups first, then without group 1, 2, ..., K; groups of about equal size.

    Returns:
        The estimate with its bias of order 1 / K removed, and its standard error. For a ratio pass its logarithm.

    Raises:
        ValueError: fewer than two groups.
    """
    groups = values.size - 1
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, got {groups}")
    left_out = values[1:]
    mean = float(left_out.mean())
    variance = (groups - 1) / groups * float(((left_out - mean) ** 2).sum())
    return Estimate(groups * float(values[0]) - (groups - 1) * mean, math.sqrt(variance))
