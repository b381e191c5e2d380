"""The share of negative eigenvalues, also where it is tiny."""

from __future__ import annotations

import numpy as np

from lightning_rmt.laws.law import Law


def negative_mass(law: Law) -> float:
    """Mass below zero, to a relative 1e-6 or so however little it is.

    A distribution function on a fixed grid loses the few eigenvalues beyond a threshold; this integrates over the negative
    part alone.
    """
    angle, weight = np.polynomial.legendre.leggauss(200)
    angle, weight = (angle + 1) * np.pi / 2, weight * np.pi / 2
    total = 0.0
    for low, high in law.support:
        half = (min(high, 0.0) - low) / 2
        if half > 0:
            total += float(weight @ (law.density(low + half * (1 - np.cos(angle))) * np.sin(angle))) * half
    return total
