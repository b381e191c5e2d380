"""Damping and step length of one noisy step against the best ones, found with the truth."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import lanczos_of, spectrum_of
from noisy_matrices import covariance, true_curvature, wigner

from lightning_rmt.local_law import (
    NoDampingError,
    VectorMeasure,
    expected_curvature,
    ggn_expected_curvature,
    ggn_joint_damping,
    joint_damping,
)

N = 800


class Step:
    """One step on a quadratic: gradients of two halves of a batch, and the loss after any damping and length."""

    def __init__(self, noisy, gradient_noise, seed):
        rng, self.noisy = np.random.default_rng([seed, 1]), noisy
        self.error = rng.standard_normal(noisy.truth.size)
        clean = noisy.truth * self.error
        spread = gradient_noise * np.linalg.norm(clean) / clean.size**0.5
        first, second = (clean + 2**0.5 * spread * rng.standard_normal(clean.size) for _ in range(2))
        self.clean, self.gradient, self.half = clean, (first + second) / 2, (first - second) / 2
        self.measure = VectorMeasure(noisy.levels, (noisy.vectors.T @ self.gradient) ** 2)
        self.difference = VectorMeasure(noisy.levels, (noisy.vectors.T @ self.half) ** 2) if gradient_noise else None

    def loss(self, damping, length):
        after = self.error - length * self.noisy.step(damping, self.gradient)
        return self.noisy.truth @ after**2 / 2

    def best(self):
        """Smallest loss over a grid of dampings, each with its best length."""
        start = max(0.0, -self.noisy.levels[0])
        losses = [self.noisy.truth @ self.error**2 / 2]
        for damping in start + np.geomspace(1e-5, 1e2, 71) * np.abs(self.noisy.levels).max():
            step = self.noisy.step(damping, self.gradient)
            losses.append(self.loss(damping, max(step @ self.clean, 0) / (self.noisy.truth @ step**2)))
        return min(losses)


# --- the expected curvature of a step --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "noise"), [("bulk", 0.3), ("spikes", 0.3), ("bulk", 1.0)])
@pytest.mark.parametrize("times", [2.2, 4.0, 10.0])
def test_curvature_along_a_step_of_a_noisy_matrix(kind, noise, times):
    """T2: ``v'RARv`` within 3 %, averaged over vectors and draws."""
    ratios = []
    for seed in range(4):
        noisy, rng = wigner(kind, noise, N, seed), np.random.default_rng([seed, 1])
        for _ in range(20):
            v = rng.standard_normal(N)
            measure = VectorMeasure(noisy.levels, (noisy.vectors.T @ v) ** 2)
            truth = noisy.truth @ noisy.step(times * noise, v) ** 2
            ratios.append(expected_curvature(times * noise, noise, noisy.spectrum, measure) / truth)
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("samples", [400, 800, 3200])
@pytest.mark.parametrize("damping", [0.03, 0.3, 3.0])
def test_curvature_along_a_step_of_few_samples(samples, damping):
    ratios = []
    for seed in range(3):
        noisy, rng = covariance("spikes", samples, N, seed), np.random.default_rng([seed, 1])
        for _ in range(20):
            v = rng.standard_normal(N)
            measure = VectorMeasure(noisy.levels, (noisy.vectors.T @ v) ** 2)
            truth = noisy.truth @ noisy.step(damping, v) ** 2
            ratios.append(ggn_expected_curvature(damping, samples, noisy.spectrum, measure) / truth)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05 if samples > N else 0.1)


# --- the best step ---------------------------------------------------------------------------------------------------


def geometric_mean(values):
    return float(np.exp(np.mean(np.log(values))))


@pytest.mark.parametrize("kind", ["spikes", "power"])
@pytest.mark.parametrize("gradient_noise", [0.0, 1.0])
def test_a_step_with_additive_noise(kind, gradient_noise):
    """T3: within 4 % of the best loss over all dampings and lengths; 13 % where half of the gradient is noise."""
    ratios = []
    for noise in (0.1, 0.3, 1.0, 3.0):
        for seed in range(3):
            step = Step(wigner(kind, noise, N, seed), gradient_noise, seed)
            found = joint_damping(noise, step.noisy.spectrum, step.measure, step.difference)
            ratios.append(step.loss(found.damping, found.step) / step.best())
    assert geometric_mean(ratios) < (1.13 if gradient_noise else 1.04)
    assert max(ratios) < 1.5


@pytest.mark.parametrize("kind", ["spikes", "power"])
def test_a_step_with_few_samples(kind):
    """T3: within 9 % of the best loss, where the additive rule, told the exact noise, is 15 % further away."""
    ratios, additive = [], []
    for samples in (400, 800, 3200):
        for seed in range(3):
            step = Step(covariance(kind, samples, N, seed), 0.0, seed)
            noisy = step.noisy
            found = ggn_joint_damping(samples, noisy.spectrum, step.measure)
            ratios.append(step.loss(found.damping, found.step) / step.best())
            # |S - C|^2 = |S|^2 - 2 tr S C + |C|^2
            cross = noisy.levels @ (noisy.vectors.T**2 @ noisy.truth)
            noise = ((noisy.levels**2).sum() - 2 * cross + (noisy.truth**2).sum()) / N
            wrong = joint_damping(noise**0.5, noisy.spectrum, step.measure)
            additive.append(step.loss(wrong.damping, wrong.step) / step.best())
    assert geometric_mean(ratios) < 1.09
    assert max(ratios) < 1.3
    assert geometric_mean(additive) > geometric_mean(ratios) + 0.15


def test_lanczos_runs_are_enough():
    noisy = wigner("spikes", 0.3, N)
    step = Step(noisy, 0.5, 0)
    exact = joint_damping(0.3, noisy.spectrum, step.measure, step.difference)
    runs = []
    for vector in (step.gradient, step.half):
        # a start vector g is the start of ones on the diagonal matrix, weighted by g
        weights = (noisy.vectors.T @ vector) ** 2
        nodes, quadrature = gauss(noisy.levels, weights, 60)
        runs.append(VectorMeasure(nodes, quadrature))
    short = joint_damping(0.3, noisy.spectrum, *runs)
    assert short.damping == pytest.approx(exact.damping, rel=0.02)
    assert short.step == pytest.approx(exact.step, rel=0.02)


def gauss(levels, weights, steps):
    """Lanczos on the diagonal matrix of the levels from the square roots of the weights."""
    basis = [np.sqrt(weights / weights.sum())]
    alpha, beta = [], []
    for _ in range(steps):
        w = levels * basis[-1]
        alpha.append(w @ basis[-1])
        for _ in range(2):
            w -= np.array(basis).T @ (np.array(basis) @ w)
        beta.append(np.linalg.norm(w))
        basis.append(w / beta[-1])
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    return nodes, weights.sum() * vectors[0] ** 2


def test_scale_of_the_joint_rule():
    """T6: the damping scales with the curvature, the step not, the gain with the gradient squared over the curvature."""
    noisy = wigner("power", 0.3, N)
    step = Step(noisy, 0.3, 0)
    one = joint_damping(0.3, noisy.spectrum, step.measure, step.difference)
    c = 1e-3
    measures = [VectorMeasure(c * m.nodes, c**2 * m.weights) for m in (step.measure, step.difference)]
    other = joint_damping(0.3 * c, spectrum_of(c * noisy.levels, 100, 4), *measures)
    assert other.damping == pytest.approx(c * one.damping, rel=1e-3)
    assert other.step == pytest.approx(one.step, rel=1e-3)
    assert other.gain == pytest.approx(c * one.gain, rel=1e-3)


def test_noise_of_the_gradient_shortens_the_step():
    noisy = wigner("spikes", 0.3, N)
    quiet, loud = (Step(noisy, level, 1) for level in (0.0, 1.0))
    steps = [joint_damping(0.3, noisy.spectrum, s.measure, s.difference) for s in (quiet, loud)]
    assert steps[1].step / steps[1].damping < steps[0].step / steps[0].damping


# --- limits and refusals ---------------------------------------------------------------------------------------------


def test_without_noise_the_step_is_newtons():
    """T13."""
    truth = true_curvature("power", 200)
    error = np.random.default_rng(0).standard_normal(200)
    found = joint_damping(0.0, spectrum_of(truth, 60), VectorMeasure(truth, (truth * error) ** 2))
    assert found.damping < 1e-6
    assert found.step == pytest.approx(1, rel=1e-3)
    assert found.gain == pytest.approx(truth @ error**2 / 2, rel=1e-3)
    assert not found.at_bound


def test_negative_curvature_along_the_gradient_is_refused():
    spectrum = spectrum_of(np.linspace(-1, 1, 100), 30)
    with pytest.raises(NoDampingError, match="follows negative curvature"):
        joint_damping(0.0, spectrum, VectorMeasure([-1.0, 1.0], [1.0, 0.5]))
    # far away the curvature is positive, but nearly cancels: a step of any length
    with pytest.raises(NoDampingError, match="follows negative curvature"):
        joint_damping(0.0, spectrum, VectorMeasure([-1.0, 1.0], [0.95, 1.0]))
    with pytest.raises(NoDampingError, match="zero everywhere"):
        joint_damping(0.1, spectrum, VectorMeasure([0.0], [1.0]))


def test_halves_that_disagree_are_refused():
    spectrum = spectrum_of(np.linspace(0.1, 1, 100), 30)
    gradient = VectorMeasure([0.1, 1.0], [0.5, 0.5])
    with pytest.raises(NoDampingError, match="don't agree on a way down"):
        joint_damping(0.1, spectrum, gradient, VectorMeasure([0.1, 1.0], [0.6, 0.6]))
    with pytest.raises(NoDampingError, match="don't agree on a way down"):
        ggn_joint_damping(200, spectrum, gradient, VectorMeasure([0.1, 1.0], [0.6, 0.6]))


def test_a_vectors_measure():
    run = lanczos_of(np.linspace(0, 1, 50), 20)
    measure = VectorMeasure.from_run(run, 3.0)
    assert measure.weights.sum() == pytest.approx(9)
    with pytest.raises(ValueError, match="norm must be finite"):
        VectorMeasure.from_run(run, float("nan"))
    with pytest.raises(ValueError, match="2 nodes and 1 weights"):
        VectorMeasure([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="the smallest -1"):
        VectorMeasure([1.0], [-1.0])
    with pytest.raises(ValueError, match="0 nodes"):
        VectorMeasure([], [])
    with pytest.raises(ValueError, match="not finite"):
        VectorMeasure([float("nan")], [1.0])
    with pytest.raises(ValueError, match="damping must be"):
        expected_curvature(-1.0, 0.1, spectrum_of(np.ones(5), 2), measure)
