"""Errors of the outlier map where batches share samples: they are those of repeated measurements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lightning_rmt.local_law import BatchLaw, outlier_batch_fit
from lightning_rmt.local_law.batch_law import tells_exponent
from lightning_rmt.spectra.moments import Estimate

THETA, ALPHA, UNIT, GROUPS = 5.0, 80.0, 8, 4


def nested(seed, scatter=6.0, moved=0.5, exponent=0.5):
    """Four groups whole, in halves, in quarters: what a sample adds to its batch is the same at every size."""
    rng, rows = np.random.default_rng(seed), []
    for group in range(GROUPS):
        own = rng.normal(0, scatter, 4 * UNIT)
        for parts in (1, 2, 4):
            for samples in np.split(own, parts):
                x = samples.size ** (-2 * exponent)
                rows.append(
                    (samples.size, group, THETA + x * ALPHA / THETA + samples.mean() + moved * x * rng.normal())
                )
    sizes, groups, levels = np.array(rows).T
    return sizes, groups, levels[:, None]


def test_the_jackknife_over_groups_gives_the_errors_of_repeated_measurements():
    fits = [
        outlier_batch_fit(sizes, levels, bulk_mean=0.0, groups=groups)
        for sizes, groups, levels in map(nested, range(60))
    ]
    for read, truth in ((lambda f: f.theta[0], THETA), (lambda f: f.alpha, ALPHA)):
        means, errors = np.array([(read(fit).mean, read(fit).stderr) for fit in fits]).T
        assert abs(means.mean() - truth) < 3.5 * means.std() / 60**0.5
        assert np.mean(errors**2) ** 0.5 == pytest.approx(means.std(), rel=0.25)
    # what all sizes have in common moves theta, not alpha; rows on their own see it in both
    sizes, _, levels = nested(0)
    assert outlier_batch_fit(sizes, levels, bulk_mean=0.0).alpha.stderr > 2 * fits[0].alpha.stderr
    r_squared = np.array([fit.r_squared for fit in fits])
    assert r_squared.min() > 0.9  # of the means, whatever single batches scatter
    assert np.mean([fit.r_squared_stderr for fit in fits]) < 0.1


def test_an_exponent_that_nothing_tells_is_at_an_end():
    sizes, groups, levels = nested(0, scatter=0.0, moved=0.0)
    exact = outlier_batch_fit(sizes, levels, bulk_mean=0.0, groups=groups)
    assert exact.exponent.mean == pytest.approx(0.5, rel=1e-4)
    assert tells_exponent(exact)
    upwards = 4.0 + 0.05 * np.log(sizes)[:, None]  # a logarithm is no power
    assert not tells_exponent(outlier_batch_fit(sizes, upwards, bulk_mean=0.0, groups=groups))


def test_the_anisotropy_has_the_noise_scales_error():
    sizes, groups, levels = nested(0, scatter=0.0, moved=0.0)
    fit = outlier_batch_fit(sizes, levels, bulk_mean=0.0, groups=groups, sample_noise=4.0, sample_noise_stderr=0.2)
    assert fit.anisotropy.mean == pytest.approx(5)
    assert fit.anisotropy.stderr == pytest.approx(5 * 2 * 0.2 / 4.0, rel=1e-3)


def test_groups_are_one_per_row():
    sizes, groups, levels = nested(0)
    with pytest.raises(ValueError, match="one group per row"):
        outlier_batch_fit(sizes, levels, groups=groups[1:])


NOISE = Estimate(4.0, 0.2)


def law(noise=NOISE):
    sizes, groups, levels = nested(0)
    return BatchLaw(sizes, np.hstack([levels, levels / 2]), groups.astype(np.int64), 4000.0, 0.1, noise, 75.0)


def test_a_measured_law_is_plain_values_and_back():
    measured = law()
    back = BatchLaw.from_dict(json.loads(json.dumps(measured.to_dict())))
    assert back.fits == measured.fits
    assert back.products == 75.0
    assert BatchLaw.from_dict(json.loads(json.dumps(law(None).to_dict()))).fits[0].anisotropy is None


def test_means_and_the_isotropic_prediction():
    measured = law()
    sizes, means, errors = measured.means()
    assert sizes.tolist() == [8, 16, 32]
    rows = measured.batch_sizes == 16
    np.testing.assert_allclose(means[1], measured.eigenvalues[rows].mean(axis=0))
    groups = [measured.eigenvalues[rows & (measured.groups == g), 0].mean() for g in range(GROUPS)]
    assert errors[1, 0] == pytest.approx(np.std(groups, ddof=1) / 2)
    theta = measured.fits[0].theta[0].mean
    x = 1 / 16 - 1 / 4000
    assert measured.isotropic(0, 16)[0] == pytest.approx(theta + x * 16 * (1 / theta + 0.1 / theta**2))
    assert law(None).isotropic(0, 16) is None
    assert math.isclose(measured.fits[1].theta[0].mean, theta / 2, rel_tol=0.05)
