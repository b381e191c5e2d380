"""A small K-FAC on digits from dampings that are decades apart: left where they start, and set by a controller.

Prints a table and draws it, about a minute on one thread:

    python examples/tune_damping.py [--output tune_damping.png]

Two lines of it are about the controller: they are marked. It doesn't win everywhere: with ``--lr 0.1 --momentum 0.9``
two seeds of three end at tens of times the loss of the best fixed damping (docs/damping.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_rmt import DampingController

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEEDS = (0, 1, 2)
DECAY = 0.95  # of the factors' averages
FAILED = 100.0  # above it a run has diverged; ten classes at random: 2.3
FIXED, CONTROLLED = "#b2502f", "#1f5f99"


class KFAC(torch.optim.Optimizer):
    """Linear layers' gradients times ``(G + root(damping) / pi)^-1`` and ``(A + root(damping) pi)^-1``, with momentum.

    Martens and Grosse 2015, without their rescaling of whole steps.
    """

    def __init__(self, model: nn.Module, lr: float, damping: float, momentum: float = 0.0) -> None:
        super().__init__(model.parameters(), {"lr": lr, "damping": damping, "momentum": momentum})
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(lambda layer, inputs, output: self.seen.update({layer: (inputs[0], output)}))

    def observe(self, logits: Tensor, drawn: Tensor) -> None:
        """Averages the two factors of each layer, from labels that the model itself has drawn."""
        seen = [
            self.seen.pop(layer) for layer in self.layers
        ]  # a cache is gone before the step, so no state to be put back
        outputs = [output for _, output in seen]
        gradients = torch.autograd.grad(cross_entropy(logits, drawn, reduction="sum"), outputs, retain_graph=True)
        for layer, (inputs, _), gradient in zip(self.layers, seen, gradients, strict=True):
            inputs = torch.cat([inputs.detach(), torch.ones(len(inputs), 1)], dim=1)
            state = self.state[layer.weight]
            state["count"] = state.get("count", 0) + 1
            share = max(1 - DECAY, 1 / state["count"])  # a plain mean at first
            for name, x in (("A", inputs), ("G", gradient)):
                state[name] = torch.lerp(state.get(name, torch.zeros(())), x.T @ x / len(x), share)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        root = math.sqrt(group["damping"])
        for layer in self.layers:
            state = self.state[layer.weight]
            pi = torch.sqrt(state["A"].diagonal().mean() / state["G"].diagonal().mean()).clamp(1e-3, 1e3)
            A, G = (state[name] + root * by * torch.eye(len(state[name])) for name, by in (("A", pi), ("G", 1 / pi)))
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
            direction = torch.linalg.solve(G, torch.linalg.solve(A, gradient, left=False))
            for p, part in ((layer.weight, direction[:, :-1]), (layer.bias, direction[:, -1])):
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(group["lr"] * average.mul_(group["momentum"]).add_(part))


def train(
    start: float, controller: DampingController | None, *, steps: int, lr: float, momentum: float, seed: int
) -> tuple[float, float]:
    """Final loss over all digits, and the damping at the end."""
    torch.manual_seed(seed)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer = KFAC(model, lr, start, momentum)
    if controller is not None:
        controller.attach(optimizer)  # finds param_groups["damping"]

    def loss_of(rows: Tensor) -> Tensor:
        return cross_entropy(model(x[rows]), y[rows])

    for rows, others in torch.randint(len(x), (steps, 2, 128)):
        logits = model(x[rows])
        loss = cross_entropy(logits, y[rows])
        if controller is None and not math.isfinite(loss.item()):
            return math.inf, start
        optimizer.zero_grad()
        optimizer.observe(logits, torch.multinomial(logits.detach().softmax(1), 1)[:, 0])
        loss.backward()
        if controller is not None:  # in place of optimizer.step()
            controller.step(lambda r=rows: loss_of(r), lambda r=others: loss_of(r), before=loss)
        else:
            optimizer.step()
    with torch.no_grad():
        final = float(cross_entropy(model(x), y))
    return (final if final < FAILED else math.inf), optimizer.param_groups[0]["damping"]


def draw(fixed: dict[float, list[float]], controlled: dict[float, list[float]], output: Path) -> None:
    """Final loss against starting damping: medians, a line from the smallest to the largest, diverged runs at the top."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    drawn = [loss for runs in (fixed, controlled) for losses in runs.values() for loss in losses if math.isfinite(loss)]
    top = 6 * max(drawn)
    for name, runs, color, marker in (("left there", fixed, FIXED, "s"), ("controlled", controlled, CONTROLLED, "o")):
        middle = {start: median(losses) for start, losses in runs.items()}
        kept = {start: loss for start, loss in middle.items() if math.isfinite(loss)}
        axes.plot(list(kept), list(kept.values()), color=color, marker=marker, markersize=5, label=name)
        axes.vlines(
            list(kept), [min(runs[start]) for start in kept], [min(max(runs[start]), top) for start in kept], color
        )
        lost = [start for start in middle if start not in kept]
        if lost:
            axes.plot(lost, [top] * len(lost), "^", color=color, markerfacecolor="white", label=f"{name}: diverged")
    axes.set(xscale="log", yscale="log", xlabel="damping at the start", ylabel="final loss (median, range of seeds)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(output, dpi=200)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[tuple[float, list[float], list[float], list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=float, nargs="+", default=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--output", type=Path, default=Path("tune_damping.png"))
    args = parser.parse_args(arguments)
    options = {"steps": args.steps, "lr": args.lr, "momentum": args.momentum}

    rows = []
    for start in args.starts:
        fixed = [train(start, None, seed=seed, **options)[0] for seed in args.seeds]
        controlled = (train(start, DampingController(mode="control"), seed=seed, **options) for seed in args.seeds)
        losses, dampings = zip(*controlled, strict=True)
        rows.append((start, fixed, list(losses), list(dampings)))
    shown = [(f"{start:g}", *(", ".join(f"{v:.2g}" for v in values) for values in rest)) for start, *rest in rows]
    columns = ("damping at start", "loss, left there", "loss, controlled", "damping at end")
    print(tabulate(shown, headers=columns, disable_numparse=True))
    draw({row[0]: row[1] for row in rows}, {row[0]: row[2] for row in rows}, args.output)
    print(f"\nfinal losses over all digits, seed by seed; inf: above {FAILED:g}. Drawn: {args.output}")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)  # for a network this small, more threads only wait for each other
    main()
