"""Many small networks with one hidden layer in one module, and the critical points of their losses.

The networks share nothing, so that the Hessian of the sum of their losses is block diagonal: one product takes one step, or
gives one column, of every network's Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import train_quietly

from lightning_rmt import GaussNewton, Hessian, Reading, SpectrumMonitor

#: n0, n1 and n2 of the paper's tanh networks.
WIDTH = 16
#: The damping of the search for critical points: where it starts, and its factor after a good step and after a bad one.
DAMPING, DOWN, UP = 1e-2, 1 / 4, 4.0
#: A step is solved for once its residual has fallen so far.
SOLVED = 1e-10
Data = tuple[Tensor, Tensor]


class Networks(pl.LightningModule):
    """Networks ``yhat = W2 f(W1 x)``, each with its own data; trained by Adam on all of it.

    Args:
        data: inputs, shape (networks, n0, m), and targets, shape (networks, n2, m), float64.
        hidden: n1.
        activation: f.
        seed: of the weights.
        levels: the energy at whose first passage a network's weights are kept, one each; None: at no energy.
        lr: at the start; it goes down to zero like a cosine.
    """

    def __init__(
        self,
        data: Data,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        seed: int,
        levels: Tensor | None = None,
        lr: float = 0.03,
    ) -> None:
        super().__init__()
        inputs, outputs = data[0].shape[1], data[1].shape[1]
        self.count, self.samples = data[0].shape[0], data[0].shape[2]
        random = torch.Generator().manual_seed(seed)

        def weights(rows: int, columns: int) -> nn.Parameter:
            drawn = torch.randn(self.count, rows, columns, generator=random, dtype=torch.float64)
            return nn.Parameter(drawn / math.sqrt(columns))

        self.W1, self.W2 = weights(hidden, inputs), weights(outputs, hidden)
        self.activation, self.levels, self.lr = activation, levels, lr
        self.size = hidden * (inputs + outputs)
        self.passed = torch.zeros(self.count, dtype=torch.bool)
        self.kept = self.weights()

    def outputs(self, data: Data) -> Tensor:
        return self.W2 @ self.activation(self.W1 @ data[0])

    def losses(self, outputs: Tensor, data: Data) -> Tensor:
        """L of every network: half the squared errors, summed over outputs, the mean over samples."""
        return (outputs - data[1]).square().sum((1, 2)) / (2 * self.samples)

    def energies(self, data: Data) -> NDArray[np.float64]:
        """``eps = L / n2`` of every network."""
        with torch.no_grad():
            return (self.losses(self.outputs(data), data) / data[1].shape[1]).cpu().numpy()

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        losses = self.losses(self.outputs(batch), batch)
        if self.levels is not None:
            below = losses.detach() / batch[1].shape[1] <= self.levels.to(losses)
            now = below & ~self.passed.to(below.device)
            if now.any():
                self.kept[now], self.passed = self.weights()[now], below | self.passed.to(below.device)
        return losses.sum()

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def weights(self) -> Tensor:
        """Copies, a row for every network."""
        return torch.cat([self.W1.detach().flatten(1), self.W2.detach().flatten(1)], dim=1)

    def put(self, weights: Tensor) -> None:
        with torch.no_grad():
            for parameter, part in zip((self.W1, self.W2), self._split(weights), strict=True):
                parameter.copy_(part.reshape(parameter.shape))

    def hessian(self, data: Data) -> Hessian:
        """Of the sum of the networks' losses."""
        return Hessian(lambda batch: self.losses(self.outputs(batch), batch).sum(), [self.W1, self.W2], [data])

    def gauss_newton(self, data: Data) -> GaussNewton:
        """H0 of all networks."""
        return GaussNewton(
            self.outputs, lambda outputs, batch: self.losses(outputs, batch).sum(), [self.W1, self.W2], [data]
        )

    def rows(self, flat: Tensor) -> Tensor:
        """An operator's vector as a row for every network."""
        first = self.W1.numel()
        return torch.cat([flat[:first].reshape(self.count, -1), flat[first:].reshape(self.count, -1)], dim=1)

    def flat(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return torch.cat([part.reshape(-1) for part in self._split(rows)])

    def dense(self, operator: Hessian | GaussNewton) -> NDArray[np.float64]:
        """Every network's matrix, shape (networks, size, size): a product gives one column of each."""
        columns = []
        for i in range(self.size):
            unit = torch.zeros(self.count, self.size, dtype=operator.dtype, device=operator.device)
            unit[:, i] = 1.0
            columns.append(self.rows(operator.matvec(self.flat(unit))))
        matrices = torch.stack(columns, dim=2)
        return ((matrices + matrices.mT) / 2).cpu().numpy()

    def subset(self, data: Data, which: slice) -> tuple[Networks, Data]:
        """Some of the networks at the weights that they kept, with their data."""
        part = (data[0][which], data[1][which])
        networks = Networks(part, self.W1.shape[1], self.activation, seed=0).to(part[0].device)
        networks.put(self.kept[which])
        return networks, part

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        first = self.W1[0].numel()
        return rows[:, :first], rows[:, first:]


def train(networks: Networks, data: Data, steps: int, *, watch: bool = True) -> Reading | None:
    """Trains with a Trainer; the reading of a `SpectrumMonitor` at the end, where it is to ``watch``.

    Networks that never came down to their level keep their last weights.
    """
    monitor = SpectrumMonitor(every_n_steps=steps - 1, probes=2, levels=None, figures_every=0, on_error="raise")
    train_quietly(networks, DataLoader([data] * steps, batch_size=None), [monitor] if watch else [], max_epochs=1)
    networks.to(data[0].device)
    late = ~networks.passed.cpu()
    networks.kept = networks.kept.to(data[0].device)
    networks.kept[late] = networks.weights()[late]
    return monitor.reading if watch else None


@dataclass(frozen=True)
class Search:
    """Where a search for critical points ended, an entry for every network.

    Attributes:
        energies: L / n2.
        gradients: J_g, the squared norm of the gradient of L.
        eigenvalues: of the Hessian, shape (networks, size), ascending.
        flatness: share of J_g along eigenvectors with ``|eigenvalue| < lambda_max / 100``. Near 1 what is left of the
            gradient lies where the Hessian is all but singular, and J_g falls slowly if at all: gradient-flat regions (Frye
            et al. 2021).
        products: operator products, one for all networks.
    """

    energies: NDArray[np.float64]
    gradients: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    flatness: NDArray[np.float64]
    products: int

    @property
    def index(self) -> NDArray[np.float64]:
        """Share of negative eigenvalues of every network."""
        return np.asarray((self.eigenvalues < 0).mean(axis=1))

    @staticmethod
    def join(parts: list[Search]) -> Search:
        """One search out of several over different networks."""
        fields = ("energies", "gradients", "eigenvalues", "flatness")
        return Search(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields), parts[0].products)


def find_critical_points(networks: Networks, data: Data, outer: int, inner: int) -> Search:
    """Minimises ``J_g = |grad L|^2`` from where the networks are, by products with the Hessian only.

    Levenberg-Marquardt: a step d solves ``(H^2 + mu) d = -H grad L``, by ``inner`` conjugate-gradient steps of two products
    each; a step that makes J_g larger isn't taken. Every network has its own mu and step lengths.
    """
    weights = networks.weights()
    H, products = networks.hessian(data), 0
    g = networks.rows(H.gradient)
    mu = torch.full_like(g[:, :1], DAMPING)
    tiny = torch.finfo(g.dtype).tiny

    def times_h(rows: Tensor) -> Tensor:
        return networks.rows(H.matvec(networks.flat(rows)))

    for _ in range(outer):
        d, r = torch.zeros_like(g), -g
        s = p = times_h(r)
        first = old = _squared(s)
        for _ in range(inner):
            q = times_h(p)
            solved = old <= SOLVED**2 * first  # further steps would be rounding's
            step = torch.where(solved, 0, old / (_squared(q) + mu * _squared(p) + tiny))
            d, r = d + step * p, r - step * q
            s = times_h(r) - mu * d
            new = _squared(s)
            p, old = torch.where(solved, p, s + new / (old + tiny) * p), torch.where(solved, old, new)
        products += H.products
        networks.put(weights + d)
        there = networks.rows(networks.hessian(data).gradient)
        gain = (_squared(g) - _squared(there)) / (_squared(g) - _squared(r) + tiny)
        weights = torch.where(gain > 0, weights + d, weights)
        mu = torch.where(gain > 0.5, mu * DOWN, torch.where(gain < 0.1, mu * UP, mu))
        networks.put(weights)
        H = networks.hessian(data)
        g = networks.rows(H.gradient)
    eigenvalues, vectors = np.linalg.eigh(networks.dense(H))
    along = np.einsum("ri,rij->rj", g.cpu().numpy(), vectors) ** 2
    flat = np.abs(eigenvalues) < eigenvalues[:, -1:] / 100
    J = along.sum(axis=1)
    return Search(networks.energies(data), J, eigenvalues, (along * flat).sum(axis=1) / J, products + H.products)


def _squared(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1, keepdim=True)
