from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt.local_law.jackknife import jackknife


def statistic(x, function):
    return np.array([function(x.mean()), *(function(np.delete(x, i).mean()) for i in range(x.size))])


def test_of_a_mean_it_is_the_usual_error():
    x = np.random.default_rng(0).standard_normal(12)
    found = jackknife(statistic(x, lambda mean: mean))
    assert found.mean == pytest.approx(x.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(12), rel=1e-12)


def test_bias_of_a_square_is_gone_and_the_error_is_right():
    rng, z, plain, found = np.random.default_rng(0), [], [], []
    for _ in range(2000):
        x = 1 + rng.standard_normal(8)
        estimate = jackknife(statistic(x, lambda mean: mean**2))
        plain.append(x.mean() ** 2)
        found.append(estimate.mean)
        z.append((estimate.mean - 1) / estimate.stderr)
    assert np.mean(plain) == pytest.approx(1.125, abs=0.05)
    assert np.mean(found) == pytest.approx(1.0, abs=0.05)
    assert 0.9 < np.percentile(np.abs(z), 68) < 1.3


def test_refusal():
    with pytest.raises(ValueError, match="at least 2 groups, got 1"):
        jackknife(np.ones(2))
