"""What goes wrong on one rank never leaves another one waiting: all skip the probe, or the training ends in words.

Real Trainers, DDP and FSDP2 over gloo. Wherever training survives, it is bitwise the training without a monitor. The
process group's timeout is short, and what training survives must be over well before it: a rank that waits for another
shows as one that is late.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, Fingerprint, differences, digest, train
from live_models import Classifier, vectors
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from several_ranks import on_two_ranks
from test_bitwise_distributed import Sharded
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_rmt import SpectrumMonitor
from lightning_rmt.callbacks import spectrum_monitor
from lightning_rmt.curvature import exact_block
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.restricted import Restricted
from lightning_rmt.krylov import lanczos
from lightning_rmt.live import batches, measurement, memory

# of Lightning: the metrics of one rank are what the test is about
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
TIMEOUT = 20  # seconds that a rank waits for another
DEADLINE = 12.0  # of a training that takes one or two
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
PLACES = 80


def swept_on_this_rank(case: Case, failing: int, directory: Path) -> dict[str, Any]:
    """One probe a step, each of which fails at another operation of this rank, the fence and FSDP2's gathering aside."""
    spectrum_monitor.FAILURES_IN_A_ROW = 10**6
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
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prints = train(steps, directory, watch)
        seconds = time.perf_counter() - begin
        plain = train(steps, directory)
    return {"differences": differences(prints, plain), "results": watch.results, "counts": counts, "seconds": seconds}


@pytest.mark.parametrize("name", CASES)
def test_memory_that_runs_out_anywhere_in_a_probe(name, tmp_path):
    failing = 1
    ranks = on_two_ranks(swept_on_this_rank, tmp_path, CASES[name], failing, tmp_path)
    for seen in ranks:
        assert seen["differences"] == []
        assert seen["seconds"] < TIMEOUT
    assert ranks[0]["results"] == ranks[1]["results"]  # the same probes worked, with the same results
    counts = ranks[failing]["counts"]
    assert counts[0] > PLACES
    assert len(counts) > PLACES
    assert len(counts) - len(ranks[0]["results"]) > PLACES / 3  # most of the others are notes beside a spectrum
