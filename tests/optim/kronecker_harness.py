"""A small K-FAC with ``param_groups["damping"]``, and three small tasks, to drive a controller with.

An autoencoder and a classifier of digits, which the controller was made on; and a character model, which was chosen, with
its widths, learning rate and number of steps, before any number of it was seen: not an image, and its loss has a floor far
above 0, where that of the classifier nears interpolation.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class KroneckerSGD(torch.optim.Optimizer):
    """Momentum on ``(A + pi sqrt(damping))^-1 gradient (G + sqrt(damping) / pi)^-1`` per linear layer, as in K-FAC.

    Everything that changes is in ``state``, under the layer's weight.
    """

    def __init__(self, model, lr, damping, momentum=0.9, decay=0.95, refresh=5):
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        super().__init__(model.parameters(), {"lr": lr, "damping": damping, "momentum": momentum})
        self.decay, self.refresh = decay, refresh
        self._inputs, self._outputs = {}, {}
        for layer in self.layers:
            layer.register_forward_hook(self._forward)

    def _forward(self, layer, inputs, output):
        self._inputs[layer], self._outputs[layer] = inputs[0].detach(), output

    def observe(self, sampled_loss, count):
        """Factors from the backward pass of a loss whose targets were drawn from the model; a mean over ``count``."""
        outputs = [self._outputs[layer] for layer in self.layers]
        gradients = torch.autograd.grad(sampled_loss, outputs, retain_graph=True)
        with torch.no_grad():
            for layer, gradient in zip(self.layers, gradients, strict=True):
                entry = self.state[layer.weight]
                a = torch.cat([self._inputs[layer], torch.ones(count, 1)], dim=1)
                A, G = a.T @ a / count, gradient.T @ gradient * count
                seen = entry.get("seen", 0)
                keep = min(self.decay, 1 - 1 / (seen + 1))
                entry["A"] = A if seen == 0 else entry["A"] * keep + A * (1 - keep)
                entry["G"] = G if seen == 0 else entry["G"] * keep + G * (1 - keep)
                if seen % self.refresh == 0:
                    for name in "AG":
                        entry[f"l{name}"], entry[f"U{name}"] = torch.linalg.eigh(torch.nan_to_num(entry[name]))
                entry["seen"] = seen + 1
        self._inputs.clear()
        self._outputs.clear()

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        group = self.param_groups[0]
        for layer in self.layers:
            entry = self.state[layer.weight]
            g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
            lA, lG = entry["lA"].clamp_min(0), entry["lG"].clamp_min(0)
            pi = torch.sqrt((lA.mean() / lG.mean()).nan_to_num(1.0, 1.0).clamp(1e-3, 1e3))
            root = math.sqrt(group["damping"])
            curvature = (lG[:, None] + root / pi) * (lA[None] + root * pi)
            g = entry["UG"] @ ((entry["UG"].T @ g @ entry["UA"]) / curvature) @ entry["UA"].T
            for p, part in ((layer.weight, g[:, :-1]), (layer.bias, g[:, -1])):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(part)
                p.sub_(group["lr"] * momentum)
        return loss


#: Steps and learning rate of each task; the widths of its layers.
SCHEDULE = {"autoencoder": (400, 1.0), "classifier": (300, 0.3), "characters": (300, 0.3)}
WIDTHS = {
    "autoencoder": (64, 48, 16, 8, 16, 48, 64),
    "classifier": (64, 64, 32, 10),
    "characters": (6 * 29, 64, 32, 29),
}


@cache
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


@cache
def characters(context=6, count=20_000):
    """Python's own help: the letters, spaces, full stops and what is left; the one that follows six others."""
    alphabet = "abcdefghijklmnopqrstuvwxyz ."
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).lower().split())[: count + context]
    codes = torch.tensor([alphabet.find(letter) % (len(alphabet) + 1) for letter in text])
    seen = F.one_hot(codes.unfold(0, context, 1)[:-1], len(alphabet) + 1)
    return seen.flatten(1).float(), codes[context:]


class Task:
    """A model with its loss and its sampled loss."""

    def __init__(self, kind, seed, widths=None):
        self.x, self.y = characters() if kind == "characters" else digits()
        self.kind = kind
        self.random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        layers = [
            piece for a, b in itertools.pairwise(widths or WIDTHS[kind]) for piece in (nn.Linear(a, b), nn.Tanh())
        ]
        self.model = nn.Sequential(*layers[:-1])

    def batch(self, size=128):
        return torch.randint(len(self.x), (size,), generator=self.random)

    def loss(self, rows, output=None):
        output = self.model(self.x[rows]) if output is None else output
        if self.kind == "autoencoder":
            return F.mse_loss(output, self.x[rows])
        return F.cross_entropy(output, self.y[rows])

    def sampled_loss(self, output):
        if self.kind == "autoencoder":
            noise = torch.randn(output.shape, generator=self.random) * math.sqrt(2 / output.shape[1])
            return (output * noise).sum(1).mean()
        drawn = torch.multinomial(output.detach().softmax(1), 1, generator=self.random)[:, 0]
        return F.cross_entropy(output, drawn)

    def final(self):
        with torch.no_grad():
            value = float(self.loss(slice(None)))
        return value if value < 1e3 else math.inf


def train(kind, damping, steps, lr, seed=0, controller=None, momentum=0.9, batch=128, refresh=5, widths=None):
    """Final loss over all data, infinite where it diverged, and the last damping."""
    task = Task(kind, seed, widths)
    optimizer = KroneckerSGD(task.model, lr, damping, momentum, refresh=refresh)
    if controller is not None:
        controller.attach(optimizer)
    for _ in range(steps):
        rows, others = task.batch(batch), task.batch(batch)
        output = task.model(task.x[rows])
        loss = task.loss(rows, output)
        if not math.isfinite(loss.item()) and controller is None:
            break
        optimizer.zero_grad()
        optimizer.observe(task.sampled_loss(output), len(rows))
        loss.backward()
        if controller is None:
            optimizer.step()
        else:
            controller.step(partial(task.loss, rows), partial(task.loss, others), before=loss)
    return task.final(), optimizer.param_groups[0]["damping"]
