"""Site percolation: an atom and a semicircle."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_levels import bulk_of, kolmogorov, mass_error

from lightning_rmt.laws import Law, PercolatedWigner
from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8, 1.0])
def test_a_simulated_matrix_has_the_law(p):
    law = PercolatedWigner(p, 2.0)
    levels = law.rvs(2000, np.random.default_rng(0))
    assert (levels == 0).mean() == pytest.approx(1 - p, abs=1e-3)
    assert kolmogorov(levels, law) < 0.005
    assert abs(mass_error(law)) < 1e-9
    assert law.edges[1] == pytest.approx(4 * p**0.5)
    assert law.moment(4) == pytest.approx(2 * p**3 * 16)


def test_rows_deleted_one_by_one_leave_the_law():
    """``D W D`` as it is written, the diagonal drawn: the atom then fluctuates by sqrt(p (1 - p) / n) = 0.015."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((1000, 1000))
    kept = rng.random(1000) < 0.3
    levels = np.linalg.eigvalsh(np.outer(kept, kept) * (w + w.T) / 2000**0.5)
    levels[np.abs(levels) < 1e-12] = 0
    assert kolmogorov(levels, PercolatedWigner(0.3)) < 0.03


def test_deleted_entries_leave_no_atom():
    """Negative control: bond percolation at a fixed share is another law."""
    rng = np.random.default_rng(1)
    kept = np.triu(rng.random((600, 600)) < 0.3)
    w = rng.standard_normal((600, 600)) * kept
    assert kolmogorov(np.linalg.eigvalsh((w + w.T) / 600**0.5), PercolatedWigner(0.3)) > 0.2


def test_the_closed_distribution_function_is_the_integral():
    law = PercolatedWigner(0.4, 1.5)
    x = np.linspace(-4, 4, 101)
    np.testing.assert_allclose(law.cdf(x), Law.cdf(law, x), atol=1e-6)


def test_the_parameters_come_back():
    fit = PercolatedWigner.from_bulk(bulk_of(PercolatedWigner(0.3, 2.0).rvs(2000, np.random.default_rng(1))))
    assert fit.p == pytest.approx(0.3, rel=0.05)
    assert fit.scale == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("k2", "zero", "reason"), [(1, 0, "at zero"), (1, 1, "at zero"), (0, 0.5, "variance")])
def test_bulks_of_other_families_are_refused(k2, zero, reason):
    k = FreeCumulantsOf(0, k2, 0, 0)
    with pytest.raises(NoFitError, match=reason):
        PercolatedWigner.from_bulk(BulkMoments(k, k, zero))


@pytest.mark.parametrize("bad", [(0,), (1.1,), (0.5, 0), (float("nan"),)])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        PercolatedWigner(*bad)
