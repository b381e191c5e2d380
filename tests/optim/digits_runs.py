"""A small network on digits, trained with an optimizer that somebody else wrote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kronecker_harness import digits
from torch import nn


class DigitsRun:
    """Two linear layers, cross entropy, batches of 128, all from one seed."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.x, self.y = digits()
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.parameters = list(self.model.parameters())
        self.random = torch.Generator().manual_seed(seed + 1)

    def rows(self):
        return torch.randint(len(self.x), (128,), generator=self.random)

    def loss(self, rows=slice(None)):
        return F.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def final(self):
        with torch.no_grad():
            return float(self.loss())

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def train(self, optimizer, steps, control=None, create_graph=False, take=None, after=None):
        """Final loss over all data; ``take(rows)`` in place of ``optimizer.step``, ``after()`` behind each step."""
        for _ in range(steps):
            rows, others = self.rows(), self.rows()
            optimizer.zero_grad()
            loss = self.loss(rows)
            loss.backward(create_graph=create_graph)
            step = optimizer.step if take is None else take(rows)
            if control is None:
                step()
            else:
                given = None if take is None else step
                control.step(
                    lambda r=rows: self.loss(r), lambda r=others: self.loss(r), before=loss.detach(), take=given
                )
            if after is not None:
                after()
        return self.final()
