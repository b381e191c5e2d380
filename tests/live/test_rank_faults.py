"""What goes wrong on one rank never leaves another one waiting: all skip the probe, or the training ends in words.

Real Trainers, DDP and FSDP2 over gloo. Wherever training survives, it is bitwise the training without a monitor. The
process group's timeout is short, and what training survives must be over well before it: a rank that waits for another
shows as one that is late.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from harness import Case, Fingerprint, differences, digest, train
from live_models import CLASSES, Classifier, vectors
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from several_ranks import on_one_survivor, on_two_ranks
from test_bitwise_distributed import Sharded
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_rmt import SpectrumMonitor
from lightning_rmt.callbacks import failures, spectrum_monitor
from lightning_rmt.curvature import exact_block
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.restricted import Restricted
from lightning_rmt.krylov import lanczos
from lightning_rmt.live import batches, measurement, memory
from lightning_rmt.live import noise as live_noise
from lightning_rmt.live.ranks import Ranks
from lightning_rmt.local_law import noise as law_noise

# of Lightning: the metrics of one rank are what the test is about
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
TIMEOUT = 30  # seconds that a rank waits for another
DEADLINE = 20.0  # of a training that takes one or two on an idle machine
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"
STEPS = 6  # of a rank's training: two epochs of three batches


def ddp(timeout: float = TIMEOUT, **options: Any) -> dict[str, Any]:
    strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=timeout), start_method="popen")
    return {"strategy": strategy, "devices": 2, **options}


def fsdp2(timeout: float = TIMEOUT, **options: Any) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend="gloo",
        timeout=timedelta(seconds=timeout),
    )
    return {"strategy": strategy, "devices": 2, **options}


CASES = {"ddp": Case("ddp", Classifier, vectors, ddp), "fsdp2": Case("fsdp2", Sharded, vectors, fsdp2)}


def with_options(case: Case, **options: Any) -> Case:
    return replace(case, trainer=partial(case.trainer, **options))


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


@cache
def control(name: str, directory: Path) -> list[Fingerprint]:
    """On each rank, the training without a monitor."""
    return on_two_ranks(train, directory, CASES[name], directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


def loss(module: Any, batch: Any) -> Any:
    return F.cross_entropy(module(batch[0]), batch[1])


class Watch(SpectrumMonitor):
    """Keeps what was found: the notes of every reading, and a digest of what must be the same on all ranks."""

    def __init__(self, **options: Any) -> None:
        settings = {"every_n_steps": 2, "lanczos_steps": 5, "levels": None, "figures_every": 0, "loss_fn": loss}
        super().__init__(**{**settings, **options})
        self.notes: list[str] = []
        self.results: list[str] = []

    def _take(self, *arguments: Any) -> Any:
        before = len(self.history)
        seconds = super()._take(*arguments)
        if len(self.history) > before:
            reading = self.reading
            self.notes += reading.notes
            levels = [(block.name, block.eigenvalues) for block in reading.levels]
            self.results.append(digest([reading.step, reading.spectrum.nodes, sorted(reading.blocks), levels]))
        return seconds


@dataclass
class Seen:
    """What a training was on one rank.

    Attributes:
        seconds: that it took.
        prints: its fingerprint; empty where it ended in an exception.
        raised: that exception's type and words.
        told: what the monitor warned of.
        taken: steps of the probes that worked.
        notes: of all readings.
        results: digests of all readings.
    """

    seconds: float = 0.0
    prints: Fingerprint = field(default_factory=dict)
    raised: tuple[str, str] = ("", "")
    told: list[str] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)


def watched(case: Case, directory: Path, watch: Watch | None) -> Seen:
    """Trains on this rank, and keeps what comes of it."""
    seen, begin = Seen(), time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            seen.prints = train(case, directory, watch)
        except Exception as error:
            seen.raised = (type(error).__name__, str(error))
    seen.seconds = time.perf_counter() - begin
    seen.told = [str(w.message) for w in told if "SpectrumMonitor" in str(w.message)]
    if watch is not None:
        seen.taken = [entry.step for entry in watch.history]
        seen.notes, seen.results = watch.notes, watch.results
    return seen


# --- faults that training survives --------------------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(NO_MEMORY)


def at_call(number: int, original: Callable[..., Any], instead: Callable[..., Any] = out_of_memory) -> Any:
    """The original, but for one call; a function, so that it binds as a method does."""
    calls = iter(range(1, 10**6))

    def sometimes(*arguments: Any, **options: Any) -> Any:
        return (instead if next(calls) == number else original)(*arguments, **options)

    return sometimes


def raises(module: Any, batch: Any) -> Any:
    loss(module, batch)
    raise KeyError("only here")


def is_nan(module: Any, batch: Any) -> Any:
    return loss(module, batch) * float("nan")


def no_memory(module: Any, batch: Any) -> Any:
    loss(module, batch)
    out_of_memory()


def no_memory_in_float64(module: Any, batch: Any) -> Any:
    if batch[0].dtype == torch.float64:
        out_of_memory()
    return loss(module, batch)


def no_copy(batch: Any) -> Any:
    raise TypeError("no copy of this")


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank.

    Attributes:
        words: what it is, as told on that rank and on the others.
        loss_fn: the loss there.
        patch: object, attribute, and the call at which something else happens there, with that.
        taken: the probes that work all the same.
        options: of the monitor, on every rank.
        notes: whether it is a note beside a spectrum rather than a warning.
    """

    words: str
    loss_fn: Callable[..., Any] = loss
    patch: tuple[Any, str, int, Callable[..., Any]] | None = None
    taken: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    notes: bool = False

    def break_something(self) -> None:
        """For good: the process is a fork."""
        if self.patch is not None:
            owner, name, number, instead = self.patch
            setattr(owner, name, at_call(number, getattr(owner, name), instead))


AFTER_MEMORY = (4,)  # the probe after one that ran out of memory asks how little will do, the next one takes that
BLOCKS = {"blocks": ["net.0"]}
LEVELS = {"levels": ["net.0"]}
FAULTS = {
    "raises in the loss": Fault("KeyError: 'only here'", raises),
    "NaN loss": Fault("the loss of batch 0 is nan", is_nan),
    "no memory for the operator": Fault(NO_MEMORY, no_memory),
    "no memory in the first product": Fault(
        NO_MEMORY, patch=(Hessian, "_matmat", 1, out_of_memory), taken=AFTER_MEMORY
    ),
    "no memory in a checked product": Fault(
        NO_MEMORY, patch=(Hessian, "_matmat", 3, out_of_memory), taken=AFTER_MEMORY
    ),
    "no memory in a later product": Fault(NO_MEMORY, patch=(Hessian, "_matmat", 7, out_of_memory), taken=AFTER_MEMORY),
    "no memory between two products": Fault(
        NO_MEMORY, patch=(lanczos, "inner_products", 4, out_of_memory), taken=AFTER_MEMORY
    ),
    "no memory to try the basis": Fault(
        NO_MEMORY, patch=(memory.Memory, "try_out", 1, out_of_memory), taken=AFTER_MEMORY
    ),
    "no memory for the basis": Fault(NO_MEMORY, patch=(lanczos, "_Run", 1, out_of_memory), taken=AFTER_MEMORY),
    "no room for the whole parameters": Fault(
        NO_MEMORY, patch=(measurement, "try_room_for_whole", 1, out_of_memory), taken=(2, 4)
    ),
    "a batch without a copy": Fault("no copy of this", patch=(batches, "copy_batch", 1, no_copy), taken=(2, 4)),
    "no batch": Fault("no batch was captured", patch=(batches.BatchCollector, "take", 1, lambda _: []), taken=(2, 4)),
    "no progress bar": Fault(NO_MEMORY, patch=(measurement, "probe_progress", 1, out_of_memory), taken=AFTER_MEMORY),
    "no memory for a block": Fault(
        "memory ran out", patch=(Restricted, "__init__", 3, out_of_memory), taken=(0, 2, 4), options=BLOCKS, notes=True
    ),
    "no memory in a block's product": Fault(
        "memory ran out", patch=(Restricted, "_matmat", 12, out_of_memory), taken=(0, 2, 4), options=BLOCKS, notes=True
    ),
    "no memory for level statistics": Fault(
        "memory ran out", no_memory_in_float64, taken=(0, 2, 4), options=LEVELS, notes=True
    ),
    "no memory for exact rows": Fault(
        "memory ran out",
        patch=(exact_block.BlockHessian, "levels", 3, out_of_memory),
        taken=(0, 2, 4),
        options=LEVELS,
        notes=True,
    ),
    "no memory for outliers' directions": Fault(
        "memory ran out",
        patch=(live_noise, "ritz_vectors", 1, out_of_memory),
        taken=(0, 2, 4),
        options={"lanczos_steps": 40},
        notes=True,
    ),
    "no memory in a half's product": Fault(  # after one that looks whether there are any, three checked ones and five
        "memory ran out", patch=(Hessian, "_matmat", 10, out_of_memory), taken=(0, 2, 4), notes=True
    ),
    "no memory between the halves' sums": Fault(
        "memory ran out", patch=(law_noise, "_stacked", 2, out_of_memory), taken=(0, 2, 4), notes=True
    ),
    "at the very last step": Fault(
        NO_MEMORY, patch=(Hessian, "_matmat", 12, out_of_memory), taken=(0,), options={"every_n_steps": 5}
    ),
}
ON_FSDP2 = (
    "raises in the loss",
    "no memory in a later product",
    "no memory for the basis",
    "no room for the whole parameters",
    "a batch without a copy",
    "no memory for exact rows",
)


def faulty_on_this_rank(name: str, fault: Fault, failing: int, directory: Path) -> Seen:
    here = rank() == failing
    if here:
        fault.break_something()
    wrapped = fault.loss_fn if here else loss
    return watched(CASES[name], directory, Watch(loss_fn=lambda *both: wrapped(*both), **fault.options))


@pytest.mark.parametrize(("fault", "name"), [*((f, "ddp") for f in FAULTS), *((f, "fsdp2") for f in ON_FSDP2)])
def test_all_ranks_skip_together(fault, name, folder, tmp_path):
    skip_together(FAULTS[fault], name, 1, folder, tmp_path)


def test_all_ranks_skip_when_the_first_one_fails(folder, tmp_path):
    skip_together(FAULTS["a batch without a copy"], "ddp", 0, folder, tmp_path)


def skip_together(fault: Fault, name: str, failing: int, folder: Path, directory: Path) -> None:
    ranks = on_two_ranks(faulty_on_this_rank, directory, name, fault, failing, directory)
    for seen, plain in zip(ranks, control(name, folder), strict=True):
        assert seen.raised == ("", "")
        assert differences(seen.prints, plain) == []
        assert seen.seconds < DEADLINE
        assert tuple(seen.taken) == fault.taken
    assert ranks[0].results == ranks[1].results
    said = [seen.notes if fault.notes else seen.told for seen in ranks]
    assert any(fault.words in words for words in said[failing])
    if failing == 0 and not fault.notes:  # the log that everybody reads has it already
        assert said[1] == []
    else:
        words = f"it failed on rank {failing}" if fault.notes else f"the probe failed on rank {failing}"
        assert any(words in told and (fault.notes or fault.words in told) for told in said[1 - failing])


class Fails(TorchDispatchMode):
    """Counts the operations that allocate a large tensor, and fails in one of them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count, self.paused = number, 0, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        allocates = function.namespace == "aten" and not function.is_view and not function._schema.is_mutable
        if allocates and not self.paused and max(sizes, default=0) >= LARGE:
            self.count += 1
            if self.count == self.number:
                out_of_memory()
        return found


LARGE = 20  # entries; a rank's part of 83 parameters is 42
PLACES = 36


def swept_on_this_rank(case: Case, failing: int, directory: Path) -> dict[str, Any]:
    """One probe a step, each of which fails at another operation of this rank, the fence and FSDP2's gathering aside."""
    failures.MOST_IN_A_ROW = 10**6
    memory.gc.collect = int  # after each out-of-memory, half a second in a process as large as this
    counts: list[int] = []
    mode = Fails(0)

    def without_faults(make: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def made(*arguments: Any, **options: Any) -> Iterator[None]:
            mode.paused = True
            with make(*arguments, **options):
                mode.paused = False
                yield
                mode.paused = True

        @contextmanager
        def ended(*arguments: Any, **options: Any) -> Iterator[None]:
            with made(*arguments, **options) as inside:
                try:
                    yield inside
                finally:
                    mode.paused = True

        return ended

    original = spectrum_monitor.measure_live

    def measured(*arguments: Any, **options: Any) -> Any:
        watch._learned, watch._memory, watch._checked = None, memory.Memory(), False
        options |= {"check": True, "learned": None, "memory": watch._memory}
        if rank() != failing:
            return original(*arguments, **options)
        number = 0 if not counts else 1 + (len(counts) - 1) * counts[0] // PLACES
        mode.number, mode.count, mode.paused = number, 0, False
        try:
            with mode:
                return original(*arguments, **options)
        finally:
            counts.append(mode.count)

    if rank() == failing:
        measurement.fence, measurement.unsharded = map(without_faults, (measurement.fence, measurement.unsharded))
    spectrum_monitor.measure_live = measured
    watch = Watch(every_n_steps=1, blocks=["net.3"], levels=["net.0"])
    steps = with_options(case, max_epochs=PLACES // 3 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prints = train(steps, directory, watch)
        plain = train(steps, directory)
    return {"differences": differences(prints, plain), "results": watch.results, "counts": counts}


@pytest.mark.parametrize("name", CASES)
def test_memory_that_runs_out_anywhere_in_a_probe(name, tmp_path):
    failing = 1
    ranks = on_two_ranks(swept_on_this_rank, tmp_path, CASES[name], failing, tmp_path)
    for seen in ranks:
        assert seen["differences"] == []
    assert ranks[0]["results"] == ranks[1]["results"]  # the same probes worked, with the same results
    counts = ranks[failing]["counts"]
    assert counts[0] > PLACES
    assert len(counts) > PLACES
    assert len(counts) - len(ranks[0]["results"]) > PLACES / 3  # most of the others are notes beside a spectrum


# --- ranks that are not alike -------------------------------------------------------------------------------------------


def at_the_end_on_this_rank(name: str, directory: Path) -> Seen:
    return watched(CASES[name], directory, Watch(every_n_steps=STEPS, batches=STEPS))


@pytest.mark.parametrize("name", CASES)
def test_a_probe_at_the_very_last_step(name, folder, tmp_path):
    ranks = on_two_ranks(at_the_end_on_this_rank, tmp_path, name, tmp_path)
    for seen, plain in zip(ranks, control(name, folder), strict=True):
        assert differences(seen.prints, plain) == []
        assert (seen.told, seen.taken) == ([], [STEPS - 1])
    assert ranks[0].results == ranks[1].results


ARGUMENTS: dict[str, tuple[Any, Any]] = {
    "every_n_steps": (2, 3),
    "lanczos_steps": (5, 6),
    "parameters": (["net.*"], ["nett.*"]),  # which the second rank alone would refuse
    "curvature": ("hessian", "ggn"),  # as this
    "loss_fn": (loss, None),
    "seed": (0, 1),
    "on_error": ("warn", "raise"),
}


def at_odds_on_this_rank(directory: Path) -> dict[str, Seen]:
    """All of them refused before the first step, so the group is as good as new for the next."""
    here = CASES["ddp"]
    return {name: watched(here, directory, Watch(**{name: both[rank()]})) for name, both in ARGUMENTS.items()}


def test_ranks_that_disagree_about_the_arguments(tmp_path):
    for seen in on_two_ranks(at_odds_on_this_rank, tmp_path, tmp_path):
        for name, one in seen.items():
            kind, words = one.raised
            assert kind == "MisconfigurationException", one
            assert words.startswith(f"ranks disagree about the SpectrumMonitor's {name} (here ")
            assert one.seconds < DEADLINE


def refused_on_this_rank(directory: Path) -> Seen:
    def unusable(module: Any, loss_fn: Any) -> None:
        if rank() == 1:
            raise ValueError("not this module")

    spectrum_monitor.refuse_unusable_loss = unusable
    return watched(CASES["ddp"], directory, Watch())


def test_a_monitor_that_one_rank_refuses(tmp_path):
    one, two = on_two_ranks(refused_on_this_rank, tmp_path, tmp_path)
    assert two.raised == ("ValueError", "not this module")
    assert one.raised == (
        "OtherRankFailedError",
        "the SpectrumMonitor is refused on rank 1 (ValueError: not this module)",
    )


def without_a_logger_on_this_rank(directory: Path) -> Seen:
    case = CASES["ddp"] if rank() == 0 else with_options(CASES["ddp"], logger=False)
    return watched(case, directory, Watch())


def test_only_the_first_rank_has_a_logger(tmp_path):
    for seen in on_two_ranks(without_a_logger_on_this_rank, tmp_path, tmp_path):
        assert seen.raised == ("", "")
        assert seen.taken == [0, 2, 4]


def ahead_on_this_rank(ahead_from: int, directory: Path) -> Seen:
    """The second rank counts one step more than the first, from a step on."""
    counted = spectrum_monitor.current_step
    if rank() == 1:
        spectrum_monitor.current_step = lambda trainer: counted(trainer) + (counted(trainer) >= ahead_from)
    return watched(CASES["ddp"], directory, Watch(every_n_steps=1))


def test_ranks_at_different_steps(folder, tmp_path):
    ranks = on_two_ranks(ahead_on_this_rank, tmp_path, 3, tmp_path)
    for number, (seen, plain) in enumerate(zip(ranks, control("ddp", folder), strict=True)):
        assert differences(seen.prints, plain) == []
        assert seen.taken == [0, 1, 2]
        assert seen.seconds < DEADLINE
        words = "ranks are at different steps or probes, this one at a probe after step 3"
        assert [words in said for said in seen.told[:1]] == [True] * (number == 0)  # in one log is enough


def test_ranks_that_start_at_different_steps(tmp_path):
    for number, seen in enumerate(on_two_ranks(ahead_on_this_rank, tmp_path, 0, tmp_path)):
        kind, words = seen.raised
        assert kind == "MisconfigurationException"
        assert words.startswith(f"ranks disagree about the SpectrumMonitor's step (here {number})")
        assert words.endswith("resume every rank from the same checkpoint")


# --- batches ------------------------------------------------------------------------------------------------------------


class Sums(Classifier):
    """A mean that an empty batch doesn't make NaN."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / max(len(batch[1]), 1)


def uneven(sizes: tuple[tuple[int, ...], ...]) -> DataLoader:
    """Batches of these sizes on each rank."""
    generator = torch.Generator().manual_seed(rank())
    made = [
        (torch.randn(n, 6, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for n in sizes[rank()]
    ]
    return DataLoader(made, batch_size=None)


def case_of(*sizes: tuple[int, ...], timeout: float = TIMEOUT, **options: Any) -> Case:
    trainer = partial(ddp, timeout, use_distributed_sampler=False, **options)
    return Case("uneven", Sums, partial(uneven, sizes), trainer)


def uneven_on_this_rank(
    case: Case, options: dict[str, Any], directory: Path, patch: Fault | None = None
) -> tuple[Seen, Seen]:
    plain = watched(case, directory, None)
    if patch is not None and rank() == 1:
        patch.break_something()
    return plain, watched(case, directory, Watch(loss_fn=None, **options))


EMPTY = "every batch that was captured for this probe is empty on this rank (no samples)"


def test_an_empty_last_batch(tmp_path):
    """The training's own loss must be able to take it; nobody's curvature can."""
    case = case_of((4, 4, 4), (4, 4, 0))
    ranks = on_two_ranks(uneven_on_this_rank, tmp_path, case, {"every_n_steps": 1}, tmp_path)
    for plain, seen in ranks:
        assert differences(seen.prints, plain.prints) == []
        assert seen.taken == [0, 1, 3, 4]
        assert seen.seconds < DEADLINE
    (_, one), (_, two) = ranks
    assert one.results == two.results
    assert EMPTY in two.told[0]
    assert f"the probe failed on rank 1 (ValueError: {EMPTY})" in one.told[0]


def test_an_empty_batch_among_others_is_left_out(tmp_path):
    case = case_of((4, 4, 4), (4, 4, 0))
    ranks = on_two_ranks(uneven_on_this_rank, tmp_path, case, {"every_n_steps": 3, "batches": 3}, tmp_path)
    for plain, seen in ranks:
        assert differences(seen.prints, plain.prints) == []
        assert (seen.told, seen.taken) == ([], [2, 5])
        assert any(note.startswith("measured on 2 of 3 curvature batches") for note in seen.notes)


def test_a_rank_with_fewer_batches_for_the_probe(tmp_path):
    case = case_of((4, 4, 4), (4, 4, 4))
    fewer = Fault("", patch=(batches.BatchCollector, "take", 1, lambda kept: [kept._kept.pop()]))
    options = {"every_n_steps": 3, "batches": 2, "levels": ["net.0"]}
    ranks = on_two_ranks(uneven_on_this_rank, tmp_path, case, options, tmp_path, fewer)
    for plain, seen in ranks:
        assert differences(seen.prints, plain.prints) == []
        assert (seen.told, seen.taken) == ([], [1, 4])
        assert sum(note.startswith("measured on 1 of 2 curvature batches") for note in seen.notes) == 1
    assert ranks[0][1].results == ranks[1][1].results


def uneven_with_monitor(case: Case, every: int, directory: Path) -> Seen:
    return watched(case, directory, Watch(loss_fn=None, every_n_steps=every))


@pytest.mark.parametrize("every", [1, 2, 7])
def test_uneven_loaders_end_as_they_do_without_a_monitor(every, tmp_path):
    """Lightning lets the longer loader's last batches meet the shorter one's next epoch, and ends in an error of gloo's."""
    case = case_of((4, 4, 4, 4), (4, 4, 4))
    plains = on_two_ranks(watched, tmp_path, case, tmp_path, None)
    ranks = on_two_ranks(uneven_with_monitor, tmp_path, case, every, tmp_path)
    for plain, seen in zip(plains, ranks, strict=True):
        assert seen.raised[0] in (plain.raised[0], "LostRankError")
        assert bool(seen.raised[0]) == bool(plain.raised[0])
        assert differences(seen.prints, plain.prints) == []
        assert seen.seconds < DEADLINE
        assert seen.taken == [step for step in range(STEPS) if step % every == 0]
    one, two = ranks
    assert one.raised[0] != ""
    assert two.raised[0] == ""
    assert one.results == two.results


class Joins(pl.Callback):
    """The epoch in torch's context for uneven inputs, entered and left as a user of it would."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.join = trainer.strategy.model.join()
        self.join.__enter__()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.join.__exit__(None, None, None)


def joined_on_this_rank(case: Case, options: dict[str, Any], directory: Path) -> list[Seen]:
    """Lightning 2.6 asks before every batch whether any rank got a SIGTERM, and hangs in Join itself; 2.5 doesn't."""
    pl.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor = lambda loop: None

    def joining() -> dict[str, Any]:
        return {**case.trainer(), "callbacks": [Joins()]}

    joined = replace(case, trainer=joining)
    watches = None, Watch(**options), Watch(on_error="raise", **options)
    return [watched(joined, directory, watch) for watch in watches]


@pytest.mark.parametrize("schedule", [{"every_n_steps": 1}, {"every_n_steps": None, "max_overhead": 1.0}], ids=str)
def test_join_turns_the_monitor_off(schedule, tmp_path):
    """A rank that ran out answers DDP's collectives only; neither a probe's nor those that tell when the next one is."""
    case = case_of((4,) * 24, (4,) * 20, max_epochs=1)
    ranks = on_two_ranks(joined_on_this_rank, tmp_path, case, schedule, tmp_path)
    for number, (plain, seen, strict) in enumerate(ranks):
        assert plain.raised == seen.raised == ("", "")
        assert differences(seen.prints, plain.prints) == []
        assert seen.taken == []
        assert [("Join context" in words, "is off" in words) for words in seen.told] == [(True, True)] * (number == 0)
        assert seen.seconds < DEADLINE
        assert strict.raised[0] == "MisconfigurationException"
        assert "Join context" in strict.raised[1]


# --- a rank that is gone ------------------------------------------------------------------------------------------------


def at_the_end_of(signal_number: int, directory: Path) -> Callable[..., Any]:
    def ends(*_: Any) -> Any:
        (directory / "ended").write_text(str(time.time()))
        os.kill(os.getpid(), signal_number)

    return ends


def lost_on_this_rank(case: Case, signal_number: int, directory: Path) -> tuple[Seen, float]:
    """The second rank ends within a product of its second probe, after step 2."""
    saves = ModelCheckpoint(directory / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    if rank() == 1:
        Hessian._matmat = at_call(12, Hessian._matmat, at_the_end_of(signal_number, directory))

    def saving() -> dict[str, Any]:
        return {**case.trainer(), "enable_checkpointing": True, "callbacks": [saves]}

    seen = watched(replace(case, trainer=saving), directory, Watch())
    return seen, time.time() - float((directory / "ended").read_text())


def lost(case: Case, signal_number: int, directory: Path) -> tuple[Seen, float]:
    seen, seconds = on_one_survivor(0, lost_on_this_rank, directory, case, signal_number, directory, seconds=60)
    kind, words = seen.raised
    assert kind == "LostRankError"
    assert words.startswith("another rank is gone or doesn't answer")
    assert "resume from the last checkpoint" in words
    assert seen.taken == [0]
    assert seen.told == []
    return seen, seconds


@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_is_killed_in_a_product(name, tmp_path):
    case = CASES[name]
    _, seconds = lost(case, signal.SIGKILL, tmp_path)
    assert seconds < DEADLINE  # the other one hears of it at once
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in saved] == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]

    # what is left trains on, on one device
    ignore = ("You're resuming from a checkpoint that ended before", "Be aware that when using `ckpt_path`, callbacks")
    single = Case("resumed", Classifier, vectors, ignore=ignore)
    watch = Watch()
    prints = train(single, tmp_path, watch, checkpoint=saved[-1])
    assert prints["weights"]
    assert [entry.step for entry in watch.history][:2] == [0, 2]
    assert np.isfinite([entry.lambda_max for entry in watch.history]).all()


def test_a_rank_that_hangs_in_a_product(tmp_path):
    timeout = 4.0
    _, seconds = lost(replace(CASES["ddp"], trainer=partial(ddp, timeout)), signal.SIGSTOP, tmp_path)
    assert timeout * 0.9 < seconds < timeout + DEADLINE


# --- the tests themselves -----------------------------------------------------------------------------------------------


def disagreeing_on_this_rank(directory: Path) -> Seen:
    def alone(self: Ranks, stage: Callable[[], Any], *_: Any, **__: Any) -> Any:
        return stage()

    Ranks.together = alone
    case = replace(CASES["ddp"], trainer=partial(ddp, 3.0))
    if rank() == 1:
        FAULTS["no batch"].break_something()
    return watched(case, directory, Watch())


def test_harness_sees_ranks_that_do_not_agree(folder, tmp_path):
    """Without the agreement after each stage, a rank that fails goes on to train while the other is in its probe."""
    ranks = on_two_ranks(disagreeing_on_this_rank, tmp_path, tmp_path)
    wrong = [
        seen.raised != ("", "") or differences(seen.prints, plain) != []
        for seen, plain in zip(ranks, control("ddp", folder), strict=True)
    ]
    assert any(wrong)
