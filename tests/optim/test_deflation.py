"""Which levels are shrunk, and by how much."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from preconditioner_cases import Matrix, spiked

from lightning_rmt.krylov.eigenpairs import top_eigenpairs
from lightning_rmt.optim.deflation import Deflation, find_deflation
from lightning_rmt.spectra.spectrum import Spectrum


def deflation_of(levels, steps=80, n=200, count=10, **settings):
    """Of a matrix with these eigenvalues over a bulk from 0.1 to 1, or of a whole matrix."""
    matrix = levels if torch.is_tensor(levels) else spiked(n, levels)[0]
    pairs = top_eigenpairs(Matrix(matrix), count, steps=steps)
    spectrum = Spectrum((pairs.run,), len(matrix), steps, 4.4e-15)
    return find_deflation(pairs.values, pairs.residuals, spectrum, **{"most": count, **settings})


def test_all_levels_above_the_gap_and_no_others():
    found = deflation_of((100.0, 60.0, -30.0))
    np.testing.assert_allclose(found.values, [100, 60, -30], rtol=1e-8)
    np.testing.assert_allclose(found.curvature, [100, 60, -30], rtol=1e-8)  # no noise: what is seen is true
    assert found.edge == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(found.factors(), found.edge / np.array([100, 60, 30]), rtol=1e-8)
    np.testing.assert_allclose(found.factors(9.0), (found.edge + 9) / np.array([109, 69, 39]), rtol=1e-8)
    assert found.reason == "level 3 is 30 times the next"


def test_factors_are_above_0_and_at_most_1():
    found = Deflation(np.array([5.0, -2.0, 1e-300]), np.array([5.0, -2.0, 1e-300]), 3.0, "")
    np.testing.assert_allclose(found.factors(), [0.6, 1, 1])
    np.testing.assert_allclose(found.factors(1e300), 1)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping must be finite and at least 0"):
            found.factors(wrong)


def test_a_matrix_of_low_rank_keeps_its_factors_above_0():
    """The bulk is exactly zero: its edge is what rounding leaves unknown."""
    matrix = spiked(200, (100.0, 60.0), bulk=(0.0, 0.0))[0]
    found = deflation_of(matrix)
    assert found.rank == 2
    assert (found.factors() > 1e-12).all()


def test_a_power_law_has_no_gap_to_deflate():
    found = deflation_of(tuple(100 * 1.3 ** -np.arange(12.0)), steps=150)
    assert found.rank == 0
    assert found.factors().shape == (0,)
    assert "no gap" in found.reason
    loose = deflation_of(tuple(100 * 1.3 ** -np.arange(12.0)), steps=150, gap=1.2)
    assert loose.rank == 10


def test_rank_is_taken_at_its_word():
    levels = (100.0, 60.0, 30.0)
    assert deflation_of(levels, rank=5).rank == 3  # no more than stand apart
    assert deflation_of(levels, rank=1).rank == 0  # 100 isn't twice 60
    assert deflation_of(levels, rank=1, gap=1.5).rank == 1
    assert deflation_of(levels, rank=2, gap=1.9).rank == 2
    assert deflation_of(levels, rank=2, gap=1.9).edge == pytest.approx(30)
    assert deflation_of((100.0, 60.0, 30.0, 20.0), most=3, gap=1.0).rank == 3


def noisy(spikes, noise, n=500, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, n)) * noise / math.sqrt(2 * n)
    Q = np.linalg.qr(rng.normal(size=(n, len(spikes))))[0]
    true = Q @ np.diag(spikes) @ Q.T
    return torch.from_numpy(true + X + X.T), true


def test_levels_within_the_noise_are_left_alone():
    """BBP: spikes of 6 and 4 are seen, one of 0.9 is under the noise of 1, whose own largest level is at 2."""
    matrix, true = noisy([6.0, 4.0, 0.9], 1.0)
    found = deflation_of(matrix, noise=1.0, gap=1.0)
    assert found.rank == 2
    assert found.edge == pytest.approx(2, rel=0.05)
    # the curvature that a step along them meets
    vectors = np.linalg.eigh(matrix.numpy())[1][:, [-1, -2]]
    np.testing.assert_allclose(found.curvature, np.sum(vectors * (true @ vectors), axis=0), rtol=0.03)
    assert (np.abs(found.curvature) < 0.97 * np.abs(found.values)).all()


def test_noise_alone_has_no_levels():
    matrix, _ = noisy([0.0], 1.0)
    found = deflation_of(matrix, noise=1.0, gap=1.0)
    assert found.rank == 0
    assert found.reason.startswith("the largest level, 2") or found.reason.startswith("the largest level, -2")
    assert "the edge of the noise, 2," in found.reason


def test_the_zero_matrix_has_none():
    found = deflation_of(torch.zeros(50, 50, dtype=torch.float64))
    assert (found.rank, found.reason) == (0, "no eigenpair was found")


def test_pairs_of_another_run_are_recognised_though_they_havent_converged():
    matrix = spiked(200, (100.0, 60.0, 30.0))[0]
    pairs = top_eigenpairs(Matrix(matrix), 3, steps=5)
    assert pairs.residuals[0] / 100 > 1e-5
    run = top_eigenpairs(Matrix(matrix), 3, steps=60, seed=5).run
    spectrum = Spectrum((run,), 200, 60, 4.4e-15)
    found = find_deflation(pairs.values, pairs.residuals, spectrum)
    assert found.rank == pairs.values.size > 0
    np.testing.assert_allclose(found.curvature, [100, 60, 30][: found.rank], rtol=1e-6)
