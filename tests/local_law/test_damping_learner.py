"""The published damping learner, step by step."""

from __future__ import annotations

import numpy as np
import pytest
from noisy_matrices import goe_matrix

from lightning_rmt.local_law import DampingLearner, curvature_variance


def test_the_sequence_of_dampings():
    variances, minimum = [0.5, 0.1, 0.0, 2.0], 0.01
    by_hand, learner = None, DampingLearner(minimum)
    assert learner.learning_rate_factor == 1
    for variance in variances:
        by_hand = minimum + variance if by_hand is None else 0.7 * by_hand + 0.3 * (minimum + variance)
        learner = learner.update(variance)
        assert learner.damping == pytest.approx(by_hand, rel=1e-14)
        assert learner.learning_rate_factor == pytest.approx(1 + by_hand, rel=1e-14)


def test_the_variance_is_that_of_the_noise():
    n, batches, rng = 600, 12, np.random.default_rng(0)
    z = rng.standard_normal(n)
    z /= np.linalg.norm(z)
    truth = np.linspace(0, 5, n)
    products = [truth * z + 0.5 * goe_matrix(n, rng) @ z for _ in range(batches)]
    # s^2, and the published rule's factor for 12 batches; one probe has a relative error of some 2 %
    assert curvature_variance(products) == pytest.approx(0.5**2 * (batches - 1) / batches, rel=0.08)
    squares = np.mean(np.sum(np.square(products), axis=1)) - np.sum(np.mean(products, axis=0) ** 2)
    assert curvature_variance(products) == pytest.approx(squares, rel=1e-12)


def test_it_does_not_scale():
    """T6 fails for it, as published: c times the curvature makes c squared times the damping."""
    products = np.random.default_rng(0).standard_normal((4, 10))
    one = DampingLearner(0.0).update(curvature_variance(products))
    other = DampingLearner(0.0).update(curvature_variance(10 * products))
    assert other.damping == pytest.approx(100 * one.damping)


def test_equal_batches_have_no_variance():
    assert curvature_variance(np.tile(1e8 * np.arange(5.0), (3, 1))) == 0


def test_refusals():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="minimum must be finite"):
            DampingLearner(bad)
        with pytest.raises(ValueError, match="damping must be finite"):
            DampingLearner(0.1, bad)
        with pytest.raises(ValueError, match="variance must be finite"):
            DampingLearner(0.1).update(bad)
    with pytest.raises(ValueError, match="keep is a share"):
        DampingLearner(0.1, keep=1.5)
    for shape in ((5,), (1, 5)):
        with pytest.raises(ValueError, match="at least two batches"):
            curvature_variance(np.ones(shape))
    with pytest.raises(ValueError, match="must be finite; a NaN"):
        curvature_variance([[1.0, np.nan], [1.0, 2.0]])
