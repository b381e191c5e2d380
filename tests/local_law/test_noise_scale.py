"""The noise of two half batches against noise that was put in, and against all batches of real data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_rmt import Hessian
from lightning_rmt.local_law import NoiseScale, noise_edge, noise_scale

N = 800


class Dense:
    def __init__(self, matrix, samples=None):
        self.matrix = torch.as_tensor(matrix)
        self.size, self.device, self.dtype = len(matrix), torch.device("cpu"), torch.float64
        if samples is not None:
            self.samples = samples

    def matmat(self, V):
        return V @ self.matrix


def goe(n, s, rng):
    x = rng.standard_normal((n, n))
    return s * (x + x.T) / np.sqrt(2 * n)


@pytest.mark.parametrize("s", [0.1, 3.0])
def test_the_scale_that_was_put_in(s):
    rng = np.random.default_rng(0)
    truth = np.diag(np.linspace(0, 1, N))
    seen = [noise_scale(Dense(truth + goe(N, s, rng)), Dense(truth + goe(N, s, rng)), 4, seed) for seed in range(4)]
    for found in seen:
        assert found.mean == pytest.approx(s, rel=0.08)
        assert 0 < found.stderr < 0.08 * s
        assert found.edge == noise_edge(found.mean)
        assert found.products == 4
        assert found.anisotropy is None
    assert np.mean([found.mean for found in seen]) == pytest.approx(s, rel=0.04)


def test_the_standard_error_is_that_of_repeats():
    """A noise with a few large directions, so that the random vectors' sampling is what there is."""
    rng = np.random.default_rng(1)
    noise = np.diag(np.r_[np.full(12, 10.0), np.full(N - 12, 0.2)]) * rng.choice([-1, 1], N)
    seen = [noise_scale(Dense(noise), Dense(np.zeros((N, N))), 8, seed) for seed in range(60)]
    spread = np.std([found.mean for found in seen])
    assert np.mean([found.stderr for found in seen]) == pytest.approx(spread, rel=0.35)
    assert noise_scale(Dense(noise), Dense(np.zeros((N, N))), 1).stderr is None


@pytest.mark.parametrize(("kind", "least"), [("goe", 0.90), ("few", 0.70), ("steep", 0.65)])
def test_the_truth_is_within_two_standard_errors(kind, least):
    """With the two vectors of a live probe, for one noise matrix; measured .95, .82 and .76 of 400.

    Diagonal matrices would flatter it.
    """
    n, rng, hits = 200, np.random.default_rng(5), []
    levels = 1 / np.arange(1, n + 1) if kind == "steep" else np.r_[np.full(8, 10.0), np.full(n - 8, 0.2)]
    turns = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(10)]
    turned = [(turn * levels) @ turn.T for turn in turns]
    for seed in range(150):
        noise = goe(n, 1.0, rng) if kind == "goe" else turned[seed % len(turned)]
        truth = np.sqrt(np.trace(noise @ noise) / n / 2)
        found = noise_scale(Dense(noise), Dense(np.zeros((n, n))), 2, seed)
        hits.append(abs(found.mean - truth) < 2 * found.stderr)
    assert np.mean(hits) > least


@pytest.mark.parametrize("strong", [1.0, 6.0])
def test_the_anisotropys_error_is_that_of_repeats(strong):
    """Gaussian noise, so many times as strong in two directions; each pair of halves has its own."""
    n, rng, seen = 200, np.random.default_rng(4), []
    outliers = torch.eye(n, dtype=torch.float64)[:2]
    scale = np.where(np.arange(n) < 2, strong, 1.0)
    scale = np.maximum(scale[:, None], scale)
    for seed in range(150):
        halves = [Dense(scale * goe(n, 0.5, rng)) for _ in range(2)]
        seen.append(noise_scale(*halves, 2, seed, outliers=outliers))
    found, errors = np.array([(one.anisotropy, one.anisotropy_stderr) for one in seen]).T
    assert found.mean() == pytest.approx(strong**2, rel=0.04)
    assert np.mean(errors**2) ** 0.5 == pytest.approx(found.std(), rel=0.15)
    along = np.mean([one.along**2 for one in seen]) ** 0.5
    assert along == pytest.approx(strong * 0.5 * (2 / n) ** 0.5, rel=0.15)
    with_size = replace(seen[0], batch_size=1.0)
    assert with_size.at(4.0).along == pytest.approx(with_size.along / 2)


def test_outliers_are_projected_out_and_their_noise_is_reported():
    """Noise 30 times as strong in two directions: kept in, it would be taken for the bulk's."""
    rng = np.random.default_rng(2)
    s, strong = 0.5, 15.0
    vectors = np.linalg.qr(rng.standard_normal((N, 2)))[0].T

    def noisy():
        noise = goe(N, s, rng)
        for u in vectors:  # leads away from u, and back
            x = rng.standard_normal(N) * strong / np.sqrt(N)
            noise += np.outer(u, x) + np.outer(x, u)
        return Dense(np.diag(np.r_[9.0, 7.0, np.zeros(N - 2)]) + noise)

    one, two = noisy(), noisy()
    found = noise_scale(one, two, 4, outliers=torch.as_tensor(vectors))
    assert found.mean == pytest.approx(s, rel=0.08)
    assert found.anisotropy == pytest.approx((strong**2 + s**2) / s**2, rel=0.15)
    assert found.products == 6
    with_them = noise_scale(one, two, 4)
    assert with_them.mean > 1.5 * s


def test_isotropic_noise_has_anisotropy_one():
    rng = np.random.default_rng(3)
    basis = torch.eye(N, dtype=torch.float64)[:4]
    found = noise_scale(Dense(goe(N, 2.0, rng)), Dense(goe(N, 2.0, rng)), 4, outliers=basis, resolved=4)
    assert found.anisotropy == pytest.approx(1.0, abs=0.1)


def test_scale_equivariance():
    """T6: the loss times c, the noise times c; a batch four times as large, half the noise."""
    rng = np.random.default_rng(4)
    one, two = goe(N, 1.0, rng), goe(N, 1.0, rng)
    plain = noise_scale(Dense(one, 16), Dense(two, 16))
    scaled = noise_scale(Dense(100 * one, 16), Dense(100 * two, 16))
    assert scaled.mean == pytest.approx(100 * plain.mean, rel=1e-12)
    assert plain.at(64).mean == pytest.approx(plain.mean / 2)
    assert plain.at(64).stderr == pytest.approx(plain.stderr / 2)


def test_against_all_batches_of_real_data():
    """Softmax regression on digits: halves of 64 against the exact noise of batches of 64, drawn without replacement.

    ``s^2 = E |H_b - H|_F^2 / n`` over the data, exact from 400 batches; and for batches of 600 of the 1797, where the
    finite population counts: without its factor the scale would be 22 % too large.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16), torch.tensor(y)
    torch.manual_seed(0)
    weight = (0.3 * torch.randn(10, 64, dtype=torch.float64)).requires_grad_()
    rng = np.random.default_rng(0)

    def matrix(rows):
        p = torch.softmax(x[rows] @ weight.detach().T, 1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("bac,bi,bj->aicj", middle, x[rows], x[rows]).reshape(640, 640) / len(rows)

    def loss(batch):
        return torch.nn.functional.cross_entropy(batch[0] @ weight.T, batch[1])

    def operator(rows):
        return Hessian(loss, [weight], [(x[rows], y[rows])])

    whole = matrix(np.arange(1797))
    for size in (64, 600):
        exact = [((matrix(rng.permutation(1797)[:size]) - whole) ** 2).sum() / 640 for _ in range(40)]
        found = []
        for seed in range(20):
            rows = rng.permutation(1797)[:128]
            half = noise_scale(operator(rows[:64]), operator(rows[64:]), 40, seed)
            assert half.batch_size == 64
            found.append(half.at(size, 1797).mean ** 2)
        assert np.mean(found) == pytest.approx(float(torch.stack(exact).mean()), rel=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="of one size, got 3 and 4"):
        noise_scale(Dense(np.eye(3)), Dense(np.eye(4)))
    with pytest.raises(ValueError, match="probes must be at least 1"):
        noise_scale(Dense(np.eye(3)), Dense(np.eye(3)), 0)
    with pytest.raises(ValueError, match="all 3 directions are outliers"):
        noise_scale(Dense(np.eye(3)), Dense(np.eye(3)), outliers=torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN or infinite"):
        noise_scale(Dense(np.full((3, 3), np.nan)), Dense(np.eye(3)))
    found = noise_scale(Dense(np.eye(3)), Dense(np.eye(3)))
    assert found.mean == 0.0
    with pytest.raises(ValueError, match="unknown size"):
        found.at(3)
    known = replace(found, batch_size=8)
    for size, dataset in ((0, 10), (11, 10)):
        with pytest.raises(ValueError, match="above 0 and at most dataset_size"):
            known.at(size, dataset)
    assert known.at(10, 10).mean == 0.0
    assert isinstance(known, NoiseScale)


def test_an_infinite_product_of_an_outlier_is_no_anisotropy():
    """It is projected out of the random vectors, whose products stay finite."""
    halves = [Dense(np.diag([1.0, 2.0, 3.0, 4.0, sign * 1.5e308])) for sign in (1, -1)]
    with pytest.raises(ValueError, match="NaN or infinite"):
        noise_scale(*halves, outliers=torch.eye(5, dtype=torch.float64)[4:])
