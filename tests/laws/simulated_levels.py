"""What the tests of the laws do with the levels of a simulated matrix."""

from __future__ import annotations

import numpy as np

from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf


def kolmogorov(levels, law):
    """Largest distance between the levels' and the law's distribution functions, the steps at an atom included."""
    places, counts = np.unique(levels, return_counts=True)
    after = np.cumsum(counts) / len(levels)
    theirs = law.cdf(places)
    before = theirs - law.atom * (places == law.atom_location)
    return max(np.abs(after - theirs).max(), np.abs(after - counts / len(levels) - before).max())


def cumulants_of(levels):
    m1, m2, m3, m4 = (float(np.mean(levels**k)) for k in range(1, 5))
    return FreeCumulantsOf(
        m1,
        m2 - m1**2,
        m3 - 3 * m1 * m2 + 2 * m1**3,
        m4 - 4 * m1 * m3 - 2 * m2**2 + 10 * m1**2 * m2 - 5 * m1**4,
    )


def bulk_of(levels):
    return BulkMoments(cumulants_of(levels), cumulants_of(levels[levels != 0]), float(np.mean(levels == 0)))


def mass_error(law):
    """Of the quadrature, before it is normalised."""
    return law._unnormalised[1].sum() - (1 - law.atom)
