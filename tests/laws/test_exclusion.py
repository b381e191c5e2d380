"""Bounds that are certain: no truth is excluded, and what is excluded is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from measured_cases import measured, quantiles, spectrum_of

from lightning_rmt.laws import MarchenkoPastur, NoFitError, Semicircle, WishartPlusWigner
from lightning_rmt.laws.exclusion import exclusion_z, spectrum_bounds


def z_of(law, spectrum):
    return exclusion_z(law, spectrum.bulk, spectrum_bounds(spectrum))


@pytest.mark.parametrize(
    "law", [Semicircle(2.0), MarchenkoPastur(0.5), MarchenkoPastur(2.0), WishartPlusWigner(0.5, 0.2)]
)
def test_the_truth_is_never_excluded(law):
    """T13: 100 probes in all, of simulated matrices where those are cheap."""
    z = []
    for seed in range(25):
        simulated = not isinstance(law, WishartPlusWigner)
        eigenvalues = law.rvs(1000, np.random.default_rng(seed)) if simulated else quantiles(law, 1000)
        z.append(z_of(law, spectrum_of(eigenvalues, 40, seed=seed)))
    assert max(z) < 5


def test_another_law_is_excluded():
    """T13: a semicircle for Marchenko-Pastur, and the other way round, of the same mean and variance."""
    spectrum = measured(MarchenkoPastur(0.5), n=2000)
    assert z_of(Semicircle(2 * 0.5**0.5, center=1.0), spectrum) > 5
    assert z_of(MarchenkoPastur(0.5), measured(Semicircle(2 * 0.5**0.5, center=1.0), n=2000)) > 5
    assert z_of(MarchenkoPastur(0.5, scale=1.3), spectrum) > 5
    # The bounds are as wide as a node is heavy, so that few steps exclude less.
    coarse = spectrum_of(MarchenkoPastur(0.5).rvs(2000, np.random.default_rng(0)), 6)
    assert z_of(Semicircle(2 * 0.5**0.5, center=1.0), coarse) < z_of(Semicircle(2 * 0.5**0.5, center=1.0), spectrum)


def test_outliers_and_zeros_are_put_back():
    bulk = MarchenkoPastur(0.5).rvs(2000, np.random.default_rng(0))
    spectrum = spectrum_of(np.concatenate([np.zeros(2991), bulk, 8 * 1.3 ** np.arange(9)]), 100)
    assert spectrum.outliers.high.count == 9
    assert z_of(MarchenkoPastur(0.5), spectrum) < 5
    assert z_of(Semicircle(2 * 0.5**0.5, center=1.0), spectrum) > 5


def test_what_parameters_leave_open_does_not_exclude():
    spectrum = measured(MarchenkoPastur(0.5), n=2000)
    wrong = MarchenkoPastur(0.5, scale=1.3)
    bounds = spectrum_bounds(spectrum)
    assert exclusion_z(wrong, spectrum.bulk, bounds, errors=np.full(bounds.x.size, 0.3)) < 5


def test_a_sum_with_little_energy_is_neither_excluded_nor_refused_for_noise():
    """Its zeros are smeared over a width that goes like the root of the energy, which cumulants hardly measure."""
    refused = []
    for seed in range(10):
        law = WishartPlusWigner((4.0, 2.0)[seed % 2], 0.005)
        spectrum = spectrum_of(law.rvs(600, np.random.default_rng(seed)), 80, seed=seed)
        try:
            fit = WishartPlusWigner.fit(spectrum)
        except NoFitError as error:
            refused.append(str(error))
            continue
        assert not fit.excluded
        if fit.parameters["energy"].mean < 2 * fit.parameters["energy"].stderr:
            assert "the energy can't be told from zero (see MarchenkoPastur)" in fit.verdict
    assert 0 < len(refused) < 8
    # two standard errors leave one in forty out
    assert sum("the energy can't be told from zero" in reason for reason in refused) >= len(refused) - 1


def test_a_wrong_law_is_excluded_in_spite_of_a_limit():
    spectrum = spectrum_of(np.concatenate([quantiles(Semicircle(1.0, c), 1000) for c in (1.0, 5.0, 5.0, 12.0)]), 100)
    assert WishartPlusWigner.fit(spectrum).excluded
