"""The outlier map over batch sizes: synthetic outliers, and those of simulated batch matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from noisy_matrices import one_spike
from scipy.linalg import eigvalsh_tridiagonal

from lightning_rmt.local_law import outlier_batch_fit

SIZES = np.repeat([16.0, 32, 64, 128, 256, 512], 4)
THETA = np.array([3.0, 5.0, 8.0])


def outliers(sizes, theta=THETA, alpha=80.0, beta=0.5, exponent=0.5, dataset_size=math.inf, scatter=0.0, seed=0):
    """By the map, with a scatter in proportion to the noise."""
    x = sizes ** (-2 * exponent) - dataset_size ** (-2 * exponent)
    noise = (
        scatter * np.sqrt(alpha * x)[:, None] * np.random.default_rng(seed).standard_normal((sizes.size, theta.size))
    )
    return theta + x[:, None] * alpha * (1 / theta + beta / theta**2) + noise


def test_exact_outliers_give_exact_parameters():
    fit = outlier_batch_fit(SIZES, outliers(SIZES, dataset_size=2000), 2000, sample_noise=4.0)
    np.testing.assert_allclose([one.mean for one in fit.theta], THETA, rtol=1e-6)
    assert fit.alpha.mean == pytest.approx(80, rel=1e-5)
    assert fit.beta.mean == pytest.approx(0.5, rel=1e-4)
    assert fit.exponent.mean == pytest.approx(0.5, rel=1e-5)
    assert fit.r_squared == pytest.approx(1)
    assert fit.anisotropy.mean == pytest.approx(5, rel=1e-5)
    np.testing.assert_allclose(fit.predict(SIZES), outliers(SIZES, dataset_size=2000), rtol=1e-6)


def test_errors_are_those_of_repeated_measurements():
    fits = [outlier_batch_fit(SIZES, outliers(SIZES, scatter=0.1, seed=seed)) for seed in range(20)]
    for read, truth in (
        (lambda f: f.theta[0], 3.0),
        (lambda f: f.theta[2], 8.0),
        (lambda f: f.alpha, 80.0),
        (lambda f: f.beta, 0.5),
        (lambda f: f.exponent, 0.5),
    ):
        means = np.array([read(fit).mean for fit in fits])
        errors = np.array([read(fit).stderr for fit in fits])
        assert np.abs(means.mean() - truth) < 3.5 * means.std() / 20**0.5
        assert np.median(errors) == pytest.approx(means.std(), rel=0.5)


@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.8])
def test_the_free_exponent(exponent):
    fit = outlier_batch_fit(SIZES, outliers(SIZES, exponent=exponent, scatter=0.01))
    assert fit.exponent.mean == pytest.approx(exponent, abs=0.02)
    assert (fit.r_squared > 0.99) == (exponent == 0.5)


def test_negative_outliers_and_a_single_one():
    fit = outlier_batch_fit(SIZES, -outliers(SIZES))
    np.testing.assert_allclose([one.mean for one in fit.theta], -THETA, rtol=1e-6)
    assert (fit.alpha.mean, fit.beta.mean) == pytest.approx((80, -0.5), rel=1e-4)
    single = outlier_batch_fit(SIZES, outliers(SIZES, beta=0.0)[:, :1])
    assert single.theta[0].mean == pytest.approx(3, rel=1e-6)
    assert single.alpha.mean == pytest.approx(80, rel=1e-6)
    assert (single.beta.mean, single.beta.stderr) == (0, 0)
    assert single.anisotropy is None


def test_scale():
    """T6."""
    levels = outliers(SIZES, scatter=0.05)
    one, other = outlier_batch_fit(SIZES, levels), outlier_batch_fit(SIZES, 1e-5 * levels)
    assert other.theta[1].mean == pytest.approx(1e-5 * one.theta[1].mean, rel=1e-6)
    assert other.alpha.mean == pytest.approx(1e-10 * one.alpha.mean, rel=1e-4)
    assert other.beta.stderr == pytest.approx(1e-5 * one.beta.stderr, rel=1e-2)
    assert other.exponent.mean == pytest.approx(one.exponent.mean, rel=1e-5)


def test_simulated_batch_matrices():
    """Noise of scale ``sigma sqrt(1/b - 1/N)``: theta within 1 %, alpha within 10 %, the exponent within .05."""
    n, theta, sigma, dataset, rng = 3000, np.array([6.0, 3.0]), 8.0, 4000, np.random.default_rng(0)
    sizes = np.repeat([32.0, 64, 128, 256, 1024], 8)
    rows = []
    for size in sizes:
        scale = sigma * (1 / size - 1 / dataset) ** 0.5
        matrices = [one_spike(one / scale, n, rng) for one in theta]
        rows.append([scale * eigvalsh_tridiagonal(*m, select="i", select_range=(n - 1, n - 1))[0] for m in matrices])
    fit = outlier_batch_fit(sizes, rows, dataset, sample_noise=sigma, bulk_mean=0.0)
    np.testing.assert_allclose([one.mean for one in fit.theta], theta, rtol=0.01)
    assert fit.alpha.mean == pytest.approx(sigma**2, rel=0.1)
    assert fit.anisotropy.mean == pytest.approx(1, abs=0.1)
    assert fit.exponent.mean == pytest.approx(0.5, abs=0.05)
    assert fit.r_squared > 0.9
    free = outlier_batch_fit(sizes, rows, dataset)
    assert abs(free.alpha.mean - sigma**2) < 3 * free.alpha.stderr
    assert free.alpha.stderr > 3 * fit.alpha.stderr


def test_few_rows_have_no_error_and_flat_ones_no_r_squared():
    fit = outlier_batch_fit([16, 32, 64], outliers(np.array([16.0, 32, 64])))
    assert np.isnan(fit.alpha.stderr)
    assert fit.alpha.mean == pytest.approx(80, rel=1e-4)
    flat = outlier_batch_fit(SIZES, np.full((SIZES.size, 1), 3.0))
    assert (flat.theta[0].mean, flat.alpha.mean) == pytest.approx((3, 0))
    assert np.isnan(flat.r_squared)


def test_refusals():
    levels = outliers(SIZES)
    for sizes, values in ((SIZES[1:], levels), (SIZES, levels[:, 0]), (SIZES, levels[:, :0])):
        with pytest.raises(ValueError, match="one batch size per row of eigenvalues"):
            outlier_batch_fit(sizes, values)
    bad = levels.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite; leave out batches"):
        outlier_batch_fit(SIZES, bad)
    with pytest.raises(ValueError, match="got 16 to 512 and 500"):
        outlier_batch_fit(SIZES, levels, 500)
    with pytest.raises(ValueError, match="needs 3 distinct batch sizes, got 2"):
        outlier_batch_fit([16, 16, 32], levels[:3])
    with pytest.raises(ValueError, match="has the same sign"):
        outlier_batch_fit(SIZES, levels - 4)
    with pytest.raises(ValueError, match="bulk_mean must be a finite number"):
        outlier_batch_fit(SIZES, levels, bulk_mean=np.nan)
    with pytest.raises(ValueError, match="sample_noise must be finite and above 0"):
        outlier_batch_fit(SIZES, levels, sample_noise=0.0)
