"""The outlier rule, the certificates and the error bars on Hessians of networks trained here on scikit-learn's digits.

Counts and refusals are asserted, not digits: training depends on the torch version.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov.lanczos import lanczos, rounding_noise, start_vector
from lightning_rmt.spectra.outliers import outliers_of_eigenvalues
from lightning_rmt.spectra.spectrum import Spectrum


def digits(classes=10, n=512):
    """Inputs and targets, shuffled; the first n are the curvature batch."""
    inputs, targets = load_digits(n_class=classes, return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(inputs / 16, dtype=torch.float32)[order], torch.tensor(targets)[order]
    return inputs, targets, n


def mlp(*widths):
    layers = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b)] + [nn.ReLU()] * (i < len(widths) - 2)
    return nn.Sequential(*layers)


def trained(make, steps, classes=10, seed=0):
    """The network at several steps of Adam (1e-3, batches of 64), as (step, parameters) pairs, and its curvature batch."""
    inputs, targets, n = digits(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    snapshots = {}
    for step in range(max(steps) + 1):
        if step in steps:
            snapshots[step] = [p.detach().clone() for p in model.parameters()]
        batch = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    return model, snapshots, (inputs[:n], targets[:n])


def hessian_at(network, step, dtype=torch.float32):
    model, snapshots, (x, y) = network
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p, value in zip(model.parameters(), snapshots[step], strict=True):
            p.copy_(value)
    x = x.to(dtype)
    return Hessian(lambda batch: nn.functional.cross_entropy(model(x), y), model.parameters(), [x])


def spectrum_at(operator, steps=100, seeds=(0,), reorthogonalise_all=True):
    runs = tuple(
        lanczos(operator, start_vector(operator, seed), steps, reorthogonalise=reorthogonalise_all or i == 0)
        for i, seed in enumerate(seeds)
    )
    return Spectrum(runs, operator.size, steps * len(seeds), rounding_noise(operator.dtype))


def dense_eigenvalues(operator):
    eye = torch.eye(operator.size, dtype=operator.dtype)
    H = torch.cat([operator.matmat(block) for block in eye.split(64)])
    return torch.linalg.eigvalsh((H + H.T) / 2).numpy()


@pytest.fixture(scope="module")
def softmax():
    return trained(lambda: nn.Linear(64, 10), steps=(0, 100, 600))


@pytest.fixture(scope="module")
def deep():
    return trained(lambda: mlp(64, 64, 64, 10), steps=(0, 100))


@pytest.fixture(scope="module")
def small():
    return trained(lambda: mlp(64, 24, 24, 10), steps=(0, 400, 600))


@pytest.fixture(scope="module")
def small_eigenvalues(small):
    return dense_eigenvalues(hessian_at(small, 600, torch.float64))


@pytest.mark.parametrize("step", [0, 100, 600])
def test_softmax_regression_has_nine(softmax, step):
    """R1."""
    for steps in (50, 100):
        side = spectrum_at(hessian_at(softmax, step), steps).outliers.high
        assert (side.count, side.kind, side.confidence) == (9, "gap", 2)
        assert side.gap_ratio > 5


def test_a_deep_network_in_early_training_has_nine_whatever_the_run(deep):
    """R2, A8."""
    operator = hessian_at(deep, 100)
    sides = [spectrum_at(operator, steps, seeds=(seed,)).outliers.high for steps in (50, 100, 200) for seed in range(3)]
    assert [side.count for side in sides] == [9] * 9
    for side in sides:
        assert side.gap_spacings > 10
        assert side.values == pytest.approx(sides[0].values, rel=1e-3)
        assert side.edge == pytest.approx(sides[0].edge, rel=1e-3)
        assert side.at_least == (side is sides[0] or side is sides[1] or side is sides[2])
    assert sides[0].edge == pytest.approx(0.7, abs=0.2)


def test_the_same_network_at_initialisation_has_no_count(deep):
    """R3."""
    operator = hessian_at(deep, 0)
    for steps in (50, 100):
        spectrum = spectrum_at(operator, steps)
        assert spectrum.outliers.high.count is None
        assert "thin out without a gap" in spectrum.outliers.high.verdict
        assert spectrum.bulk_edges.high is None
        assert len(spectrum.top) >= 2  # the eigenvalues are there all the same


def test_seven_classes_give_six():
    """R6."""
    network = trained(lambda: mlp(64, 64, 64, 7), steps=(100,), classes=7, seed=5)
    side = spectrum_at(hessian_at(network, 100)).outliers.high
    assert side.count == 6
    assert side.gap_spacings >= 5


def test_a_convolutional_network_at_initialisation_has_no_count():
    """R5."""

    def make():
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    side = spectrum_at(hessian_at(trained(make, steps=(0,)), 0)).outliers.high
    assert side.count is None
    assert side.gap_spacings < 3


def test_counts_never_contradict_each_other(softmax, small):
    """A8."""
    for network, step in ((softmax, 100), (small, 400), (small, 600)):
        operator = hessian_at(network, step)
        counts = {
            spectrum_at(operator, steps, seeds=(seed,)).outliers.high.count
            for steps in (30, 50, 100, 200)
            for seed in range(3)
        }
        assert len(counts - {None}) <= 1


class TestAgainstTheDenseHessian:
    def test_the_rule_says_the_same_of_both(self, small, small_eigenvalues):
        """R4."""
        exact = outliers_of_eigenvalues(small_eigenvalues)
        for dtype, steps in ((torch.float32, 100), (torch.float64, 100), (torch.float32, 200)):
            measured = spectrum_at(hessian_at(small, 600, dtype), steps).outliers
            high, low = measured.high, measured.low
            assert (high.count, high.kind, high.confidence) == (
                exact.high.count,
                exact.high.kind,
                exact.high.confidence,
            )
            assert high.gap_index == exact.high.gap_index
            assert high.gap_spacings == pytest.approx(exact.high.gap_spacings, rel=0.05)
            # The lower end converges late: a refusal is no contradiction.
            assert low.count in ({None, exact.low.count} if steps == 100 else {exact.low.count})
            if low.count is not None:
                assert low.gap_spacings == pytest.approx(exact.low.gap_spacings, rel=0.05)

    def test_certified_levels_are_eigenvalues_to_eight_digits(self, small, small_eigenvalues):
        """R4."""
        operator = hessian_at(small, 600, torch.float64)
        for steps, seed in ((50, 0), (100, 1), (200, 2)):
            spectrum = spectrum_at(operator, steps, seeds=(seed,))
            top = np.array([level.value for level in spectrum.top])
            bottom = np.array([level.value for level in spectrum.bottom])
            assert top.size >= 10
            assert top == pytest.approx(small_eigenvalues[::-1][: top.size], rel=1e-8)
            assert bottom == pytest.approx(small_eigenvalues[: bottom.size], rel=1e-8)

    def test_in_float32_the_residual_covers_the_rounding(self, small, small_eigenvalues):
        spectrum = spectrum_at(hessian_at(small, 600))
        top = np.array([(level.value, level.residual) for level in spectrum.top])
        assert len(top) >= 10
        assert (np.abs(top[:, 0] - small_eigenvalues[::-1][: len(top)]) <= top[:, 1]).all()
        assert top[:, 1].max() < 1e-4 * top[0, 0]

    def test_one_probe_knows_trace_and_norm_and_its_own_errors(self, small, small_eigenvalues):
        operator = hessian_at(small, 600, torch.float64)
        trace, norm = small_eigenvalues.sum(), np.linalg.norm(small_eigenvalues)
        found = [spectrum_at(operator, 60, seeds=(seed,)) for seed in range(12)]
        errors = np.array([(s.trace.mean / trace - 1, s.frobenius.mean / norm - 1) for s in found])
        assert np.sqrt(np.mean(errors**2, axis=0))[0] < 0.05
        assert np.abs(errors[:, 1]).max() < 0.01
        z = np.array(
            [((s.trace.mean - trace) / s.trace.stderr, (s.frobenius.mean - norm) / s.frobenius.stderr) for s in found]
        )
        assert np.mean(np.abs(z) < 2) > 0.85
        raw = [operator.size * s.runs[0].weights @ s.runs[0].nodes for s in found]
        assert np.std(raw) > 5 * np.std([s.trace.mean for s in found])

    def test_masses_and_distribution(self, small, small_eigenvalues):
        spectrum = spectrum_at(hessian_at(small, 600), seeds=(0, 1), reorthogonalise_all=False)
        within = np.mean(np.abs(small_eigenvalues) <= spectrum.zero_width)
        below = np.mean(small_eigenvalues < -spectrum.zero_width)
        assert spectrum.zero_mass == pytest.approx(within, abs=0.1)
        assert spectrum.zero_mass_bounds[0] <= within <= spectrum.zero_mass_bounds[1]
        assert spectrum.negative_mass_bounds[0] <= below <= spectrum.negative_mass_bounds[1]
        x = np.quantile(small_eigenvalues, [0.005, 0.02, 0.05, 0.95, 0.98, 0.995])
        lower, upper = spectrum.cdf_band(x, z=3)
        truth = np.searchsorted(small_eigenvalues, x, side="right") / small_eigenvalues.size
        assert ((lower <= truth + 1e-9) & (truth <= upper + 1e-9)).all()
        low, high = spectrum.quantile_bounds(0.99, z=3)
        quantile = np.quantile(small_eigenvalues, 0.99, method="inverted_cdf")  # an eigenvalue, not between two
        assert low * (1 - 1e-9) <= quantile <= high * (1 + 1e-9)
