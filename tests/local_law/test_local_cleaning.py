"""Outliers of noisy matrices against their simulated eigenvectors."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, marchenko_pastur, spectrum_of
from noisy_matrices import goe_matrix, one_spike
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal
from scipy.sparse.linalg import eigsh

from lightning_rmt.local_law import clean

N = 1200
SPIKES = np.array([1.05, 1.5, 2.0, 3.0, 12.0])
DRAWS = 16


def levels_and_overlap(theta, n, rng):
    """Eigenvalues, and the top eigenvector's square along the spike."""
    diagonal, off = one_spike(theta, n, rng)
    _, vector = eigh_tridiagonal(diagonal, off, select="i", select_range=(n - 1, n - 1))
    return eigvalsh_tridiagonal(diagonal, off, lapack_driver="sterf"), float(vector[0, 0] ** 2)


@pytest.fixture(scope="module")
def transition():
    """Per spike, averaged over draws: cleaned curvature, location and overlap; true curvature and overlap."""
    rng, rows = np.random.default_rng(0), []
    for theta in SPIKES:
        draws = []
        for seed in range(DRAWS):
            levels, overlap = levels_and_overlap(theta, 1500, rng)
            cleaned = clean(levels[-1:], 1.0, spectrum_of(levels, 60, seed=seed))
            draws.append([cleaned.curvature[0], cleaned.location[0], cleaned.overlap[0], theta * overlap, overlap])
        rows.append(draws)
    return np.array(rows).transpose(2, 0, 1)


def test_curvature_and_location_near_the_transition(transition):
    """T4: within 3 % from 1.5 s on."""
    curvature, location, _, known, _ = transition.mean(axis=2)
    np.testing.assert_allclose(curvature[1:], known[1:], rtol=0.03)
    np.testing.assert_allclose(location[1:], SPIKES[1:], rtol=0.03)


def test_overlaps_of_eigenvectors(transition):
    overlap, known = transition.mean(axis=2)[[2, 4]]
    np.testing.assert_allclose(overlap[1:], known[1:], atol=0.015)
    np.testing.assert_allclose(overlap[2:], 1 - 1 / SPIKES[2:] ** 2, atol=0.01)  # Wigner's closed form


def test_a_spike_at_the_noise_is_refused(transition):
    """T4: 1.05 s isn't told from noise."""
    assert np.isnan(transition[:3, 0]).all()


def test_the_sampling_error():
    levels, _ = levels_and_overlap(2.0, 500, np.random.default_rng(0))
    found = [clean(levels[-1:], 1.0, spectrum_of(levels, 60, seed=seed)) for seed in range(50)]
    scatter = np.std([one.curvature[0] for one in found])
    assert scatter == pytest.approx(np.mean([one.error[0] for one in found]), rel=0.25)


def test_a_bulk_of_true_curvature():
    noise, spikes = 0.5, np.array([5.0, 8.0])
    truth = np.concatenate([marchenko_pastur(N - 2), spikes])
    matrix = np.diag(truth) + noise * goe_matrix(N, np.random.default_rng(3))
    values, vectors = eigsh(matrix, 8, which="LA", v0=np.ones(N))
    spectrum = spectrum_of(np.linalg.eigvalsh(matrix), 100, 4)
    cleaned = clean(values, noise, spectrum)
    assert cleaned.told.tolist() == [False] * 6 + [True] * 2  # the bulk reaches far above the noise edge
    np.testing.assert_allclose(cleaned.curvature[-2:], truth @ vectors[:, -2:] ** 2, rtol=0.02)
    np.testing.assert_allclose(cleaned.location[-2:], spikes, rtol=0.02)
    np.testing.assert_allclose(cleaned.overlap[-2:], np.diag(vectors[-2:, -2:]) ** 2, atol=0.01)
    assert (cleaned.curvature[-2:] < cleaned.location[-2:]).all()
    assert (cleaned.location[-2:] < values[-2:]).all()


def test_negative_outliers_mirror_positive_ones():
    levels = np.append(goe(1000, np.random.default_rng(0)), [3.0, 4.0])
    up, down = spectrum_of(np.sort(levels), 100), spectrum_of(np.sort(-levels), 100)
    one, other = clean([3.0, 4.0], 1.0, up), clean([-3.0, -4.0], 1.0, down)
    np.testing.assert_allclose(one.curvature, -other.curvature, rtol=0.02)
    np.testing.assert_allclose(one.overlap, other.overlap, rtol=0.02)


def test_pure_noise_has_no_outliers():
    for seed in range(20):
        levels = goe(1000, np.random.default_rng(seed))
        spectrum = spectrum_of(levels, 100, seed=seed)
        assert not clean(np.append(levels[:3], levels[-3:]), 1.0, spectrum).told.any()
        assert (
            clean(np.append(levels[:3], levels[-3:]), 0.9, spectrum).told.sum() <= 1
        )  # only the bulk refuses them then


def test_scale():
    """T6: curvature and location scale, the overlap doesn't."""
    levels = np.append(goe(500, np.random.default_rng(0)), 3.0)
    one, other = clean([3.0], 1.0, spectrum_of(levels, 60)), clean([3e-4], 1e-4, spectrum_of(levels * 1e-4, 60))
    np.testing.assert_allclose(other.curvature, 1e-4 * one.curvature, rtol=1e-6)
    np.testing.assert_allclose(other.overlap, one.overlap, rtol=1e-6)


def test_limits():
    spectrum = spectrum_of(np.append(goe(500, np.random.default_rng(0)), 5.0), 60)
    nothing = clean([], 1.0, spectrum)
    assert nothing.curvature.shape == nothing.overlap.shape == nothing.told.shape == (0,)
    exact = clean([5.0], 0.0, spectrum)
    assert (exact.curvature[0], exact.location[0], exact.overlap[0]) == (5.0, 5.0, 1.0)
    with pytest.raises(ValueError, match="1 of 2 are not finite"):
        clean([5.0, float("nan")], 1.0, spectrum)
    with pytest.raises(ValueError, match="noise must be"):
        clean([5.0], -1.0, spectrum)
    with pytest.raises(TypeError, match=r"expected a lightning_rmt\.Spectrum"):
        clean([5.0], 1.0, [1.0])
