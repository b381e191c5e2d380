"""Cleaning of Kronecker factors against the truth along their own eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt.local_law import MovingAverageWeights, clean_weighted
from lightning_rmt.local_law.weighted import _ascending, _transform


def power(size, exponent=1.0):
    return np.arange(1, size + 1.0) ** -exponent


def spikes(size):
    return np.append([50.0, 30.0, 20.0], np.ones(size - 3))


def factor(rows, columns, beta, steps, seed=0):
    """Moving average of ``G G'``: its eigenvalues, and the truth along its eigenvectors."""
    rng, left = np.random.default_rng(seed), rows / rows.mean()
    ages = (1 - beta) * beta ** np.arange(steps) / (1 - beta**steps)
    root = np.sqrt(columns / columns.sum())
    total = np.zeros((rows.size, rows.size))
    for weight in ages:
        g = np.sqrt(left)[:, None] * rng.standard_normal((rows.size, columns.size)) * root
        total += weight * g @ g.T
    levels, vectors = np.linalg.eigh(total)
    return levels.clip(0), left @ vectors**2


def regret(values, truth):
    """Of the preconditioner ``values^-1/2``, in units of the best one's in the same basis."""
    power = values**-0.5
    return np.sum(power * truth + 1 / power) / (2 * np.sum(truth**0.5))


@pytest.mark.parametrize(
    ("rows", "columns", "beta", "steps", "samples"),
    [
        (power(64), power(64), 0.95, 120, 536),
        (power(128), power(16), 0.95, 120, 280),
        (spikes(64), power(64, 2), 0.9, 60, 46),
        (power(160), power(160, 2), 0.9, 50, 47),
        (power(320), power(320, 2), 0.95, 3, 7.4),
    ],
)
def test_cleaned_factors_are_as_good_as_the_truth(rows, columns, beta, steps, samples):
    """K1: regret within 2 % of the oracle's, raw eigenvalues at q >= 1 at least 8 % away."""
    levels, truth = factor(rows, columns, beta, steps)
    weights = MovingAverageWeights(beta, steps, columns)
    assert weights.effective == pytest.approx(samples, rel=0.02)
    cleaned = clean_weighted(levels, weights)
    assert regret(cleaned, truth) < 1.02
    assert np.median(np.abs(np.log(cleaned / truth))) < 0.1
    if rows.size > samples:
        assert regret(levels, truth) > 1.08


def test_equal_weights_are_ledoit_and_peches():
    """K1: ``l / |1 - q - q l m|^2`` with the same transform."""
    n, samples = 150, 300
    x = np.sqrt(power(n, 0.5))[:, None] * np.random.default_rng(0).standard_normal((n, samples))
    levels = np.linalg.eigvalsh(x @ x.T / samples)
    q, m = n / samples, _transform(levels, 0, samples)
    known = levels / np.abs(1 - q - q * levels * m) ** 2
    cleaned = clean_weighted(levels, np.full(samples, 1 / samples))
    assert (np.diff(cleaned) >= 0).all()
    np.testing.assert_allclose(cleaned, _ascending(known), rtol=1e-4)


def test_the_closed_form_is_the_sum():
    columns = power(16)
    levels, _ = factor(power(48), columns, 0.9, 40)
    ages = 0.1 * 0.9 ** np.arange(40) / (1 - 0.9**40)
    by_hand = clean_weighted(levels, np.outer(ages, columns / columns.sum()).ravel())
    np.testing.assert_allclose(clean_weighted(levels, MovingAverageWeights(0.9, 40, columns)), by_hand, rtol=0.005)


def test_zero_eigenvalues_of_too_few_columns():
    """More rows than columns: what is hidden in the zeros comes back."""
    n, samples = 200, 80
    truth = np.linspace(0.5, 2, n)
    x = np.sqrt(truth)[:, None] * np.random.default_rng(0).standard_normal((n, samples))
    levels, vectors = np.linalg.eigh(x @ x.T / samples)
    levels = np.where(levels < 1e-10, 0, levels)
    known = truth @ vectors**2
    cleaned = clean_weighted(levels, np.full(samples, 1 / samples))
    assert cleaned[0] == pytest.approx(known[: n - samples].mean(), rel=0.02)
    assert np.median(np.abs(np.log(cleaned / known))) < 0.1
    one_by_one = MovingAverageWeights(0.999999, samples, [1.0])
    np.testing.assert_allclose(clean_weighted(levels, one_by_one), cleaned, rtol=0.005)


def test_order_and_scale():
    """K2: 1e+-6 times the factor and the result."""
    levels, _ = factor(power(64), power(64), 0.95, 60)
    weights = MovingAverageWeights(0.95, 60, power(64))
    cleaned = clean_weighted(levels, weights)
    for scale in (1e-6, 1e6):
        np.testing.assert_allclose(clean_weighted(scale * levels, weights), scale * cleaned, rtol=1e-9)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_allclose(clean_weighted(levels[order], weights), cleaned[order], rtol=1e-12)
    rescaled = MovingAverageWeights(0.95, 60, 100 * power(64))
    np.testing.assert_allclose(clean_weighted(levels, rescaled), cleaned, rtol=1e-12)


def test_many_columns_are_no_noise():
    levels = power(20)
    np.testing.assert_allclose(
        clean_weighted(levels, MovingAverageWeights(1 - 1e-9, 10**10, np.ones(64))), levels, rtol=1e-3
    )


def test_refusals():
    for bad in ([], [-1.0, 1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="the eigenvalues of a covariance"):
            clean_weighted(bad, [1.0])
    with pytest.raises(ValueError, match="not finite"):
        clean_weighted([float("nan")], [1.0])
    for weights in ([], [0.5, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="weights of columns must be above 0"):
            clean_weighted([1.0, 2.0], weights)
    with pytest.raises(ValueError, match=r"2 of 3 eigenvalues are zero, though 2 columns leave 1"):
        clean_weighted([0.0, 0.0, 1.0], [0.5, 0.5])
    for arguments in ((1.0, 3, [1.0]), (0.9, 0, [1.0]), (0.9, 3, []), (0.9, 3, [0.0]), (0.9, 3, [-1.0, 2.0])):
        with pytest.raises(ValueError, match="a moving average has"):
            MovingAverageWeights(*arguments)


@pytest.mark.parametrize("exponent", [4, 6])
def test_spectra_over_many_decades(exponent):
    """Small eigenvalues are far away in units of their own bandwidth; large numbers cancel there."""
    levels, truth = factor(power(64, exponent), power(32), 0.95, 60)
    cleaned = clean_weighted(levels, MovingAverageWeights(0.95, 60, power(32)))
    assert levels[-1] / levels[0] > 10**exponent
    assert np.abs(np.log(cleaned / truth)).max() < 0.3
    assert np.median(np.abs(np.log(cleaned / truth))) < 0.5 * np.median(np.abs(np.log(levels / truth)))
