"""The certain bounds on a distribution function: they hold for the truth and exclude what isn't."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, spectrum_of
from measured_laws import measured

from lightning_rmt.laws.exclusion import Bounds, exclusion_z, spectrum_bounds
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner


@pytest.mark.parametrize("law", [Semicircle(2.0), MarchenkoPastur(0.5)], ids=repr)
def test_t13_the_truth_stays_inside_in_a_hundred_runs(law):
    """50 runs of each of two laws, on simulated matrices."""
    z = []
    for seed in range(50):
        spectrum = spectrum_of(law.rvs(1000, np.random.default_rng(seed)), 30, seed=seed)
        z.append(exclusion_z(law, spectrum.bulk, spectrum_bounds(spectrum)))
    assert max(z) < 5
    assert np.median(z) < 2.5


def test_t13_another_law_is_excluded():
    fit = Semicircle.fit(measured(MarchenkoPastur(0.5), 4000, 60))
    assert fit.exclusion_z > 5
    assert fit.excluded
    assert fit.word == "rejected"


def test_more_probes_exclude_by_more():
    law = Semicircle(2.0)
    z = []
    for probes in (1, 4):
        spectrum = measured(MarchenkoPastur(0.5), 1000, 30, probes)
        bounds = spectrum_bounds(spectrum)
        assert bounds.probes == probes
        z.append(exclusion_z(law, spectrum.bulk, bounds))
    assert z[1] > 1.5 * z[0]


def test_what_the_family_allows_elsewhere_does_not_exclude():
    """The fit of a sum to a Marchenko-Pastur law has a little energy and with it an edge that is too low."""
    fits = []
    for seed in range(8):
        levels = MarchenkoPastur(0.5).rvs(2000, np.random.default_rng(seed))
        try:
            fits.append(WishartPlusWigner.fit(spectrum_of(levels, 60, seed=seed)))
        except ValueError:
            continue
    assert len(fits) >= 3
    assert max(fit.exclusion_z for fit in fits) < 4


def test_errors_of_a_law_weaken_its_exclusion_like_those_of_sampling():
    spectrum = measured(Semicircle(2.0), 10000, 40)
    n, x = 10000, np.zeros(1)
    bounds = Bounds(x, np.array([0.55]), np.array([0.55]), n, 1)
    sampling = np.sqrt(2 * 0.5 * 0.5 / (n + 2))
    law = Semicircle(2.0)
    assert exclusion_z(law, spectrum.bulk, bounds) == pytest.approx(0.05 / sampling, rel=0.01)
    both = exclusion_z(law, spectrum.bulk, bounds, np.array([sampling]))
    assert both == pytest.approx(0.05 / sampling / 2**0.5, rel=0.01)
    assert exclusion_z(law, spectrum.bulk, Bounds(x, np.array([0.45]), np.array([0.55]), n, 1)) == 0


def test_outliers_and_zeros_are_put_back():
    spiked = spectrum_of(np.concatenate([goe(2000, np.random.default_rng(0)), 3 * 1.4 ** np.arange(10)]), 100)
    assert spiked.bulk.outliers.size == 10
    assert exclusion_z(Semicircle(2.0), spiked.bulk, spectrum_bounds(spiked)) < 5
    percolated = measured(PercolatedWigner(0.6), 4000, 60)
    bounds = spectrum_bounds(percolated)
    assert not percolated.bulk.is_zero(bounds.x).any()
    for law in (PercolatedWigner(0.6), Semicircle(2 * 0.6**0.5)):
        assert exclusion_z(law, percolated.bulk, bounds) < 5
    assert exclusion_z(PercolatedWigner(0.8), percolated.bulk, bounds) > 5
