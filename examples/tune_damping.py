"""A small K-FAC on digits from dampings that are decades apart: left where they start, and set by a controller.

Prints a table and draws it, about a minute on one thread:

    python examples/tune_damping.py [--steps 200] [--output tune_damping.png]

Three lines of it are about the controller: they are marked. A library's optimizer goes in the same way
(examples/damped_optimizers.py, docs/damping.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_rmt import DampingController

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RATE, MOMENTUM, DECAY = 0.3, 0.9, 0.95
FAILED = 100.0  # ten classes at random: 2.3


class KFAC(torch.optim.Optimizer):
    """Linear layers' gradients times ``(G + root(damping))^-1`` and ``(A + root(damping))^-1``, with momentum.

    Martens and Grosse 2015, without their rescaling of steps and their factor pi.
    """

    def __init__(self, model: nn.Module, lr: float, damping: float) -> None:
        super().__init__(model.parameters(), {"lr": lr, "damping": damping})
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(lambda layer, inputs, output: self.seen.update({layer: (inputs[0], output)}))

    def observe(self, logits: Tensor, drawn: Tensor) -> None:
        """Averages the two factors of each layer, from labels that the model itself has drawn."""
        outputs = [self.seen[layer][1] for layer in self.layers]
        gradients = torch.autograd.grad(cross_entropy(logits, drawn, reduction="sum"), outputs, retain_graph=True)
        for layer, gradient in zip(self.layers, gradients, strict=True):
            inputs = self.seen[layer][0].detach()
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
            state = self.state[layer.weight]
            for name, x in (("A", inputs), ("G", gradient)):
                new = x.T @ x / len(x)
                state[name] = new if name not in state else DECAY * state[name] + (1 - DECAY) * new

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        root = math.sqrt(group["damping"])
        for layer in self.layers:
            state = self.state[layer.weight]
            A, G = (state[name] + root * torch.eye(len(state[name])) for name in "AG")
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
            direction = torch.linalg.solve(G, torch.linalg.solve(A, gradient, left=False))
            for p, part in ((layer.weight, direction[:, :-1]), (layer.bias, direction[:, -1])):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(group["lr"] * momentum.mul_(MOMENTUM).add_(part))


def train(start: float, controlled: bool, steps: int = 200, seed: int = 0) -> tuple[float, float]:
    """Final loss over all digits, and the damping at the end."""
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = KFAC(model, RATE, start)
    if controlled:
        controller = DampingController(mode="control").attach(optimizer)  # finds param_groups["damping"]
    for rows, others in torch.randint(len(x), (steps, 2, 128)):
        logits = model(x[rows])
        loss = cross_entropy(logits, y[rows])
        if not controlled and not math.isfinite(loss.item()):
            return math.inf, start
        optimizer.zero_grad()
        optimizer.observe(logits, torch.distributions.Categorical(logits=logits.detach()).sample())
        loss.backward()

        def of(batch: Tensor) -> Tensor:
            return cross_entropy(model(x[batch]), y[batch])

        if controlled:
            controller.step(lambda: of(rows), lambda: of(others), before=loss)  # in place of optimizer.step()
        else:
            optimizer.step()
    with torch.no_grad():
        final = float(cross_entropy(model(x), y))
    return (final if final < FAILED else math.inf), optimizer.param_groups[0]["damping"]


if __name__ == "__main__":
    import time
    torch.set_num_threads(1)
    for s in STARTS:
        t=time.process_time(); print(s, [train(s, False, seed=i)[0] for i in range(3)], time.process_time()-t, flush=True)
    for s in (1e-6,1.):
        t=time.process_time(); print(s, [train(s, True, seed=i) for i in range(3)], time.process_time()-t, flush=True)
