"""From a torch loss to the numbers that users see, against dense Hessians in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector

from lightning_rmt import Hessian, estimate_spectrum


def dense_hessian(loss_of, module):
    """Reverse over reverse on functional copies: shares nothing with `Hessian` but autograd."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters])
        state = {n: part.view(p.shape) for n, part, p in zip(names, parts, parameters, strict=True)}
        return loss_of(lambda x: torch.func.functional_call(module, state, (x,)))

    flat = parameters_to_vector(parameters).detach()
    return torch.autograd.functional.hessian(loss, flat).numpy()


def trained(module, loss_of, steps):
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()
    return module


def digits(classes, samples):
    data = load_digits(n_class=classes)
    chosen = np.random.default_rng(0).permutation(len(data.target))[:samples]
    return torch.tensor(data.data[chosen]) / 16, torch.tensor(data.target[chosen])


def softmax():
    x, y = digits(10, 256)
    return nn.Linear(64, 10).double(), lambda f: cross_entropy(f(x), y)


def relu_classifier():
    x, y = digits(5, 128)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)).double(), lambda f: cross_entropy(f(x), y)


def tanh_regression():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    return net, lambda f: mse_loss(f(x), x[:, :1] * x[:, 1:2])


def convolutional():
    x, y = digits(10, 64)
    images = x.view(-1, 1, 8, 8)
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 12, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 10)),
    ).double()
    return net, lambda f: cross_entropy(f(images), y)


NETWORKS = {f.__name__: f for f in (softmax, relu_classifier, tanh_regression, convolutional)}


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_their_dense_hessians(name, steps):
    torch.manual_seed(0)
    module, loss_of = NETWORKS[name]()
    module = trained(module, loss_of, steps)
    for m in module.modules():  # running statistics are no part of the function that is differentiated twice
        if isinstance(m, nn.BatchNorm2d):
            m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = False, None, None, None
    H = dense_hessian(loss_of, module)
    values = np.linalg.eigvalsh(H)[::-1]
    assert len(values) <= 2000
    spectrum = estimate_spectrum(Hessian(lambda _: loss_of(module), module.named_parameters(), [None]), steps=100)

    scale = abs(values).max()
    for ours, theirs in ((spectrum.lambda_max, values[0]), (spectrum.lambda_min, values[-1])):
        assert abs(ours.value - theirs) <= ours.residual + 1e-12 * scale
        if ours.certified:
            assert ours.value == pytest.approx(theirs, rel=1e-8)
    assert spectrum.lambda_max.certified
    for levels, truth in ((spectrum.top, values), (spectrum.bottom, values[::-1])):
        for level, value in zip(levels, truth, strict=False):
            assert level.value == pytest.approx(value, rel=1e-8)
    for side, truth in ((spectrum.outliers.high, values), (spectrum.outliers.low, values[::-1])):
        for level, value in zip(side.levels, truth, strict=False):
            assert abs(level.value - value) <= level.residual
            if level.certified:
                assert level.value == pytest.approx(value, rel=1e-8)
        assert len(np.unique(side.values)) == len(side.values) == (side.count or 0)
    assert abs(spectrum.trace.mean - values.sum()) <= 4 * spectrum.trace.stderr + 1e-9 * scale
    norm = np.linalg.norm(values)
    assert abs(spectrum.frobenius.mean - norm) <= 4 * spectrum.frobenius.stderr + 1e-9 * norm
    points = np.concatenate([np.linspace(values[-1], values[0], 200)[1:-1], np.geomspace(1e-4, 0.99, 50) * scale])
    share = (values[None] <= points[:, None]).mean(1)
    low, high = spectrum.cdf_band(points, z=4.0)
    # exact zeros come as rounding of either sign, which the share at a point next to zero would depend on
    away = np.abs(points) > 1e-9 * scale
    assert (low - 1e-12 <= share)[away].all()
    assert (share <= high + 1e-12)[away].all()


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum_of_a_multiple_of_the_loss_is_the_multiple(factor, dtype):
    torch.manual_seed(0)
    module, loss_of = relu_classifier()
    module = trained(module, loss_of, 60)
    x, y = digits(5, 128)
    module, x = module.to(dtype), x.to(dtype)

    def measure(c):
        return estimate_spectrum(
            Hessian(lambda _: c * cross_entropy(module(x), y), module.parameters(), [None]), steps=60
        )

    one, scaled = measure(1.0), measure(factor)
    rel = 1e-9 if dtype == torch.float64 else 2e-4
    assert scaled.lambda_max.value == pytest.approx(factor * one.lambda_max.value, rel=rel)
    assert scaled.lambda_max.certified == one.lambda_max.certified
    assert scaled.trace.mean == pytest.approx(factor * one.trace.mean, rel=100 * rel)
    assert scaled.frobenius.mean == pytest.approx(factor * one.frobenius.mean, rel=rel)
    assert scaled.outliers.high.count == one.outliers.high.count
    assert scaled.outliers.high.gap_index == one.outliers.high.gap_index
    common = min(len(one.top), len(scaled.top))
    assert common >= 5
    assert abs(len(one.top) - len(scaled.top)) <= (0 if dtype == torch.float64 else 2)
    np.testing.assert_allclose(
        [t.value for t in scaled.top[:common]], [factor * t.value for t in one.top[:common]], rtol=10 * rel
    )
    assert scaled.zero_mass == pytest.approx(one.zero_mass, abs=0.05)
    assert scaled.negative_mass == pytest.approx(one.negative_mass, abs=0.02)


class Diagonal:
    """For a start vector without a preferred direction, a matrix is as good as its eigenvalues."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, values):
        self.values, self.size = torch.as_tensor(values), len(values)

    def matmat(self, V):
        return V * self.values


@pytest.fixture(scope="module")
def digits_mlp():
    """Trained 64-24-24-10 network, 2410 parameters: eigenvalues of the dense Hessian, from (elsewhere tested) products."""
    torch.manual_seed(0)
    x, y = digits(10, 512)
    net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)).double()
    net = trained(net, lambda f: cross_entropy(f(x), y), 60)
    H = Hessian(lambda _: cross_entropy(net(x), y), net.parameters(), [None])
    matrix = torch.cat([H.matmat(rows) for rows in torch.eye(H.size, dtype=torch.float64).split(128)])
    matrix = (matrix + matrix.T) / 2
    assert H.size == 2410
    return torch.linalg.eigvalsh(matrix).numpy()


@pytest.mark.slow
def test_one_probe_of_60_steps_carries_its_own_errors(digits_mlp):
    """100 seeds: trace to 5 %, norm to 1 %, and both within 1 and 2 standard errors as often as they should be."""
    values = digits_mlp
    operator, trace, norm = Diagonal(values), values.sum(), np.linalg.norm(values)
    z_trace, z_norm, errors = [], [], []
    points = np.quantile(values, [0.02, 0.1, 0.3, 0.7, 0.9, 0.98, 0.995])
    share = (values[None] <= points[:, None]).mean(1)
    inside = []
    for seed in range(100):
        spectrum = estimate_spectrum(operator, steps=60, seed=seed)
        z_trace.append((spectrum.trace.mean - trace) / spectrum.trace.stderr)
        z_norm.append((spectrum.frobenius.mean - norm) / spectrum.frobenius.stderr)
        errors.append([spectrum.trace.mean / trace - 1, spectrum.frobenius.mean / norm - 1])
        low, high = spectrum.cdf_band(points, z=2.0)
        inside.append((low <= share) & (share <= high))
    spread = np.std(errors, axis=0)
    assert spread[0] < 0.05, spread
    assert spread[1] < 0.01, spread
    for z in (np.abs(z_trace), np.abs(z_norm)):
        # binomial over 100 seeds: 68 % +- 4.7, 95 % +- 2.2; three of these either way, and never too bold
        assert 0.54 <= (z < 1).mean() <= 0.86
        assert (z < 2).mean() >= 0.89
    assert np.mean(inside) >= 0.95
