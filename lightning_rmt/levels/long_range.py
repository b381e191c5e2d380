"""Statistics over many spacings: number variance and spectral rigidity."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Windows per unit length.
_WINDOWS = 2


def number_variance(positions: NDArray[np.float64], length: float) -> float:
    """Variance of the number of levels in a window of ``length`` mean spacings, about ``length``.

    GOE: .67 for 3 and .91 for 10; independent levels: the length itself.

    Args:
        positions: unfolded levels, shape (k,), ascending with mean spacing 1.
        length: less than half of k.
    """
    start = np.arange(positions[0], positions[-1] - length, 1 / _WINDOWS)
    counts = np.searchsorted(positions, start + length) - np.searchsorted(positions, start)
    return float(np.mean((counts - length) ** 2))


def rigidity(positions: NDArray[np.float64], length: float) -> float:
    """Dyson and Mehta's Delta_3: mean square distance of the staircase from the best line, over windows of ``length``.

    GOE: .274 for 15; independent levels: length / 15. The staircase is integrated exactly, step by step; windows overlap
    by half.

    Args:
        positions: unfolded levels, shape (k,), ascending with mean spacing 1.
        length: window, in mean spacings; less than half of k.
    """
    half = length / 2
    values = []
    for center in np.arange(positions[0] + half, positions[-1] - half, half):
        inside = positions[(positions >= center - half) & (positions < center + half)] - center
        edges = np.concatenate([[-half], inside, [half]])
        heights = np.arange(inside.size + 1.0)
        widths, squares = np.diff(edges), np.diff(edges**2) / 2
        zeroth = float(heights @ widths) / length
        slope = float(heights @ squares) * 12 / length**3
        second = float(heights**2 @ widths) / length
        values.append(second - zeroth**2 - slope**2 * length**2 / 12)
    return math.fsum(values) / len(values)
