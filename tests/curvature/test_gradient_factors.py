"""Rotation gain, effective samples and eigenvalue bias against gradients of known Kronecker structure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_rmt.curvature.gradient_factors import GROUPS, GradientFactors
from lightning_rmt.local_law.kronecker import KroneckerReading, read_matrix

FACTOR_STEPS, HELD_OUT = 40, 24


def power(size, exponent=1.0):
    return np.arange(1, size + 1.0) ** -exponent


def rotation(size, rng):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def gradients(rows, columns, seed, rotated=True, steps=FACTOR_STEPS + HELD_OUT):
    """``G = A^1/2 X B^1/2``, with A and B diagonal or rotated; also A and B."""
    rng = np.random.default_rng(seed)
    Q = rotation(rows.size, rng) if rotated else np.eye(rows.size)
    P = rotation(columns.size, rng) if rotated else np.eye(columns.size)
    G = [
        Q * np.sqrt(rows) @ rng.standard_normal((rows.size, columns.size)) @ (P * np.sqrt(columns)).T
        for _ in range(steps)
    ]
    return [torch.from_numpy(g) for g in G], (Q * rows) @ Q.T, (P * columns) @ P.T


def collected(stream, factor_steps=FACTOR_STEPS, held_out_steps=HELD_OUT, **options):
    factors = GradientFactors(
        tuple(stream[0].shape), factor_steps=factor_steps, held_out_steps=held_out_steps, beta=0.95, **options
    )
    for gradient in stream:
        factors.add(gradient)
    return factors


def constant(A, B, U, V):
    """J(U, V), exactly."""
    return np.sqrt(np.diag(U.T @ A @ U)).sum() * np.sqrt(np.diag(V.T @ B @ V)).sum()


def truth(factors, A, B):
    """Rotation gain in the factors' own basis, effective samples, and biases of the two sides."""
    one, U, V = np.eye, factors._left.numpy(), factors._right.numpy()
    moments = factors.moments()
    gain = constant(A, B, one(len(A)), one(len(B))) / constant(A, B, U, V)
    samples = [moments.effective_steps * np.trace(C) ** 2 / np.trace(C @ C) for C in (B, A)]
    bias = []
    for levels, C, W in ((moments.left, A, U), (moments.right, B, V)):
        logs, n = np.log(np.diag(W.T @ C @ W) / levels), levels.size
        bias.append(np.exp(logs[n // 8 : n // 2].mean() - logs[n // 2 : n - n // 8].mean()))
    return gain, samples, bias


CASES = (
    (power(32), power(24), True, 1.256),
    (power(32), power(24), False, 1.0),
    (power(64, 0.5), power(16, 2), True, 1.442),
    (power(64, 2), power(64), True, 2.36),
)


@pytest.mark.parametrize(("rows", "columns", "rotated", "population"), CASES)
def test_everything_is_the_truth_within_its_error(rows, columns, rotated, population):
    """Twenty runs: no bias, errors of about one standard error, and the price of a noisy basis is 7 % at most."""
    z, gains, samples, laws = [], [], [], []
    for seed in range(20):
        stream, A, B = gradients(rows, columns, seed, rotated)
        factors = collected(stream)
        gain, counts, bias = truth(factors, A, B)
        found = read_matrix(factors.moments())
        sides = (found.left, found.right)
        z.append((found.rotation_gain.mean - gain) / found.rotation_gain.stderr)
        gains.append((found.rotation_gain.mean, gain))
        for side, count, exact in zip(sides, counts, bias, strict=True):
            samples.append((side.effective_samples.mean - count) / side.effective_samples.stderr)
            assert side.effective_samples.mean == pytest.approx(count, rel=0.35)
            assert side.q == pytest.approx(side.size / side.effective_samples.mean)
            laws.append((side.bias / exact, (side.bias_held_out.mean - exact) / side.bias_held_out.stderr))
    assert abs(np.mean(z)) < 0.7
    assert 0.7 < np.std(z) < 1.9
    assert abs(np.mean(samples)) < 0.6
    assert 0.7 < np.std(samples) < 2.0
    laws = np.array(laws)
    np.testing.assert_allclose(np.exp(np.log(laws[:, 0]).mean()), 1.0, atol=0.03)
    assert np.abs(np.log(laws[:, 0])).max() < 0.3
    assert abs(laws[:, 1].mean()) < 0.5
    measured, exact = np.mean(gains, axis=0)
    assert measured == pytest.approx(exact, rel=0.01)
    assert population * 0.93 < exact <= population * 1.03


def test_a_basis_that_has_seen_the_gradients_would_be_flattered():
    """White noise: nothing to gain. In its own singular vectors a single gradient is diagonal, and gains 3.6."""
    white = [torch.from_numpy(g) for g in np.random.default_rng(0).standard_normal((FACTOR_STEPS + HELD_OUT, 32, 24))]
    found = read_matrix(collected(white).moments()).rotation_gain
    assert found.mean == pytest.approx(1.0, abs=4 * found.stderr)
    assert found.stderr < 0.01
    assert found.mean < 1.05
    assert white[0].abs().sum() / torch.linalg.svdvals(white[0]).sum() > 3


def test_moving_average_and_held_out_moments_by_hand():
    stream, _, _ = gradients(power(5), power(4), 0)
    factors = collected(stream[:20], factor_steps=12, held_out_steps=8)
    moments = factors.moments()
    ages = 0.95 ** np.arange(11, -1, -1)
    first, second = torch.stack(stream[:12]).numpy(), torch.stack(stream[12:20]).numpy()
    L = np.einsum("t,tij,tkj->ik", ages / ages.sum(), first, first)
    R = np.einsum("t,tji,tjk->ik", ages / ages.sum(), first, first)
    np.testing.assert_allclose(moments.left, np.linalg.eigvalsh(L), rtol=1e-10)
    np.testing.assert_allclose(moments.right, np.linalg.eigvalsh(R), rtol=1e-10)
    U, V = factors._left.numpy(), factors._right.numpy()
    for row, kept in ((0, range(8)), (3, [t for t in range(8) if t != 2])):
        plain, rotated = (second[kept] ** 2).mean(0), ((U.T @ second[kept] @ V) ** 2).mean(0)
        np.testing.assert_allclose(moments.plain[row], np.sqrt(plain).sum(), rtol=1e-6)
        np.testing.assert_allclose(moments.rotated[row], np.sqrt(rotated).sum(), rtol=1e-6)
        np.testing.assert_allclose(moments.held_left[row], rotated.sum(1), rtol=1e-5)
        np.testing.assert_allclose(moments.held_right[row], rotated.sum(0), rtol=1e-5)
    assert moments.effective_steps == pytest.approx(ages.sum() ** 2 / (ages**2).sum())


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_scale_does_not_matter(scale):
    stream, _, _ = gradients(power(12), power(8), 0)
    one = read_matrix(collected(stream).moments())
    other = read_matrix(collected([scale * g for g in stream]).moments())
    assert other.rotation_gain.mean == pytest.approx(one.rotation_gain.mean, rel=1e-6)
    assert other.left.bias == pytest.approx(one.left.bias, rel=1e-6)
    scaled = GradientFactors((12, 8), factor_steps=40, held_out_steps=24, beta=0.95)
    for gradient in stream:
        scaled.add(gradient / scale, scale)
    assert read_matrix(scaled.moments()).rotation_gain.mean == pytest.approx(one.rotation_gain.mean, rel=1e-6)


def test_dead_rows_and_what_the_loss_cannot_see_are_no_eigenvalues():
    """Dead inputs, and rows that sum to zero as those of logits do; other numbers are those without them."""
    stream, _, _ = gradients(power(12), power(8), 0)
    alone = read_matrix(collected(stream).moments())
    with_dead = [torch.nn.functional.pad(g, (0, 3)) for g in stream]
    found = read_matrix(collected(with_dead).moments())
    assert (found.left.size, found.right.size) == (12, 8)
    assert found.right.bias == pytest.approx(alone.right.bias, rel=1e-9)
    assert found.rotation_gain.mean == pytest.approx(alone.rotation_gain.mean, rel=1e-6)
    shifted = [g - g.mean(0) for g in stream]
    found = read_matrix(collected(shifted).moments())
    assert found.left.size == 11
    assert found.left.bias > 1
    awake = [g if t < FACTOR_STEPS else g + 1e-3 for t, g in enumerate(with_dead)]  # dead only so far
    assert read_matrix(collected(awake).moments()).right.bias == pytest.approx(alone.right.bias, rel=0.1)


def test_a_rank_that_few_samples_make_is_refused_in_words():
    rng = np.random.default_rng(0)
    single = [torch.from_numpy(np.outer(*rng.standard_normal((2, 40)))) for _ in range(20)]
    found = read_matrix(collected(single, factor_steps=12, held_out_steps=8).moments())
    assert found.left.bias is None
    assert "28 of 40 eigenvalues are zero in the factor and not in what follows it" in found.left.refusal
    assert found.rotation_gain.mean < 1.1


def test_float32_and_bfloat16_gradients():
    stream, _, _ = gradients(power(12), power(8), 0)
    exact = read_matrix(collected(stream).moments()).rotation_gain.mean
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = read_matrix(collected([g.to(dtype) for g in stream]).moments())
        assert found.rotation_gain.mean == pytest.approx(exact, rel=error)


def test_gradients_are_only_read_and_memory_is_as_said():
    stream, _, _ = gradients(power(30), power(20), 0)
    before = [g.clone() for g in stream]
    factors = collected(stream)
    assert all(torch.equal(a, b) for a, b in zip(before, stream, strict=True))
    kept = sum(t.numel() * t.element_size() for t in (factors._left, factors._right, factors._plain, factors._rotated))
    assert kept == GradientFactors.bytes_needed((30, 20)) == 8 * (900 + 400) + 64 * 600
    factors.add(stream[0])  # nothing more is taken
    assert factors.steps == factors.needed


def test_refusals():
    for options in ({"factor_steps": 1}, {"held_out_steps": GROUPS - 1}, {"beta": 1.0}, {"beta": 0.0}):
        with pytest.raises(ValueError, match="factor_steps must be at least 2"):
            GradientFactors((3, 3), **{"factor_steps": 4, "held_out_steps": 8, "beta": 0.9, **options})
    factors = GradientFactors((3, 2), factor_steps=4, held_out_steps=8, beta=0.9)
    with pytest.raises(ValueError, match=r"expected a gradient of shape \(3, 2\), got \(2, 3\)"):
        factors.add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="only 0 of 12 gradients came"):
        factors.moments()
    for _ in range(12):
        factors.add(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="its gradient is zero"):
        read_matrix(factors.moments())


def test_all_layers_together():
    streams = [gradients(power(16), power(12), seed, seed > 0)[0] for seed in (0, 1)]
    layers = {str(i): read_matrix(collected(stream).moments()) for i, stream in enumerate(streams)}
    gain = KroneckerReading(3, "rmt", layers).rotation_gain
    low, high = layers["0"].rotation_gain.mean, layers["1"].rotation_gain.mean
    assert low < gain.mean < high
    assert 0 < gain.stderr < 0.1
    assert KroneckerReading(3, "rmt", {}).rotation_gain is None
    assert (layers["0"].word, KroneckerReading(3, "rmt", layers).layers["1"].word) == ("gains nothing", "gains nothing")
