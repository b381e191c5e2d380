"""A damped Newton method with the batch's own Hessian, and noisy quadratics to run it on."""

from __future__ import annotations

import numpy as np
import torch

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.spectrum import Spectrum


class DampedNewton(torch.optim.Optimizer):
    """``x -= lr m`` with ``m = momentum m + (H + damping)^-1 gradient``; H of ``self.loss``, set before each step."""

    def __init__(self, parameters, damping=1e-3, lr=1.0, momentum=0.0, key="damping"):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, key: damping})
        self.key, self.loss, self.taken = key, None, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                H = self.hessian(p)
                eye = torch.eye(len(H), dtype=p.dtype)
                if torch.isfinite(H).all():
                    direction = torch.linalg.solve(H + float(group[self.key]) * eye, p.grad)
                else:
                    direction = p.grad * float("nan")
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(direction)
                p.sub_(group["lr"] * buffer)

    def hessian(self, p):
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.loss(), p, create_graph=True)
            return torch.stack([torch.autograd.grad(part, p, retain_graph=True)[0] for part in g])


class NoisyQuadratic:
    """``x'(A + s X_b)x / 2 - b'x`` with a new X_b per batch, in float64; times ``scale``."""

    def __init__(self, n=60, noise=0.3, seed=0, scale=1.0, key="damping", **options):
        self.random = torch.Generator().manual_seed(seed)
        self.n, self.noise, self.scale = n, noise, scale
        self.A = torch.diag(torch.linspace(0.5, 5, n, dtype=torch.float64))
        self.b = torch.randn(n, dtype=torch.float64, generator=self.random)
        self.x = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.optimizer = DampedNewton([self.x], key=key, **options)

    def batch(self):
        X = torch.randn(self.n, self.n, dtype=torch.float64, generator=self.random)
        H = self.A + self.noise * (X + X.T) / (2 * self.n) ** 0.5
        return lambda: self.scale * (0.5 * self.x @ H @ self.x - self.b @ self.x)

    def run(self, controller, steps, **options):
        """The dampings after each step."""
        seen = []
        for _ in range(steps):
            own, other = self.batch(), self.batch()
            self.backward(own)
            controller.step(own, other, **options)
            seen.append(controller.damping)
        return seen

    def backward(self, loss):
        self.optimizer.loss = loss
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        return value


def goe_spectrum(scale=1.0, size=10_000):
    """Lanczos on a GOE matrix: the semicircle on [-2 scale, 2 scale]."""
    return Spectrum((Tridiagonal(np.zeros(100), np.full(100, scale)),), size, 100, 1e-14)


def positive_spectrum(scale=1.0, size=10_000):
    """The semicircle on [scale, 3 scale], as a true curvature."""
    return Spectrum((Tridiagonal(np.full(100, 2 * scale), np.full(100, scale / 2)),), size, 100, 1e-14)
