"""The monitor on models as people train them: the truth about their Hessians, and not a bit of their training changed.

The truth shares nothing with the monitor but the seed of dropout's masks: a fresh module with the weights of the probe, in
float64, and central differences of its gradients, by the model's own kernels (fused attention and all). The monitor
differentiates twice, in the training's precision, on the live module.
"""

from __future__ import annotations

import copy
import shutil
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Fingerprint, ProductProbe, differences, train
from numpy.typing import NDArray
from real_models import MODELS, FineTuned, Real
from torch import Tensor

import lightning_rmt.live.fence
from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature.graph_memory import graph_nodes
from lightning_rmt.live.seeds import mixed_seed

STEP = 1e-6  # of the differences: their error is 1e-9 of the largest eigenvalue, whichever way
Matrix = NDArray[np.float64]


class Watched(SpectrumMonitor):
    """Keeps what its last reading was taken of: the weights, and a copy of the batch from before the step."""

    inside = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.batch = copy.deepcopy(batch), batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before, self.inside = self.reading, True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.inside = False
        if self.reading is not before:
            self.weights, self.captured = copy.deepcopy(pl_module.state_dict()), self.batch


def watch(real: Real, **options: Any) -> Watched:
    return Watched(
        every_n_steps=real.every,
        lanczos_steps=50,
        parameters=None if real.parameters is None else list(real.parameters),
        levels=None if real.block is None else [real.block],
        loss_fn=real.case.loss_fn,
        figures_every=0,
        on_error="raise",
        **options,
    )


@cache
def control(real: Real, directory: Path) -> Fingerprint:
    return train(real.case, directory)


@cache
def watched(real: Real, directory: Path) -> tuple[Watched, Fingerprint]:
    monitor = watch(real)
    return monitor, train(real.case, directory, monitor)


def model(name: str) -> Real:
    return next(real for real in MODELS if real.case.name == name)


def double(value: Any) -> Any:
    """A copy of a batch, floats in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if hasattr(value, "items"):
        return {key: double(item) for key, item in value.items()}
    return [double(item) for item in value]


def dense_hessian(real: Real, weights: Any, batch: Any, batch_idx: int, seed: int) -> tuple[Matrix, list[str]]:
    """The Hessian at some weights and a batch, and which parameter each of its rows belongs to."""
    module = real.case.module().double()
    module.load_state_dict(weights)
    module.log = lambda *args, **kwargs: None  # there is no Trainer
    patterns = real.parameters or ("*",)
    chosen = {n: p for n, p in module.named_parameters() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    assert sum(p.numel() for p in chosen.values()) <= 400

    def gradient() -> Tensor:
        torch.manual_seed(seed)
        own = double(batch)
        loss = module.training_step(own, batch_idx) if real.loss is None else real.loss(module, own)
        assert loss.dtype == torch.float64
        found = torch.autograd.grad(loss, chosen.values(), allow_unused=True, materialize_grads=True)
        return torch.cat([g.to_dense().reshape(-1) for g in found])

    rows = []
    for flat in (p.detach().view(-1) for p in chosen.values()):
        for i, value in enumerate(flat.tolist()):
            flat[i] = value + STEP
            ahead = gradient()
            flat[i] = value - STEP
            rows.append((ahead - gradient()) / (2 * STEP))
            flat[i] = value
    H = torch.stack(rows).numpy()
    return (H + H.T) / 2, [n for n, p in chosen.items() for _ in range(p.numel())]


def of_reading(real: Real, monitor: Watched) -> tuple[Matrix, list[str]]:
    """The Hessian that the monitor's last reading is about, with its masks of dropout."""
    seed = mixed_seed(monitor.seed, monitor.reading.step, 0)
    return dense_hessian(real, monitor.weights, *monitor.captured, seed)


def misses(real: Real, monitor: Watched, H: Matrix, names: list[str]) -> set[str]:
    """Which numbers of the reading are not those of the matrix."""
    spectrum, truth = monitor.reading.spectrum, np.linalg.eigvalsh(H)
    scale = abs(truth).max()
    near = real.tolerance * scale
    held = {
        "lambda_max": abs(spectrum.lambda_max.value - truth[-1]) <= near,
        "lambda_min": abs(spectrum.lambda_min.value - truth[0]) <= near,
        "residuals": abs(spectrum.lambda_max.value - truth[-1]) <= spectrum.lambda_max.residual + 1e-8 * scale
        and abs(spectrum.lambda_min.value - truth[0]) <= spectrum.lambda_min.residual + 1e-8 * scale,
        "top": all(abs(t.value - v) <= near for t, v in zip(spectrum.top, truth[::-1], strict=False)),
        "bottom": all(abs(b.value - v) <= near for b, v in zip(spectrum.bottom, truth, strict=False)),
        "trace": abs(spectrum.trace.mean - truth.sum()) <= 4 * spectrum.trace.stderr + near,
        "norm": abs(spectrum.frobenius.mean - np.linalg.norm(truth)) <= 4 * spectrum.frobenius.stderr + near,
    }
    for levels in monitor.reading.levels:
        mine = [i for i, name in enumerate(names) if fnmatchcase(name, real.block)]
        exact = np.linalg.eigvalsh(H[np.ix_(mine, mine)])
        held["exact block"] = abs(levels.eigenvalues - exact).max() <= 1e-8 * abs(exact).max()
    return {what for what, ok in held.items() if not ok}


INDUCTOR = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
)


@pytest.mark.parametrize(
    "real", [pytest.param(real, marks=INDUCTOR if real.case.compiled == "inductor" else ()) for real in MODELS], ids=str
)
def test_truth_and_bitwise_neutrality(real, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    monitor, prints = watched(real, directory)
    assert differences(prints, control(real, directory)) == []
    reading = monitor.reading
    assert len(monitor.history) >= 2
    assert misses(real, monitor, *of_reading(real, monitor)) == set()

    bag, casts = real.case.name == "EmbeddingBag", real.loss is not None and real.case.loss_fn is None
    assert reading.product == ("finite_difference" if bag else "exact")
    assert not bag or "no second derivative of _embedding_bag_backward" in reading.notes[0]
    assert len(reading.levels) == (not bag and not casts)
    assert not casts or "computed in torch.float32" in reading.notes[0]
    assert not casts or "(loss_fn=)" in reading.notes[0]
    assert not casts or "cross entropy of their logits" in reading.notes[0]
    assert len(reading.spectrum.top) >= (0 if "bf16-true" in real.case.name else 5)


@pytest.mark.parametrize("slip", ["other weights", "other masks of dropout", "other batch"])
def test_a_slip_would_be_seen(slip, tmp_path_factory):
    """Against the Hessian of something else, most numbers of a reading are wrong."""
    real = model("accumulate 4")
    monitor, _ = watched(real, tmp_path_factory.getbasetemp())
    weights, (batch, batch_idx) = monitor.weights, monitor.captured
    seed = mixed_seed(monitor.seed, monitor.reading.step, 0)
    if slip == "other weights":
        weights = {name: 1.001 * tensor for name, tensor in weights.items()}
    elif slip == "other batch":
        batch = [batch[0].roll(1, dims=0), batch[1]]
    else:
        seed += 1
    found = misses(real, monitor, *dense_hessian(real, weights, batch, batch_idx, seed))
    assert {"lambda_max", "lambda_min", "residuals", "top", "bottom", "exact block"} <= found


@pytest.mark.parametrize(
    ("name", "part", "differ"),
    [("BERT", "randomness", {"loss", "weights"}), ("ResNet", "buffers", {"buffers", "state_dict"})],
)
def test_a_hole_in_the_fence_would_be_seen(name, part, differ, tmp_path_factory, monkeypatch):
    directory, real = tmp_path_factory.getbasetemp(), model(name)
    parts = tuple(p for p in lightning_rmt.live.fence.PARTS if p.__name__ != part)
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", parts)
    seen = differences(train(real.case, directory, ProductProbe(real.case)), control(real, directory))
    assert differ <= set(seen)


@pytest.mark.parametrize("name", ["GPT-2", "ViT"])
def test_attention_is_fused_in_training_and_not_inside_the_probe(name, tmp_path, monkeypatch):
    monitor, kernels, step = watch(model(name)), {True: [], False: []}, FineTuned.training_step

    def training_step(module, batch, batch_idx):
        loss = step(module, batch, batch_idx)
        kernels[monitor.inside].append(any("FlashAttention" in type(node).__name__ for node in graph_nodes([loss])))
        return loss

    monkeypatch.setattr(FineTuned, "training_step", training_step)
    train(model(name).case, tmp_path, monitor)
    if not any(kernels[False]):
        pytest.skip("no fused attention kernel on this CPU")
    assert all(kernels[False])
    assert kernels[True]
    assert not any(kernels[True])
    # and without the switch there is no Hessian
    parts = tuple(p for p in lightning_rmt.live.fence.PARTS if p.__name__ != "twice_differentiable")
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", parts)
    with pytest.raises(RuntimeError, match=r"_scaled_dot_product_flash_attention\w*backward is not implemented"):
        train(model(name).case, tmp_path, ProductProbe(model(name).case))
