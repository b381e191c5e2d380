"""Noise of few samples in a covariance, against simulated ones and closed forms of Marchenko and Pastur."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import spectrum_of, wishart
from noisy_matrices import covariance, true_curvature
from scipy.optimize import brentq

from lightning_rmt.local_law import NoDampingError, ggn_clean, ggn_damping_for, ggn_effective_damping

N = 800


@pytest.mark.parametrize("kind", ["spikes", "power"])
@pytest.mark.parametrize("samples", [400, 800, 3200])
@pytest.mark.parametrize("damping", [0.03, 0.3, 3.0])
def test_effective_damping_is_that_of_simulated_covariances(kind, samples, damping):
    noisy = covariance(kind, samples, N)
    trace = damping * np.mean(1 / (noisy.levels + damping))  # d (S + d)^-1 = k (C + k)^-1
    known = brentq(lambda k: k * np.mean(1 / (noisy.truth + k)) - trace, 1e-9, 1e4)
    found = ggn_effective_damping(damping, samples, noisy.spectrum)
    assert found == pytest.approx(known, rel=0.03)  # the probes' sampling, mostly
    assert found > damping
    assert ggn_damping_for(found, samples, noisy.spectrum) == pytest.approx(damping, rel=1e-8)


def test_white_covariance_by_its_closed_form():
    """``d = k (1 - q / (1 + k))`` for the identity."""
    spectrum = spectrum_of(wishart(4000, np.random.default_rng(0)), 60)
    for k in (0.1, 1.0, 10.0):
        assert ggn_effective_damping(k * (1 - 0.5 / (1 + k)), 8000, spectrum) == pytest.approx(k, rel=0.01)


def test_outliers_by_their_closed_form():
    """Ledoit and Peche with a white bulk: spike 3, ratio 1/2 (Baik and Silverstein 2006)."""
    n, theta, q, rng = 1000, 3.0, 0.5, np.random.default_rng(0)
    rows = []
    for seed in range(8):
        x = rng.standard_normal((n, 2 * n))
        x[0] *= theta**0.5
        levels, vectors = np.linalg.eigh(x @ x.T / (2 * n))
        cleaned = ggn_clean([levels[-1]], 2 * n, spectrum_of(levels, 60, seed=seed))
        overlap = vectors[0, -1] ** 2
        rows.append([cleaned.location[0], cleaned.curvature[0], cleaned.overlap[0], 1 + (theta - 1) * overlap, overlap])
    location, curvature, overlap, known, known_overlap = np.mean(rows, axis=0)
    assert location == pytest.approx(theta, rel=0.02)
    assert curvature == pytest.approx(known, rel=0.03)
    assert overlap == pytest.approx(known_overlap, abs=0.02)
    assert overlap == pytest.approx((1 - q / (theta - 1) ** 2) / (1 + q / (theta - 1)), abs=0.02)


def test_the_bulk_is_refused_and_nothing_is_no_outlier():
    levels = wishart(800, np.random.default_rng(0))
    spectrum = spectrum_of(levels, 80)
    assert not ggn_clean(levels[-4:], 1600, spectrum).told.any()
    assert not ggn_clean([-1.0], 1600, spectrum).told.any()
    assert ggn_clean([], 1600, spectrum).curvature.shape == (0,)


def test_scale():
    """T6."""
    noisy = covariance("spikes", 800, N)
    scaled = spectrum_of(noisy.levels * 1e-4, 100, 4)
    one = ggn_effective_damping(0.3, 800, noisy.spectrum)
    assert ggn_effective_damping(0.3e-4, 800, scaled) == pytest.approx(1e-4 * one, rel=1e-6)
    tops = noisy.levels[-2:]
    np.testing.assert_allclose(
        ggn_clean(tops * 1e-4, 800, scaled).curvature, 1e-4 * ggn_clean(tops, 800, noisy.spectrum).curvature, rtol=1e-6
    )


def test_every_outlier_takes_a_direction():
    levels = true_curvature("spikes", 300)
    spectrum = spectrum_of(levels, 80, 32)  # with 8 start vectors their sampling is 2.5 %
    assert spectrum.outliers.high.count >= 5
    known = 1 - np.sum(levels / (levels + 1)) / 100
    assert ggn_effective_damping(1.0, 100, spectrum) == pytest.approx(1 / known, rel=0.03)


def test_many_samples_are_no_noise():
    spectrum = spectrum_of(true_curvature("spikes", 300), 60)
    assert ggn_effective_damping(0.2, 1e12, spectrum) == pytest.approx(0.2)
    assert ggn_damping_for(0.2, 1e12, spectrum) == pytest.approx(0.2)
    exact = ggn_clean([30.0], 1e12, spectrum)
    assert (exact.curvature[0], exact.overlap[0]) == pytest.approx((30.0, 1.0))


def test_refusals():
    spectrum = spectrum_of(true_curvature("spikes", 300), 60)
    with pytest.raises(NoDampingError, match="100 samples have no more than that"):
        ggn_effective_damping(1e-3, 100, spectrum)
    deficient = covariance("spikes", 400, N).spectrum
    with pytest.raises(NoDampingError, match="no damping amounts to 1e-05"):
        ggn_damping_for(1e-5, 400, deficient)
    with pytest.raises(ValueError, match=r"reaches down to -0\.9.*for a Hessian use effective_damping"):
        ggn_effective_damping(0.1, 1000, spectrum_of(np.linspace(-1, 2, 100), 30))
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="samples must be finite and above 0"):
            ggn_effective_damping(0.1, bad, spectrum)
        with pytest.raises(ValueError, match="damping must be finite and above 0"):
            ggn_effective_damping(bad, 100, spectrum)
        with pytest.raises(ValueError, match="effective must be finite and above 0"):
            ggn_damping_for(bad, 100, spectrum)
    with pytest.raises(ValueError, match="not finite"):
        ggn_clean([float("nan")], 100, spectrum)
    with pytest.raises(TypeError, match=r"lightning_rmt\.Spectrum"):
        ggn_effective_damping(0.1, 100, [1.0])
