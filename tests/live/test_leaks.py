"""Probes leave nothing behind: no tensor, no graph, no batch, no Trainer; and what they save is data."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from harness import Case, RowLogger, train
from live_models import Classifier, Metered, vectors
from torch import Tensor
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor

CASE = Case("mlp, SGD", Classifier, vectors)
WARM_UP, PROBES = 50, 500  # both at the third batch of an epoch of six, and where Lightning logs
GROWTH = 40_000  # bytes of resident memory per probe; a probe itself takes some megabytes of temporary ones


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(
        **{"every_n_steps": 1, "lanczos_steps": 3, "figures_every": 0, "on_error": "raise", **options}
    )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class Counts(pl.Callback):
    """Live tensors and resident memory after the warm-up and at the end."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.tensors: list[int] = []
        self.resident: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in (WARM_UP, self.last):
            self.tensors.append(live_tensors())
            self.resident.append(resident_bytes())

    @property
    def new_tensors(self) -> int:
        return self.tensors[1] - self.tensors[0]

    @property
    def grown(self) -> int:
        """Bytes per probe."""
        return (self.resident[1] - self.resident[0]) // (self.last - WARM_UP)


class Trained(Classifier):
    validation_step = pl.LightningModule.validation_step  # none, or Lightning warns of the missing data


def watched(directory: Path, watch: SpectrumMonitor, probes: int = PROBES) -> Counts:
    """Trains with a probe at every step, and nothing else that could grow."""
    counts = Counts(probes)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=probes + 1,
        accelerator="cpu",
        devices=1,
        callbacks=[watch, counts],
        logger=RowLogger(directory),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    torch.manual_seed(1)
    trainer.fit(Trained(), vectors())
    return counts


class FailsInProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no luck in a product")


class FailsOften:
    """Of four probes the second fails in the loss and the fourth in a product, so never three in a row."""

    def __call__(self, module: Any, batch: Any) -> Tensor:
        probe = module.global_step % 4  # whatever a probe tries in place of what failed
        loss = F.cross_entropy(module(batch[0]), batch[1])
        if probe == 2:
            raise RuntimeError("no luck in the loss")
        return FailsInProduct.apply(loss) if probe == 0 else loss


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_five_hundred_probes_do_not_grow(tmp_path):
    watch = monitor()
    counts = watched(tmp_path, watch)
    assert len(watch.history) == PROBES + 1
    assert counts.new_tensors <= 0
    assert counts.grown < GROWTH


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_probes_of_which_every_other_one_fails_do_not_grow_either(tmp_path):
    watch = monitor(loss_fn=FailsOften(), on_error="warn")
    with pytest.warns(UserWarning, match="no luck in (the loss|a product)") as warned:
        counts = watched(tmp_path, watch)
    assert len([w for w in warned if "could not take its probe" in str(w.message)]) == 2  # each reason once
    assert len(watch.history) == PROBES // 2 + 1
    assert counts.new_tensors <= 0
    assert counts.grown < GROWTH


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("what", ["a small tensor", "a graph", "memory of another kind"])
def test_a_leak_at_every_probe_is_seen(what, tmp_path):
    """The control, on fewer probes."""
    kept: list[Any] = []

    def loss_fn(module, batch):
        loss = F.cross_entropy(module(batch[0]), batch[1])
        leaks = {"a small tensor": loss.detach(), "a graph": loss, "memory of another kind": b"x" * 50 * GROWTH}
        kept.append(leaks[what])
        return loss

    probes = WARM_UP + 40
    counts = watched(tmp_path, monitor(loss_fn=loss_fn, levels=None, noise=False), probes)
    assert len(kept) == probes + 1
    if what == "memory of another kind":
        assert counts.grown > GROWTH
    else:
        assert counts.new_tensors >= 36


class PartOfGraph:
    """Held by a node of the graph: nodes themselves take no weak references."""


class Holds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, part):
        ctx.part = part
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone(), None


class Weak:
    """Weak references to what the loss was called with and to what it computed."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails = fails
        self.references: list[weakref.ref] = []

    def __call__(self, module: Any, batch: Any) -> Tensor:
        part = PartOfGraph()
        logits = Holds.apply(module(batch[0]), part)
        loss = F.cross_entropy(logits, batch[1])
        self.references += map(weakref.ref, (*batch, logits, loss, part))
        if self.fails == "loss":
            raise MemoryError("no memory in the loss")
        if self.fails == "product":
            loss = Fails.apply(loss)
        return loss

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError("no memory in a product")


class AfterProbe(pl.Callback):
    """Comes after the monitor; counts what is left of the probe before any garbage was collected."""

    def __init__(self, weak: Weak) -> None:
        self.weak = weak
        self.alive: list[int] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        gc.disable()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.alive.append(self.weak.alive)
        gc.enable()


@pytest.mark.parametrize("fails", [None, "loss", "product"])
def test_nothing_of_a_probe_outlives_it(fails, tmp_path):
    """Not even until garbage is collected: after an out-of-memory the graph must be gone when training goes on."""
    weak = Weak(fails)
    after = AfterProbe(weak)
    watch = monitor(loss_fn=weak, on_error="warn")

    class Both(pl.Callback):
        """The monitor and, after it, the look at what it left."""

        def setup(self, *arguments: Any, **options: Any) -> None:
            watch.setup(*arguments, **options)

        def on_train_start(self, *arguments: Any) -> None:
            watch.on_train_start(*arguments)

        def on_train_batch_start(self, *arguments: Any) -> None:
            after.on_train_batch_start()
            watch.on_train_batch_start(*arguments)

        def on_train_batch_end(self, *arguments: Any) -> None:
            watch.on_train_batch_end(*arguments)
            after.on_train_batch_end()

    try:
        if fails:
            with pytest.warns(UserWarning, match=f"no memory in .*{fails}"):
                train(CASE, tmp_path, Both())
        else:
            train(CASE, tmp_path, Both())
    finally:
        gc.enable()
    assert len(after.alive) == 12
    assert after.alive == [0] * 12
    assert len(weak.references) >= 15
    assert len(watch.history) == (0 if fails else 12)


def test_weak_references_see_what_is_kept(tmp_path):
    kept, weak = [], Weak()

    def loss_fn(module, batch):
        kept.append(weak(module, batch))
        return kept[-1]

    train(CASE, tmp_path, monitor(loss_fn=loss_fn))
    assert weak.alive > 0
    kept.clear()
    gc.collect()
    assert weak.alive == 0


class Ends(Exception):
    pass


@pytest.mark.parametrize("how", ["trained", "failed in a step", "failed in a probe"])
def test_the_monitor_keeps_neither_trainer_nor_module_nor_batches(how, tmp_path):
    class Module(Metered):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if how == "failed in a step" and batch_idx == 2:
                raise Ends
            return super().training_step(batch, batch_idx)

    def loss_fn(module, batch):
        if how == "failed in a probe":
            raise Ends
        return module.training_step(batch, 0)["loss"]

    references: list[weakref.ref] = []
    watch = monitor(every_n_steps=5, batches=4, loss_fn=loss_fn)

    class Refers(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            references.extend(map(weakref.ref, (trainer, pl_module, trainer.fit_loop, trainer.optimizers[0], *batch)))
            kept = watch._collector._kept
            references.extend(weakref.ref(tensor) for captured in kept for tensor in captured.batch)

    case = Case("referred to", Module, vectors, lambda: {"callbacks": [Refers()]})
    if how == "trained":
        train(case, tmp_path, watch)
    else:
        with pytest.raises(Ends):
            train(case, tmp_path, watch)
    gc.collect()
    assert references
    assert [reference() for reference in references if reference() is not None] == []
    assert watch.state_dict()["version"]


def test_saved_files_are_data(tmp_path):
    """Arrays without a pickled object, and a checkpoint that is read with `weights_only`."""

    class Saves(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    case = Case("saved", Metered, vectors, lambda: {"callbacks": [Saves()], "logger": RowLogger(tmp_path)})
    train(case, tmp_path, monitor())
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 12
    for file in files:
        with np.load(file, allow_pickle=False) as members:
            assert {members[name].dtype.kind for name in members.files} <= set("biufUS")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["SpectrumMonitor[rmt]"]
    assert len(state["history"]) == 12
