"""Models, quadratics and dense formulas for the tests of `SpectralPreconditioner`."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.optim.spectral_preconditioner import SpectralPreconditioner

BASES = {
    "sgd": lambda params, lr=0.05: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adam": lambda params, lr=0.01: torch.optim.Adam(params, lr=lr),
    "adamw": lambda params, lr=0.01: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
}


def network(seed=0, width=12, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)


def batch(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # inputs with a mean: an outlier in the curvature
    return (2 + torch.randn(32, 8, generator=generator)).to(dtype), torch.randint(4, (32,), generator=generator)


def loss_of(model, scale=1.0):
    return lambda data: scale * nn.functional.cross_entropy(model(data[0]), data[1])


def train(model, optimizer, steps, start=0, refresh_at=(), closures=False, scale=1.0):
    """Steps on batches that depend on the step's number only."""
    loss = loss_of(model, scale)
    for step in range(start, start + steps):
        if step in refresh_at:
            optimizer.refresh(Hessian(loss, model.named_parameters(), [batch(1000 + step)]))

        def closure(step=step):
            optimizer.zero_grad()
            value = loss(batch(step))
            value.backward()
            return value

        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def same_weights(first, second):
    return torch.equal(weights(first), weights(second))


def spiked(n=200, outliers=(100.0, 60.0, 30.0), seed=0, bulk=(0.1, 1.0)):
    """Eigenvalues with outliers above a bulk, in a random basis: (matrix, its eigenvectors in columns)."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    levels = np.concatenate([outliers, np.linspace(*bulk, n - len(outliers))])
    return torch.from_numpy(Q @ np.diag(levels) @ Q.T), torch.from_numpy(Q)


class Matrix:
    """A dense matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device

    def matmat(self, V):
        return V @ self.matrix


def quadratic(matrix, sizes, seed=0):
    """Parameters of these sizes at a random point, with the gradient of ``w'Hw/2`` as a function."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(size, generator=generator, dtype=matrix.dtype)) for size in sizes]

    def backward():
        with torch.no_grad():
            gradient = matrix @ torch.cat(parameters_flat(parameters))
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view(p.shape).clone()

    return parameters, backward


def parameters_flat(parameters):
    return [p.detach().reshape(-1) for p in parameters]


def flat(parameters):
    return torch.cat(parameters_flat(parameters)).clone()


def applied(optimizer, base, parameters, backward):
    """One step with and one without the preconditioner from the same state: (its step, the base's), flat."""
    backward()
    before = flat(parameters)
    state = {p: {k: v.clone() if torch.is_tensor(v) else v for k, v in base.state[p].items()} for p in base.state}
    base.step()
    plain = flat(parameters) - before
    with torch.no_grad():
        for p, part in zip(parameters, before.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view(p.shape))
    for p, saved in state.items():
        base.state[p].clear()
        base.state[p].update(saved)
    optimizer.step()
    return flat(parameters) - before, plain


def preconditioned(base, **settings):
    """Shrinks along all levels that stand apart: small networks in Adam's metric have no gap of 2."""
    return SpectralPreconditioner(base, **{"gap": 1.0, **settings})
