"""The monitor on models as people train them: the truth about their Hessians, and not a bit of their training changed.

The truth shares nothing with the monitor: a fresh module with the weights of the probe, in float64, and central differences
of its gradients, by the model's own kernels (fused attention and all). The monitor differentiates twice, in the training's
precision, on the live module.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
import torch
from harness import differences, train
from numpy.typing import NDArray
from real_models import MODELS, Real
from torch import Tensor

from lightning_rmt import SpectrumMonitor
from lightning_rmt.live.seeds import mixed_seed

STEP = 1e-6
EVERY = 8  # steps: of two epochs of six batches, probes come after steps 0, 5 and 10


class Watched(SpectrumMonitor):
    """Keeps what its last reading was taken of: the weights, and a copy of the batch from before the step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.batch = copy.deepcopy(batch), batch_idx

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = self.reading
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.reading is not before:
            self.weights, self.captured = copy.deepcopy(pl_module.state_dict()), self.batch


def double(value: Any) -> Any:
    """A copy of a batch, floats in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if hasattr(value, "items"):
        return {key: double(item) for key, item in value.items()}
    return [double(item) for item in value]


def dense_hessian(real: Real, monitor: Watched) -> tuple[NDArray[np.float64], list[str]]:
    """The Hessian of the monitor's last reading, and which parameter each row belongs to."""
    module = real.case.module().double()
    module.load_state_dict(monitor.weights)
    module.log = lambda *args, **kwargs: None  # there is no Trainer
    patterns = real.parameters or ["*"]
    chosen = {n: p for n, p in module.named_parameters() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    batch, batch_idx = monitor.captured

    def gradient() -> Tensor:
        torch.manual_seed(mixed_seed(monitor.seed, monitor.reading.step, 0))  # of the masks of dropout
        own = double(batch)
        loss = module.training_step(own, batch_idx) if real.loss is None else real.loss(module, own)
        assert loss.dtype == torch.float64
        found = torch.autograd.grad(loss, chosen.values(), allow_unused=True, materialize_grads=True)
        return torch.cat([g.to_dense().reshape(-1) for g in found])

    rows = []
    for p in chosen.values():
        flat = p.detach().view(-1)
        for i in range(p.numel()):
            value = flat[i].item()
            flat[i] = value + STEP
            ahead = gradient()
            flat[i] = value - STEP
            rows.append((ahead - gradient()) / (2 * STEP))
            flat[i] = value
    H = torch.stack(rows).numpy()
    assert len(H) <= 400
    return (H + H.T) / 2, [n for n, p in chosen.items() for _ in range(p.numel())]


@pytest.mark.parametrize("real", MODELS, ids=str)
def test_truth_and_bitwise_neutrality(real, tmp_path):
    import time
    t0=time.time()
    control = train(real.case, tmp_path)
    t1=time.time()
    monitor = Watched(
        every_n_steps=EVERY if "acc" not in str(real) else 2,
        parameters=real.parameters,
        levels=None if real.block is None else [real.block],
        figures_every=0,
        lanczos_steps=50,
        on_error="raise",
    )
    changed = differences(train(real.case, tmp_path, monitor), control)
    t2=time.time()
    H, names = dense_hessian(real, monitor)
    t3=time.time()
    reading = monitor.reading
    spectrum = reading.spectrum
    truth = np.linalg.eigvalsh(H)
    scale = abs(truth).max()
    print("\n###", real, "times %.2f %.2f %.2f" % (t1-t0, t2-t1, t3-t2), "n", len(H), "probes", len(monitor.history), "changed", changed)
    print("notes", reading.notes, reading.product, reading.product_error)
    print("max", spectrum.lambda_max, truth[-1], (spectrum.lambda_max.value-truth[-1])/scale)
    print("min", spectrum.lambda_min, truth[0], (spectrum.lambda_min.value-truth[0])/scale)
    print("trace", spectrum.trace, truth.sum(), "frob", spectrum.frobenius, np.linalg.norm(truth), "products", spectrum.products, len(spectrum.top))
    if reading.levels:
        mine = [i for i, name in enumerate(names) if fnmatchcase(name, real.block)]
        t = np.linalg.eigvalsh(H[np.ix_(mine, mine)])
        b = reading.levels[0]
        print("levels", b.eigenvalues.shape, np.abs(b.eigenvalues[0]-t).max()/abs(t).max(), b.noise/abs(t).max(), abs(t).max())
