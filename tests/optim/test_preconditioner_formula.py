"""T8: the step against dense formulas on known matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preconditioner_cases import Matrix, applied, flat, quadratic, spiked
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_rmt.optim.metric import flat_roots, inverse_roots
from lightning_rmt.optim.spectral_preconditioner import SpectralPreconditioner

SIZES = (60, 100, 40)
OUTLIERS = (100.0, 60.0, -30.0)


def dense_shrinkage(matrix, damping=0.0, rank=3):
    """I - V (1 - c) V' with everything from a dense eigendecomposition."""
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    top, edge = order[:rank], float(values[order[rank]].abs())
    factors = torch.clamp((edge + damping) / (values[top].abs() + damping), max=1)
    V = vectors[:, top]
    return torch.eye(len(matrix), dtype=matrix.dtype) - V @ torch.diag(1 - factors) @ V.T


def columns(optimizer, parameters, gradients):
    """Minus the steps that these gradients cause, without momentum: the matrix that multiplies gradients."""
    steps = []
    for gradient in gradients:
        before = flat(parameters)
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view(p.shape).clone()
        optimizer.step()
        steps.append(before - flat(parameters))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("damping", [0.0, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_the_matrix_of_a_step_is_the_dense_one(damping, dtype, tolerance):
    matrix = spiked(200, OUTLIERS)[0]
    parameters, _ = quadratic(matrix.to(dtype), SIZES)
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1.0), damping=damping)
    found = optimizer.refresh(Matrix(matrix.to(dtype)), steps=80)
    assert found.rank == 3
    P = columns(optimizer, parameters, torch.eye(200, dtype=dtype)).double()
    torch.testing.assert_close(P, dense_shrinkage(matrix, damping), rtol=0, atol=tolerance)
    torch.testing.assert_close(P, P.T, rtol=0, atol=tolerance)
    eigenvalues = torch.linalg.eigvalsh((P + P.T) / 2)
    assert eigenvalues.min() > 0.9 / 100
    assert eigenvalues.max() < 1 + tolerance
    U = optimizer._progress.active.vectors.double()
    assert (U @ U.T - torch.eye(3)).abs().max() < 1e-5
    assert (U @ U.T - torch.eye(3)).abs().max() < tolerance


@pytest.mark.parametrize("amsgrad", [False, True])
def test_in_adams_metric_it_is_the_dense_formula(amsgrad):
    matrix = spiked(200, (3000.0, 1500.0, -1000.0), bulk=(-1.0, 1.0))[0]
    parameters, backward = quadratic(matrix, SIZES)
    base = torch.optim.Adam(parameters, lr=1e-3, betas=(0.8, 0.9), amsgrad=amsgrad, eps=1e-3)
    optimizer = SpectralPreconditioner(base, gap=1.0)
    for _ in range(3):
        backward()
        optimizer.step()

    def root_of_denominator():
        name = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
        corrected = [base.state[p][name] / (1 - 0.9 ** float(base.state[p]["step"])) for p in parameters]
        return (torch.cat([v.reshape(-1) for v in corrected]).sqrt() + 1e-3).sqrt()

    root = root_of_denominator()
    found = optimizer.refresh(Matrix(matrix), steps=200)
    assert found.rank >= 1
    shrinkage = dense_shrinkage(matrix / root[:, None] / root[None, :], rank=found.rank)
    step, plain = applied(optimizer, base, parameters, backward)
    root = root_of_denominator()  # of the step itself, one later than the eigenvectors
    wanted = (shrinkage @ (plain * root)) / root
    torch.testing.assert_close(step, wanted, rtol=1e-6, atol=1e-10)
    assert (step - plain).norm() > 0.05 * plain.norm()
    assert (step * root).norm() < (plain * root).norm()


def test_in_adams_metric_p_is_positive_and_never_amplifies():
    """D^(1/2) P D^(-1/2) from its columns: symmetric, with eigenvalues in (0, 1]."""
    matrix = spiked(200, OUTLIERS)[0]
    parameters, backward = quadratic(matrix, SIZES)
    base = torch.optim.AdamW(parameters, lr=1e-3)
    optimizer = SpectralPreconditioner(base, gap=1.0)
    backward()
    optimizer.step()
    assert optimizer.refresh(Matrix(matrix), steps=200).rank > 0
    active = optimizer._progress.active
    roots = flat_roots(active.block, inverse_roots(base, active.block, "adam"))
    factors = active.deflation.factors()
    P = torch.stack([e + active.shrink(e.clone(), roots, factors) for e in torch.eye(200, dtype=torch.float64)], dim=1)
    inside = P / roots[:, None] * roots[None, :]
    torch.testing.assert_close(inside, inside.T, rtol=0, atol=1e-9)
    eigenvalues = torch.linalg.eigvalsh(inside)
    assert eigenvalues.min() > 0
    assert eigenvalues.max() < 1 + 1e-9


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_is_never_longer_than_the_bases(name):
    """In the metric, whatever the gradient, while Adam's metric moves away from that of the basis."""
    matrix = spiked(200, OUTLIERS)[0]
    parameters, backward = quadratic(matrix, SIZES)
    base = getattr(torch.optim, name)(parameters, lr=1e-3, weight_decay=0.0)
    optimizer = SpectralPreconditioner(base, gap=1.0)
    backward()
    optimizer.step()
    optimizer.refresh(Matrix(matrix), steps=100)
    assert optimizer.active
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):

        def random():
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)

        step, plain = applied(optimizer, base, parameters, random)
        roots = inverse_roots(base, optimizer._progress.active.block, optimizer.metric)
        scale = 1.0 if roots is None else flat_roots(optimizer._progress.active.block, roots)
        assert (step / scale).norm() <= (plain / scale).norm() * (1 + 1e-9)


def test_groups_with_other_rates_keep_the_step_a_descent():
    """The step is -M g with M symmetric and positive. P L with P in plain coordinates isn't, and moves a slow group far."""
    matrix = spiked(200, (100.0, 60.0))[0]
    parameters, _ = quadratic(matrix, SIZES)
    rates = (1.0, 1e-3, 0.0)
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = SpectralPreconditioner(torch.optim.SGD(groups))
    assert optimizer.refresh(Matrix(matrix), steps=100).rank > 0
    M = columns(optimizer, parameters, torch.eye(200, dtype=torch.float64))
    torch.testing.assert_close(M, M.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(M)[40:].min() > 0  # 40 directions have the rate 0
    assert not M[160:].any()
    # what a gradient in the fast group does in the slow one is of the order of the slow group's rate
    assert M[60:160, :60].abs().max() < 1e-3
    rate = torch.repeat_interleave(torch.tensor(rates, dtype=torch.float64), torch.tensor(SIZES))
    whole = matrix * rate.sqrt()[:, None] * rate.sqrt()[None, :]
    wanted = rate.sqrt()[:, None] * dense_shrinkage(whole, rank=optimizer.deflation.rank) * rate.sqrt()[None, :]
    torch.testing.assert_close(M, wanted, rtol=0, atol=1e-9)


class Counting(TorchDispatchMode):
    """Operations of matrix products, the largest tensor that anything but those or views reads or makes, and waiting."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest, self.synchronised = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in (*args, result) if torch.is_tensor(a)]
        name = func.name()
        if "_local_scalar_dense" in name or "nonzero" in name:
            self.synchronised.append(name)
        if "mv" in name or "mm" in name:
            self.operations += 2 * sum(t.numel() for t in tensors if t.ndim == 2)
        elif not func.is_view:
            self.largest = max(self.largest, *(t.numel() for t in tensors), 0)
        return result


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_takes_4kn_operations_more_and_no_synchronisation(name):
    n, k = 50_000, 3
    values = torch.linspace(0.1, 1.0, n)
    values[:k] = torch.tensor([100.0, 60.0, 30.0])

    class Diagonal:
        size, dtype, device = n, torch.float32, torch.device("cpu")

        def matmat(self, V):
            return V * values

    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (n // 2, n // 2)]
    base = getattr(torch.optim, name)(parameters, lr=1e-3)
    optimizer = SpectralPreconditioner(base, metric="identity" if name == "SGD" else "adam")
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.refresh(Diagonal()).rank == k
    with Counting() as nothing:
        base.step()
    assert nothing.operations == 0
    with Counting() as counted:
        optimizer.step()
    assert counted.operations == 4 * k * n
    assert counted.largest == n  # nothing else touches the basis
    if name == "SGD":  # Adam itself reads its step count, which is on the host
        assert not counted.synchronised


@pytest.mark.parametrize("scale", [64.0, 2.0**-20])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_factors_and_rank_dont_change_with_the_losss_scale(name, scale):
    """T6. In Adam's metric without eps the curvature doesn't scale at all."""
    matrix = spiked(200, OUTLIERS)[0]
    found = []
    for factor in (1.0, scale):
        parameters, backward = quadratic(matrix * factor, SIZES)
        base = torch.optim.SGD(parameters, lr=1e-9) if name == "SGD" else torch.optim.Adam(parameters, lr=1e-9, eps=0)
        # a damping is in units of the curvature in the metric
        damping = 0.5 * (factor if name == "SGD" else 1.0)
        optimizer = SpectralPreconditioner(base, gap=1.0, damping=damping)
        backward()
        optimizer.step()
        optimizer.refresh(Matrix(matrix * factor), noise=0.01 * damping)
        found.append(optimizer.deflation)
    assert found[0].rank == found[1].rank > 0
    units = scale if name == "SGD" else 1.0
    np.testing.assert_allclose(found[1].curvature, units * found[0].curvature, rtol=1e-9)
    np.testing.assert_allclose(found[1].factors(0.5 * units), found[0].factors(0.5), rtol=1e-9)
