from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_rmt.krylov.eigenpairs import ACCEPTED_RESIDUAL, EigenPairs, top_eigenpairs


class Dense:
    def __init__(self, matrix, dtype=torch.float64):
        self.matrix = torch.as_tensor(np.asarray(matrix), dtype=dtype)
        self.size, self.dtype, self.device = len(self.matrix), dtype, torch.device("cpu")
        self.products = 0

    def matmat(self, V):
        self.products += len(V)
        return V @ self.matrix


def symmetric(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return Q @ np.diag(values) @ Q.T


LEVELS = np.concatenate([[40.0, -30.0, 20.0, 12.0, -9.0], np.linspace(-1, 1, 295)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_the_pairs_are_those_of_the_dense_matrix(dtype, tolerance):
    matrix = symmetric(LEVELS)
    pairs = top_eigenpairs(Dense(matrix, dtype), 5, steps=40)
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(-np.abs(values))[:5]
    np.testing.assert_allclose(pairs.values, values[order], rtol=tolerance)
    cosines = np.abs(np.sum(pairs.vectors.double().numpy() * vectors[:, order].T, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=tolerance)
    gram = pairs.vectors.double() @ pairs.vectors.double().T
    assert (gram - torch.eye(5)).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residuals_are_certificates(dtype):
    matrix = symmetric(LEVELS)
    pairs = top_eigenpairs(Dense(matrix, dtype), 5, steps=7)  # too few to converge
    V = pairs.vectors.double().numpy()
    true = np.linalg.norm(V @ matrix - pairs.values[:, None] * V, axis=1)
    assert len(true) == 5
    assert (true <= pairs.residuals * (1 + 1e-9)).all()
    assert (pairs.residuals <= ACCEPTED_RESIDUAL * np.abs(pairs.values)).all()
    assert pairs.residuals.max() > 1e-3  # a loose one is among them: the comparison was one
    nearest = np.abs(pairs.values[:, None] - LEVELS[None]).min(1)
    assert (nearest <= pairs.residuals).all()


def test_a_pair_that_says_little_is_left_out_with_all_behind_it():
    few = top_eigenpairs(Dense(symmetric(np.linspace(-1, 1, 300))), 10, steps=10)
    assert few.values.size < 8
    many = top_eigenpairs(Dense(symmetric(np.linspace(-1, 1, 300))), 10, steps=200)
    assert many.values.size == 10


def test_low_rank_ends_early_with_what_there_is():
    operator = Dense(symmetric(np.concatenate([[5.0, -3.0], np.zeros(298)])))
    pairs = top_eigenpairs(operator, 10, steps=100)
    np.testing.assert_allclose(pairs.values, [5, -3])
    assert operator.products < 20


def test_the_run_is_a_probe_of_the_whole_spectrum():
    operator = Dense(symmetric(LEVELS))
    pairs = top_eigenpairs(operator, 5)
    assert operator.products == 20
    assert pairs.run.nodes[-1] == pairs.values[0]
    second_moment = float(pairs.run.weights @ pairs.run.nodes**2)
    assert abs(second_moment / np.mean(LEVELS**2) - 1) < 1


def test_the_zero_matrix_has_no_pairs():
    pairs = top_eigenpairs(Dense(np.zeros((20, 20))), 3)
    assert pairs.vectors.shape == (0, 20)


def test_wrong_arguments_are_explained():
    operator = Dense(np.eye(3))
    with pytest.raises(ValueError, match="count must be at least 1"):
        top_eigenpairs(operator, 0)
    with pytest.raises(ValueError, match="at least as many Lanczos steps"):
        top_eigenpairs(operator, 3, steps=2)
    with pytest.raises(ValueError, match="one row for each value"):
        EigenPairs(np.ones(2), torch.eye(3), np.zeros(2))
    with pytest.raises(ValueError, match="got shapes"):
        EigenPairs(np.ones(2), torch.eye(2), np.zeros(3))
    with pytest.raises(ValueError, match="sort them"):
        EigenPairs(np.array([1.0, -2.0]), torch.eye(2), np.zeros(2))
    with pytest.raises(ValueError, match="not finite"):
        EigenPairs(np.array([np.nan, 1.0]), torch.eye(2), np.zeros(2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        top_eigenpairs(Dense(np.full((5, 5), np.nan)), 2)
