"""A few entries per row: atom, moments and simulated levels."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_levels import bulk_of, kolmogorov, mass_error

from lightning_rmt.laws import Law, Semicircle, SparseWigner
from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError

ATOMS = [(0.5, 0.6544), (1.0, 0.4559), (2.0, 0.2161), (3.0, 0.0723), (5.0, 0.0074)]


@pytest.mark.parametrize(("degree", "atom"), ATOMS)
def test_a_simulated_matrix_has_the_law(degree, atom):
    law = SparseWigner(degree, 2.0)
    assert law.atom == pytest.approx(atom, abs=5e-5)
    rng = np.random.default_rng(0)
    levels = law.rvs(2000, rng)
    # one matrix of size 2000 has an atom off by 0.005 or 0.01; the mean over ten of size 1000 is the check
    assert np.mean([law.rvs(1000, rng) == 0 for _ in range(10)]) == pytest.approx(atom, abs=0.006)
    assert kolmogorov(levels, law) < 0.02
    assert kolmogorov(levels, Semicircle(4.0)) > 0.03  # negative control: the dense law


def test_entries_drawn_one_by_one_have_the_law():
    """The entries as the docstring has them, their number drawn too."""
    rng = np.random.default_rng(1)
    n, degree = 1500, 2.0
    w = np.triu(rng.standard_normal((n, n)) * (rng.random((n, n)) < degree / n), 1) / degree**0.5
    levels = np.linalg.eigvalsh(w + w.T)
    levels[np.abs(levels) < 1e-12] = 0
    assert kolmogorov(levels, SparseWigner(degree)) < 0.03


@pytest.mark.parametrize("degree", [0.05, 1.0, 2.718, 20.0])
def test_the_smoothed_density_has_the_mass_and_the_moments(degree):
    law = SparseWigner(degree, 2.0)
    assert abs(mass_error(law)) < 1e-5
    assert law.moment(3) == 0
    assert law.moment(2) == 4
    assert law.moment(4) == pytest.approx(16 * (2 + 3 / degree))
    assert Law.moment(law, 2) == pytest.approx(law.moment(2), rel=0.03)
    assert Law.moment(law, 4) == pytest.approx(law.moment(4), rel=0.08)
    assert law.moment(6) == Law.moment(law, 6)
    assert np.isfinite(law.density([0.0])).all()


def test_many_entries_make_a_semicircle():
    law, circle = SparseWigner(100.0), Semicircle(2.0)
    x = np.linspace(-2.5, 2.5, 101)
    assert np.abs(law.cdf(x) - circle.cdf(x)).max() < 0.01
    assert law.atom < 1e-12


def test_the_law_is_the_same_every_time():
    from lightning_rmt.laws.sparse_wigner import _smoothed

    first = SparseWigner(1.5).density([0.1, 1.0])
    _smoothed.cache_clear()
    np.testing.assert_array_equal(SparseWigner(1.5).density([0.1, 1.0]), first)


@pytest.mark.parametrize("degree", [1.0, 2.0, 5.0])
def test_the_parameters_come_back(degree):
    """From the mean over 32 matrices: the degree of one of size 2000 comes back within 15 % only."""
    rng = np.random.default_rng(0)
    levels = np.concatenate([SparseWigner(degree, 2.0).rvs(1000, rng) for _ in range(32)])
    fit = SparseWigner.from_bulk(bulk_of(levels))
    assert fit.degree == pytest.approx(degree, rel=0.05)
    assert fit.scale == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("k4", "zero", "reason"), [(0.01, 0, "kurtosis"), (-1, 0, "kurtosis"), (3.0, 0, "mass 0.456")])
def test_bulks_of_other_families_are_refused(k4, zero, reason):
    k = FreeCumulantsOf(0, 1, 0, k4)
    with pytest.raises(NoFitError, match=reason):
        SparseWigner.from_bulk(BulkMoments(k, k, zero))


@pytest.mark.parametrize("bad", [(0,), (101,), (1, 0), (float("nan"),)])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        SparseWigner(*bad)
