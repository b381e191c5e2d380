"""What goes wrong around a probe never reaches the training: the same bits, one clear warning, and no more probes.

Every loss that fails runs the module's `training_step` first, so that there is something to restore.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from harness import Case, Fingerprint, Recorder, RowLogger, differences, digest, train
from live_models import Classifier, Metered, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rmt import SpectrumMonitor
from lightning_rmt.krylov.tridiagonal import NonFiniteError
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.report.files import load_run

CASE = Case("mlp, Adam, scheduler, torchmetrics", Metered, vectors)
PROBES = [0, 2, 4, 6, 8, 10]  # of two epochs of six batches


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(**{"every_n_steps": 2, "lanczos_steps": 4, "figures_every": 0, **options})


def steps(watch: SpectrumMonitor) -> list[int]:
    return [entry.step for entry in watch.history]


def watched(case: Case, directory: Path, watch: pl.Callback, **options: Any) -> tuple[Fingerprint, list[str]]:
    """The fingerprint of a training, and what it was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prints = train(case, directory, watch, **options)
    return prints, [str(w.message) for w in caught if "SpectrumMonitor" in str(w.message)]


def step_of(module: Any, batch: Any) -> Tensor:
    output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output


# --- losses that fail ---------------------------------------------------------------------------------------------------


def is_nan(module, batch):
    return step_of(module, batch) * float("nan")


def is_infinite(module, batch):
    return step_of(module, batch) + float("inf")


def has_infinite_curvature(module, batch):
    return step_of(module, batch) + sum((p * 0).abs().sqrt().sum() for p in module.parameters())


def has_no_graph(module, batch):
    return step_of(module, batch).detach()


def is_a_dict(module, batch):
    return {"loss": step_of(module, batch)}


def is_not_there(module, batch):
    step_of(module, batch)


class UserError(Exception):
    """With arguments that `str` doesn't show."""


def has_a_bug(module, batch):
    step_of(module, batch)
    raise UserError("no such key", 3)


def runs_out_of_memory(module, batch):
    step_of(module, batch)
    raise MemoryError("Unable to allocate 3.1 TiB")


def runs_out_of_gpu_memory(module, batch):
    step_of(module, batch)
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Identity(torch.autograd.Function):
    """Whose backward pass works, and runs out of memory when it is itself differentiated: inside a product."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return IdentityBackward.apply(gradient)


class IdentityBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        return gradient.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB in a product")


def runs_out_of_memory_in_a_product(module, batch):
    step_of(module, batch)
    return F.cross_entropy(Identity.apply(module(batch[0])), batch[1])


FAULTS = [
    (is_nan, ValueError, "the loss of batch 0 is nan"),
    (is_infinite, ValueError, "the loss of batch 0 is inf"),
    (has_infinite_curvature, NonFiniteError, "a curvature product is NaN or infinite"),
    (has_no_graph, ValueError, "has no graph"),
    (is_a_dict, TypeError, "must be a tensor.*got dict"),
    (is_not_there, TypeError, "must be a tensor.*got NoneType"),
    (has_a_bug, UserError, "no such key"),
    (runs_out_of_memory, MemoryError, "Unable to allocate"),
    (runs_out_of_gpu_memory, torch.cuda.OutOfMemoryError, "out of memory"),
    (runs_out_of_memory_in_a_product, torch.cuda.OutOfMemoryError, "out of memory.*in a product"),
]
EVERY_FAULT = pytest.mark.parametrize(("loss_fn", "kind", "words"), FAULTS, ids=[f[0].__name__ for f in FAULTS])


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Fingerprint:
    return train(CASE, tmp_path_factory.mktemp("control"))


@EVERY_FAULT
def test_training_goes_on_as_if_nothing_had_been(loss_fn, kind, words, control, tmp_path):
    """Two warnings in all: of the reason at the first probe, and at the third one that the monitor is off.

    Where memory runs out in a product, the second probe is a smaller one, and fails in another way.
    """
    called, watch = [], monitor(loss_fn=lambda module, batch: called.append(1) or loss_fn(module, batch))
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    smaller = loss_fn is runs_out_of_memory_in_a_product
    assert len(said) == (3 if smaller else 2)
    for sentence in (said[0], said[-1]):
        assert re.search(words, sentence)
        assert "the training is unaffected" in sentence
        assert kind.__name__ in sentence
    assert "after step 0" in said[0]
    assert "off" not in said[0]
    assert "after step 4" in said[-1]
    assert "failure 3 in a row: the monitor is off now" in said[-1]
    assert not smaller or "graphs get" in said[0]
    pieces = loss_fn in (runs_out_of_memory, runs_out_of_gpu_memory)  # whole, in halves, and sample by sample
    assert smaller or len(called) == 3 * (3 if pieces else 1)
    assert watch.history == []
    assert watch.reading is None
    assert not list(tmp_path.rglob("*.npz"))


class Keeper(Recorder):
    """Takes the fingerprint, and saves a checkpoint, where an exception ended the training."""

    def __init__(self, case: Case, path: Path) -> None:
        super().__init__(case)
        self.path = path

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._hook("exception", pl_module)
        self.on_train_end(trainer, pl_module)
        trainer.save_checkpoint(self.path)


class Raises(pl.Callback):
    """What the control is ended by, where the monitor's probe ended the other run."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.act()


def ended(directory: Path, probe: pl.Callback, kind: type[BaseException], words: str | None = None) -> Fingerprint:
    """The fingerprint of a training that ends in an exception; with it, that of the checkpoint it left."""
    directory.mkdir()
    keeper = Keeper(CASE, directory / "interrupted.ckpt")
    # A shell without job control starts its background jobs with the signal ignored, and Python leaves it at that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(kind, match=words) as caught:
            train(replace(CASE, trainer=lambda: {"callbacks": [keeper]}), directory, probe)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.type is kind  # rather than one that wraps it
    saved = torch.load(keeper.path, weights_only=True)
    return {**keeper.prints, "checkpoint": [digest([saved["state_dict"], saved["optimizer_states"], saved["loops"]])]}


LATE = {"every_n_steps": 5, "batches": 4, "on_error": "raise"}  # the first probe comes after the fourth step


@EVERY_FAULT
def test_the_original_exception_with_the_module_restored(loss_fn, kind, words, tmp_path):
    def fails() -> None:
        raise kind("out of memory")

    prints = ended(tmp_path / "watched", monitor(loss_fn=loss_fn, **LATE), kind, words)
    assert differences(prints, ended(tmp_path / "control", Raises(fails), kind)) == []
    assert len(prints["loss"]) == 4


def test_the_users_exception_is_the_very_same_object(tmp_path):
    raised = UserError("this one", 3)

    def loss_fn(module, batch):
        raise raised

    with pytest.raises(UserError) as caught:
        train(CASE, tmp_path, monitor(loss_fn=loss_fn, on_error="raise"))
    assert caught.value is raised


def test_a_probe_that_works_again_starts_the_count_of_failures_afresh(control, tmp_path):
    """Batches 0 and 4 of an epoch fail, the one between doesn't: the monitor stays on, and says the reason once."""
    calls = []

    def loss_fn(module, batch):
        calls.append(1)
        if len(calls) % 3 != 0:
            raise UserError(f"call {len(calls)}")
        return step_of(module, batch)

    watch = monitor(loss_fn=loss_fn, levels=None, noise=False)
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    assert steps(watch) == [4, 10]
    assert len(said) == 1


# --- interruptions ------------------------------------------------------------------------------------------------------


def test_control_c_inside_a_probe(tmp_path):
    """Lightning ends the run with exit status 1, whatever `on_error` says; what it saves is what was trained."""

    def interrupts(*arguments: Any) -> None:
        if arguments:
            step_of(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    options = {**LATE, "on_error": "warn", "loss_fn": interrupts}
    prints = ended(tmp_path / "watched", monitor(**options), SystemExit)
    assert differences(prints, ended(tmp_path / "control", Raises(interrupts), SystemExit)) == []
    case = replace(CASE, ignore=("You're resuming from a checkpoint that ended before the epoch ended",))
    resumed = train(case, tmp_path / "a", monitor(), checkpoint=tmp_path / "watched" / "interrupted.ckpt")
    stripped = torch.load(tmp_path / "watched" / "interrupted.ckpt", weights_only=True)
    stripped["callbacks"].clear()
    torch.save(stripped, tmp_path / "stripped.ckpt")
    assert differences(resumed, train(case, tmp_path / "b", checkpoint=tmp_path / "stripped.ckpt")) == []


def test_sigterm_inside_a_probe(tmp_path):
    """Lightning notes the signal and ends the run after the batch; the probe is finished before."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    def terminates(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return step_of(*arguments) if arguments else None

    watch = monitor(loss_fn=terminates, **LATE)
    prints = ended(tmp_path / "watched", watch, SIGTERMException)
    assert differences(prints, ended(tmp_path / "control", Raises(terminates), SIGTERMException)) == []
    assert steps(watch) == [3]
    assert len(prints["loss"]) == 4


# --- training steps and batches -----------------------------------------------------------------------------------------


class SkipsBatches(Metered):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return None if batch_idx in (0, 2) else output


class ForgetsTheLoss(Metered):
    """A dict with a loss, which Lightning insists on; but without one when it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.last = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        again, self.last = self.last == batch_idx, batch_idx
        return {"logits": output["logits"]} if again else output


@pytest.mark.parametrize(
    ("module", "kind", "words", "taken"),
    [
        (SkipsBatches, ValueError, "training_step returned None for this batch", [4, 10]),
        (ForgetsTheLoss, MisconfigurationException, "a dict without a 'loss'.*'logits'", []),
    ],
)
def test_training_step_without_a_loss(module, kind, words, taken, tmp_path):
    case = Case("no loss", module, vectors, ignore=("`training_step` returned `None`", ".*returned `None`.*"))
    plain, _ = watched(case, tmp_path, pl.Callback())
    watch = monitor()
    prints, said = watched(case, tmp_path, watch)
    assert differences(prints, plain) == []
    assert steps(watch) == taken
    assert len(said) == (1 if taken else 2)
    assert re.search(words, said[0])
    with pytest.raises(kind, match=words):
        watched(case, tmp_path, monitor(on_error="raise"))


class Few(Classifier):
    """Mean squares of a line through the batch's first feature."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(nn.Linear(1, 1, bias=bias))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.feature = batch[0][:, :1].detach()
        return (self(self.feature) - batch[1].unsqueeze(1)).square().mean()


class LinearInItsParameters(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net[0](batch[0]).mean() + self.net[3].bias.sum()


@pytest.mark.parametrize("size", [1, 2])
def test_fewer_parameters_than_steps(size, tmp_path):
    """The spectrum is the dense Hessian's, to the last eigenvalue."""
    case = Case("few", lambda: Few(bias=size == 2), vectors)
    expected = []

    def loss_fn(module, batch):
        loss = module.training_step(batch, 0)
        x = torch.cat([module.feature, torch.ones_like(module.feature)], 1)[:, :size].double()
        expected.append(torch.linalg.eigvalsh(2 * x.T @ x / len(x)))
        return loss

    watch = monitor(on_error="raise", lanczos_steps=20, loss_fn=loss_fn, noise=False)
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert steps(watch) == PROBES
    assert watch.reading.spectrum.size == size
    assert watch.reading.spectrum.lambda_max.value == pytest.approx(float(expected[-1][-1]), rel=1e-5)
    assert watch.reading.spectrum.lambda_min.value == pytest.approx(float(expected[-1][0]), rel=1e-4)


def test_a_model_that_is_linear_in_its_parameters_has_no_curvature(tmp_path):
    case = Case("linear", LinearInItsParameters, vectors)
    watch = monitor(
        on_error="raise", loss_fn=lambda module, batch: module.training_step(batch, 0), parameters=["net.0.*"]
    )
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert steps(watch) == PROBES
    assert watch.reading.spectrum.lambda_max.value == watch.reading.spectrum.lambda_min.value == 0.0


@dataclass
class Pair:
    x: Tensor
    y: Tensor


STRUCTURES = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "dataclass": (Pair, lambda batch: (batch.x, batch.y)),
    "nested": (
        lambda x, y: {"in": [(x,), {"name": "text"}, None], "out": Pair(x, y)},
        lambda batch: (batch["in"][0][0], batch["out"].y),
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_any_structure(structure, tmp_path):
    make, take = STRUCTURES[structure]

    class Structured(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = take(batch)
            assert x.any()
            loss = F.cross_entropy(self(x.clone()), y)
            x.zero_()  # of no consequence to a probe on a copy that was taken before
            return loss

    def loader() -> DataLoader:
        together = torch.utils.data.default_collate
        return DataLoader(vectors().dataset, 4, shuffle=True, collate_fn=lambda samples: make(*together(samples)))

    case = Case(structure, Structured, loader)
    watch = monitor(on_error="raise")
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert steps(watch) == PROBES
    assert watch.reading.samples == 4


# --- loops --------------------------------------------------------------------------------------------------------------


def test_no_training_batches(tmp_path):
    case = replace(CASE, trainer=lambda: {"limit_train_batches": 0})
    watch = monitor(on_error="raise")
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert watch.history == []


def test_validation_between_the_steps(tmp_path):
    case = replace(CASE, trainer=lambda: {"val_check_interval": 2}, validation=True)
    watch = monitor(on_error="raise")
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert steps(watch) == PROBES


class WithMoreLoops(Metered):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def test_loops_that_do_not_train_are_left_alone(tmp_path):
    found = []
    for watch in (None, monitor(on_error="raise", loss_fn=has_a_bug)):
        torch.manual_seed(0)
        module = WithMoreLoops()
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=RowLogger(tmp_path),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[] if watch is None else [watch],
        )
        data = DataLoader(vectors().dataset, 4)
        results = [loop(module, data, verbose=False) for loop in (trainer.validate, trainer.test)]
        found.append(
            (results, digest(trainer.predict(module, data)), trainer.logger.rows, digest(torch.get_rng_state()))
        )
    assert found[0] == found[1]


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_full_disk(control, tmp_path, monkeypatch):
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_rmt.report.files.os.replace", full)
    watch = monitor()
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    assert steps(watch) == PROBES
    assert len(said) == 1
    assert re.search("could not write its reading of step 0.*No space left on device", said[0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(OSError, match="No space left"):
        train(CASE, tmp_path, monitor(on_error="raise"))


@pytest.mark.parametrize("in_the_way", ["rows", "rows/version_0/rmt"])
def test_a_log_directory_that_cannot_be_written(in_the_way, control, tmp_path):
    """A file where the folder should be, as even root can't write there."""
    (tmp_path / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / in_the_way).write_text("")
    watch = monitor()
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    assert steps(watch) == PROBES
    assert len(said) == 1
    assert re.search("could not write", said[0])


def test_a_damaged_reading_is_replaced_or_skipped(control, tmp_path):
    folder = tmp_path / "rows" / "version_0" / "rmt"
    folder.mkdir(parents=True)
    for step in (2, 99):
        (folder / f"step_{step:08d}.npz").write_bytes(b"PK\x03\x04 half a file")
    assert differences(train(CASE, tmp_path, monitor(on_error="raise")), control) == []
    with pytest.warns(UserWarning, match="skipped .*step_00000099.npz"):
        readings = load_run(tmp_path)
    assert [reading.step for reading in readings["rmt"]] == PROBES


@pytest.mark.parametrize("change", [{"version": 99}, {"version": None, "schedule": 3}, {"history": [{}]}])
def test_a_checkpoint_of_another_version(change, tmp_path):
    """It was written by another version of ours, or by this one and is damaged."""
    case = replace(CASE, trainer=lambda: {"callbacks": [Saves()]})
    train(case, tmp_path / "first", monitor(on_error="raise"))
    path = tmp_path / "first" / "half.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["callbacks"].pop("SpectrumMonitor[rmt]").update(change)
    torch.save(saved, tmp_path / "without.ckpt")
    saved["callbacks"]["SpectrumMonitor[rmt]"] = torch.load(path, weights_only=True)["callbacks"][
        "SpectrumMonitor[rmt]"
    ]
    saved["callbacks"]["SpectrumMonitor[rmt]"].update(change)
    torch.save(saved, tmp_path / "other.ckpt")
    watch = monitor(on_error="raise")
    prints, said = watched(CASE, tmp_path / "a", watch, checkpoint=tmp_path / "other.ckpt")
    assert differences(prints, train(CASE, tmp_path / "b", checkpoint=tmp_path / "without.ckpt")) == []
    assert len(said) == 1
    assert re.search("starts afresh", said[0])
    assert steps(watch) == [6, 8, 10]


class Saves(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "half.ckpt"))
