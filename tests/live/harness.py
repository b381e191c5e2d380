"""The bitwise harness: trains a case, with a probe or without, and takes fingerprints of everything that training is.

Two runs are the same training when their fingerprints agree in every entry. Everything that takes part in a run is built
afresh for it: an object shared between two runs (a gradient scaler, say) would carry state over and fake a difference.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rmt.live.fence import fence
from lightning_rmt.live.sharding import unsharded

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes, which would outlive its test
Fingerprint = dict[str, list[str]]

EVERY = 3  # hook calls, or steps, from probe to probe
PRODUCTS = 3


@dataclass(frozen=True)
class Case:
    """One way of training: factories, called once per run."""

    name: str
    module: Callable[[], Any]
    loader: Callable[[], DataLoader]
    trainer: Callable[[], dict[str, Any]] = dict
    validation: bool = False
    loss_fn: Callable[[Any, Any], Any] | None = None
    compiled: str | None = None  # a backend of torch.compile
    hooks: tuple[str, ...] = ("on_train_batch_end",)
    ignore: tuple[str, ...] = ()  # message patterns of third-party warnings
    trained: Callable[[Any], Any] = field(default=lambda module: None)  # something of the case's own to compare

    def __str__(self) -> str:
        return self.name


def digest(value: Any) -> str:
    """A hash of a nested structure of tensors, arrays and plain values, down to the last bit."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    value = getattr(value, "_local_tensor", value)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.to_dense() if value.is_sparse else value).contiguous()
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            sha.update(repr(key).encode())
            _feed(sha, item)
    elif isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        sha.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


class RowLogger(Logger):
    """Keeps every logged row, and every call on its experiment, in memory."""

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self._save_dir = save_dir

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def experiment(self) -> RowLogger:
        return self

    def add_scalar(self, tag: str, value: float, step: int = 0) -> None:
        self.rows.append((tag, float(value), step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {key: value for key, value in metrics.items() if not key.startswith("rmt/")}
        if own:
            self.rows.append((dict(own), step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Recorder(pl.Callback):
    """Takes the fingerprints. Comes after the probe in the list of callbacks, so it sees what the probe left."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.prints: Fingerprint = {}

    def _note(self, entry: str, value: Any) -> None:
        self.prints.setdefault(entry, []).append(digest(value))

    def _hook(self, hook: str, module: Any) -> None:
        self._note("torch generator", torch.get_rng_state())
        self._note("numpy generator", np.random.get_state())
        self._note("python generator", random.getstate())
        self._note("gradients", (hook, [p.grad for p in module.parameters()]))
        self._note("flags", [(m.training, [p.requires_grad for p in m.parameters(False)]) for m in module.modules()])
        self._note("buffers", {name: b for m in module.modules() for name, b in m._buffers.items()})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._hook("start", pl_module)
        self._note("batches", batch)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._hook("zero", pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._hook("backward", pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._hook("step", pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._hook("end", pl_module)
        self._note("loss", outputs)
        self._note("learning rates", [group["lr"] for o in trainer.optimizers for group in o.param_groups])
        self._note("scaler", getattr(trainer.precision_plugin, "state_dict", dict)())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._hook("trained", pl_module)
        self._note("weights", dict(pl_module.named_parameters()))
        self._note("state_dict", pl_module.state_dict())
        self._note("optimizers", [list(_optimizer_state(o, pl_module)) for o in trainer.optimizers])
        self._note("schedulers", [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs])
        self._note("progress", trainer.fit_loop.state_dict())
        self._note("global step", (trainer.global_step, trainer.current_epoch))
        self._note("callback metrics", dict(trainer.callback_metrics))
        self._note("own", self.case.trained(pl_module))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("rows", [row for logger in trainer.loggers for row in logger.rows])


def _optimizer_state(optimizer: Any, module: Any) -> Any:
    """The state by position of the parameter: an optimizer's own state_dict refuses parameters it doesn't know."""
    for group in optimizer.param_groups:
        yield {key: value for key, value in group.items() if key != "params"}
        yield [optimizer.state.get(p) for p in group["params"]]


def differences(one: Fingerprint, other: Fingerprint) -> list[str]:
    """The entries in which two runs differ; empty for the same training."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def train(case: Case, directory: Path, probe: pl.Callback | None = None, checkpoint: Path | None = None) -> Fingerprint:
    """Train the case once, from fresh objects and the same seeds (or the checkpoint), and return its fingerprint."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    module = case.module()
    options = case.trainer()
    callbacks = options.pop("callbacks", [])
    recorder = Recorder(case)
    with warnings.catch_warnings():
        for pattern in ("You defined a `validation_step` but have no `val_dataloader`", *case.ignore):
            warnings.filterwarnings("ignore", message=pattern)
        trainer = pl.Trainer(
            **{
                "max_epochs": 2,
                "accelerator": "cpu",
                "devices": 1,
                "logger": RowLogger(directory),
                "default_root_dir": directory,
                "log_every_n_steps": 2,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "limit_val_batches": 1.0 if case.validation else 0,
                "num_sanity_val_steps": 0,
                "callbacks": [*callbacks, *([] if probe is None else [probe]), recorder],
                **options,
            }
        )
        fitted = module
        if case.compiled:
            torch._dynamo.reset()  # or it gives up compiling the same step again and again for new modules
            torch._dynamo.utils.counters.clear()
            fitted = torch.compile(module, backend=case.compiled)
        loader = case.loader()
        validation = DataLoader(loader.dataset, batch_size=4) if case.validation else None
        try:
            trainer.fit(fitted, loader, validation, ckpt_path=checkpoint)
        finally:
            torch.use_deterministic_algorithms(False)  # which Trainer(deterministic=True) leaves behind
    if case.compiled:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs > 0
        recorder.prints["graphs"] = [str(graphs)]
    return recorder.prints


class ProductProbe(pl.Callback):
    """A few Hessian-vector products behind the fence, at every third call of one hook, or every `every`-th one.

    What a monitor does, without its schedule, loss and logging; and it can be placed at hooks that the monitor doesn't
    use. The loss is the case's function, or `training_step` on a copy of the batch, taken before the step could change
    it.
    """

    def __init__(self, case: Case, hook: str = "on_train_batch_end", every: int = EVERY) -> None:
        self.case = case
        self.every = every
        self.taken = 0
        self.calls = 0
        self.hook = hook
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = (copy.deepcopy(batch), batch_idx)
        self._due("on_train_batch_start", trainer, pl_module)

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._due("on_before_zero_grad", trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._due("on_before_optimizer_step", trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._due("on_train_batch_end", trainer, pl_module)

    def _due(self, hook: str, trainer: Any, module: Any) -> None:
        if hook == self.hook and not trainer.fit_loop._skip_backward:
            self.calls += 1
            if self.calls % self.every == 1 % self.every:
                self.probe(trainer, module)
                self.taken += 1

    def probe(self, trainer: Any, module: Any) -> None:
        with fence(trainer, module, seed=trainer.global_step), unsharded(module):
            self.products(self.loss(module), module)

    def loss(self, module: Any) -> Tensor:
        batch, batch_idx = copy.deepcopy(self._batch)
        if self.case.loss_fn is not None:
            return self.case.loss_fn(module, batch)
        with_index = "batch_idx" in inspect.signature(module.training_step).parameters
        output = module.training_step(batch, batch_idx) if with_index else module.training_step(batch)
        return output["loss"] if isinstance(output, dict) else output

    def products(self, loss: Tensor, module: Any) -> list[Tensor]:
        """`PRODUCTS` powers of the Hessian on a start vector, as one flat vector each."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        generator = torch.Generator().manual_seed(0)
        vectors = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        flat = []
        for _ in range(PRODUCTS):
            paired = [(g, v) for g, v in zip(gradient, vectors, strict=True) if g.requires_grad]
            vectors = torch.autograd.grad(
                [g for g, _ in paired],
                parameters,
                [v for _, v in paired],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            flat.append(torch.cat([v.detach().reshape(-1) for v in vectors]))
        return flat
