"""Modules whose training step does more than compute a loss, for the bitwise harness."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from live_models import CLASSES, Classifier
from torch import Tensor, nn
from torch.nn import functional as F


class StepsInBackward(Classifier):
    """The optimizer steps inside the backward pass, parameter by parameter, as gradients become ready."""

    def __init__(self) -> None:
        super().__init__()
        fired: list[float] = []  # in a closure, where the fence doesn't reach
        for parameter in self.net.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)

            def step(p: Tensor, optimizer: Any = optimizer) -> None:
                fired.append(p.grad.sum().item())
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        self.fired = lambda: list(fired)

    def configure_optimizers(self) -> None:
        return None


class ScaledGradient(Classifier):
    """A hook halves the gradient of one parameter: no part of the loss, so no part of its curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        weight = self.net[0].weight
        weight.register_hook(lambda g: 0.5 * g)
        weight.register_hook(lambda g: self.seen.append(g.sum().item()))


class Meter:
    """A running mean that a user might write: a plain object."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.mean = 0.0

    def update(self, value: float) -> None:
        self.values.append(value)
        self.mean += (value - self.mean) / len(self.values)


class Nasty(Classifier):
    """Keeps state in every place that is no buffer, and lets it decide the loss, so that a slip shows in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0
        self.hist: list[float] = []
        self.nested: dict[str, Any] = {"sums": [0.0], "seen": set()}
        self.recent: deque[float] = deque(maxlen=3)
        self.average = torch.zeros(())  # a plain attribute, written to in place
        self.counts = np.zeros(CLASSES)
        self.meter = Meter()
        self.own = torch.Generator().manual_seed(3)
        self.own_numpy = np.random.default_rng(3)
        self.own_python = random.Random(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.n += 1
        loss = F.cross_entropy(self(x), y)
        self.hist.append(loss.item())
        self.nested["sums"][0] += loss.item()
        self.nested["seen"].add(self.n)
        self.recent.append(loss.item())
        self.average.mul_(0.9).add_(loss.detach())
        self.counts[y.numpy()] += 1
        self.meter.update(loss.item())
        noise = torch.randn(x.shape, generator=self.own) * self.own_numpy.random() * self.own_python.random()
        scale = 1 + 0.01 * (self.n + sum(self.hist) + self.nested["sums"][0] + self.average + self.counts[0])
        scale = scale + 0.01 * (sum(self.recent) + self.meter.mean + len(self.nested["seen"]))
        if hasattr(self, "last_loss"):
            scale = scale + self.last_loss.detach()
        self.last_loss = loss
        self.trainer.optimizers[0].param_groups[0]["lr"] *= 0.99
        if self.global_step > 0:
            self.lr_schedulers().step()
        metrics = self.trainer.callback_metrics
        metrics["steps"] = metrics.get("steps", torch.zeros(())) + 1
        return scale * F.cross_entropy(self(x + 0.1 * noise), y)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)]

    def state(self) -> Any:
        kept = (self.n, self.hist, self.nested["sums"], sorted(self.nested["seen"]), list(self.recent))
        return (*kept, self.average, self.counts, self.meter.values, self.last_loss, self.own.get_state())


class Stops(Classifier):
    """Asks for the end of the training when its step runs a second time on a batch, as if that had found a low loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if getattr(self, "last", None) == (self.current_epoch, batch_idx):
            self.trainer.should_stop = True
        self.last = (self.current_epoch, batch_idx)
        return super().training_step(batch, batch_idx)


class MutatesBatch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


class PopsBatch(Classifier):
    def training_step(self, batch: Any) -> Tensor:  # and takes no batch_idx
        y = batch.pop()
        return F.cross_entropy(self(batch.pop()), y)


class WritesToLogger(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.experiment.add_scalar("direct", loss.item(), self.global_step)
        self.logger.log_metrics({"metrics": loss.item()}, step=self.global_step)
        self.log("synced", loss, sync_dist=True)
        with self.trainer.profiler.profile("own"):
            return loss


class MomentumEncoder(Classifier):
    """BYOL: the step itself moves a target network towards the trained one, half of it in place, half by `.data =`.

    The target is hidden in a list, has running statistics of its own, and is trained mode.
    """

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)))
        target = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.hidden = [target.requires_grad_(False)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target = self.hidden[0]
        for i, (slow, fast) in enumerate(zip(target.parameters(), self.net.parameters(), strict=True)):
            if i % 2:
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
            else:
                slow.data = 0.9 * slow.data + 0.1 * fast.data
        return F.mse_loss(self(batch[0]), target(batch[0])) + super().training_step(batch, batch_idx)


class NormalisedPrototypes(Classifier):
    """SwAV: the step normalises rows of a trained weight in place before it uses them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net[3].weight.copy_(F.normalize(self.net[3].weight, dim=1))
        self.net[0].weight.data.clamp_(-0.3, 0.3)
        return super().training_step(batch, batch_idx)


class Plain(Classifier):
    """Without momentum, which sparse gradients don't go with."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Sequence(nn.Module):
    """Sparse embedding gradients, a rescaling embedding, an LSTM, fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, sparse=True)
        self.bounded = nn.Embedding(10, 8, max_norm=0.5)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(self.embed(x) + self.bounded(x))
        q = h.view(len(x), -1, 2, 4).transpose(1, 2)
        fused = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(h.shape)
        mixed, _ = self.attention(h, h, h)
        return self.head((fused + mixed).mean(1))
