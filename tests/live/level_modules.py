"""Modules for level statistics, monitors that take them, and the dense Hessian of a block of theirs at a probe."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from harness import Case, train
from live_models import CLASSES, Classifier, vectors
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature.kernels import twice_differentiable_kernels


def headed() -> nn.Sequential:
    """Three layers, the last of which, with 315 parameters, has enough for a block of its own."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 15))


class Headed(Classifier):
    def __init__(self) -> None:
        super().__init__(headed())


CASE = Case("headed", Headed, vectors)


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(
        **{"every_n_steps": 6, "lanczos_steps": 4, "figures_every": 0, "on_error": "raise", **options}
    )


def note(watch: SpectrumMonitor) -> str:
    """Why the last reading has no levels."""
    assert watch.reading.levels == ()
    (found,) = (n for n in watch.reading.notes if "no level statistics" in n)
    return found


class Spy(pl.Callback):
    """Copies of the module as it is when a monitor behind it measures, and of the batches before that, by step."""

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(copy.deepcopy(batch))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step - 1
        whole = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in pl_module.state_dict().items()}
        self.states[step] = copy.deepcopy(whole)  # gathered where it is sharded

    def levels(self, module: Any, step: int, names: list[str], count: int = 1, keep: int | None = None) -> np.ndarray:
        """Levels of the named parameters on each of the last `count` batches, shape (count, size)."""
        twin = copy.deepcopy(module).double()
        twin.load_state_dict(self.states[step])
        batches = self.batches[step + 1 - count : step + 1]
        return np.stack([dense_levels(twin, batch, names, keep) for batch in batches])


def spied(directory: Path, watch: SpectrumMonitor, case: Case = CASE) -> Spy:
    """Trains with a spy in front of the monitor, and nothing else changed by either."""
    spy = Spy()
    train(replace(case, trainer=lambda: {**case.trainer(), "callbacks": [spy]}), directory, watch)
    return spy


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()


def dense_levels(module: nn.Module, batch: Any, names: list[str], keep: int | None = None) -> np.ndarray:
    """Row by row; the module is double."""
    x, y = batch
    block = [dict(module.named_parameters())[name] for name in names]
    for m in module.modules():
        if isinstance(m, nn.Embedding):
            m.sparse, m.max_norm = False, None
    with twice_differentiable_kernels():  # tested on their own; the usual ones err in weight normalisation
        loss = F.cross_entropy(module(x.double() if x.is_floating_point() else x), y)
        gradients = torch.autograd.grad(loss, block, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradients])[:keep]
        rows = [torch.autograd.grad(entry, block, retain_graph=True) for entry in flat]
    matrix = torch.stack([torch.cat([part.reshape(-1) for part in row])[:keep] for row in rows]).numpy()
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


class Block(nn.Module):
    """Pre-norm, causal."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + self.mlp(self.norm2(x))


class TinyGpt(nn.Module):
    """As Hugging Face has it: the head shares the embedding's weight, rotations are complex buffers."""

    def __init__(self, vocabulary: int = 10, width: int = 12) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        angles = torch.outer(torch.arange(5.0), torch.arange(width / 2))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.rotations).flatten(-2)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))[:, -1]


class Pooled(nn.Module):
    """Tokens through a layer of the caller's to a mean and a head."""

    def __init__(self, layer: nn.Module, **embedding: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12, **embedding)
        self.layer = layer
        self.head = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))
