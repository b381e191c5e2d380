"""What goes wrong on one rank never leaves another one waiting: all skip the probe, or the training ends in words.

Real Trainers, DDP and FSDP2 over gloo. Wherever training survives, it is bitwise the training without a monitor. The
process group's timeout is short, and everything must be over well before it: a rank that waits for another shows as one
that is late.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, differences, train
from live_models import Classifier, vectors
from several_ranks import on_two_ranks
from test_bitwise_distributed import Sharded, ddp, fsdp2
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov import lanczos
from lightning_rmt.live import batches, memory

# of Lightning: the metrics of one rank are what the test is about
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
TIMEOUT_SECONDS = 20
DEADLINE = 12.0  # of a training with everything that it does; it takes about one
STRATEGIES = {
    "ddp": Case("ddp", Classifier, vectors, ddp()),
    "fsdp2": Case("fsdp2", Sharded, vectors, fsdp2),
}
ELSEWHERE = "the probe failed on another rank; its log says why. All ranks skip this one"
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"


def rank() -> int:
    return int(os.environ["LOCAL_RANK"])


def loss(module: Any, batch: Any) -> Any:
    return F.cross_entropy(module(batch[0]), batch[1])


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(NO_MEMORY)


def at_call(number: int, original: Callable[..., Any], fails: Callable[..., Any] = out_of_memory) -> Any:
    """The original, but for one call; a function, so that it binds as a method does."""
    calls = iter(range(1, 10**6))

    def sometimes(*arguments: Any, **options: Any) -> Any:
        return (fails if next(calls) == number else original)(*arguments, **options)

    return sometimes


# --- faults that training survives --------------------------------------------------------------------------------------


def raises(module: Any, batch: Any) -> Any:
    loss(module, batch)
    raise KeyError("only here")


def is_nan(module: Any, batch: Any) -> Any:
    return loss(module, batch) * float("nan")


def no_memory(module: Any, batch: Any) -> Any:
    loss(module, batch)
    out_of_memory()


def in_float64(module: Any, batch: Any) -> Any:
    if batch[0].dtype == torch.float64:
        out_of_memory()
    return loss(module, batch)


@dataclass(frozen=True)
class Fault:
    """What happens on one rank.

    Attributes:
        words: what that rank is warned of.
        loss_fn: its loss.
        patch: object, attribute and what replaces it there.
        taken: the probes that work all the same.
        options: of the monitor, on every rank.
    """

    words: str
    loss_fn: Callable[..., Any] = loss
    patch: tuple[Any, str, Any] | None = None
    taken: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def monitor(self, here: bool) -> SpectrumMonitor:
        fn = self.loss_fn if here else loss
        return SpectrumMonitor(
            **{
                "every_n_steps": 2,
                "lanczos_steps": 5,
                "levels": None,
                "figures_every": 0,
                "loss_fn": lambda module, batch: fn(module, batch),
                **dict(self.options),
            }
        )


def uncopyable(batch: Any) -> Any:
    raise TypeError("no copy of this")


FAULTS = {
    "raises in the loss": Fault("KeyError: 'only here'", raises),
    "NaN loss": Fault("the loss of batch 0 is nan", is_nan),
    "no memory for the operator": Fault(NO_MEMORY, no_memory),
    "no memory in the first product": Fault(
        NO_MEMORY, patch=(Hessian, "_matmat", at_call(1, Hessian._matmat)), taken=2
    ),
    "no memory in a checked product": Fault(
        NO_MEMORY, patch=(Hessian, "_matmat", at_call(3, Hessian._matmat)), taken=2
    ),
    "no memory in a later product": Fault(NO_MEMORY, patch=(Hessian, "_matmat", at_call(7, Hessian._matmat)), taken=2),
    "no memory for the basis": Fault(NO_MEMORY, patch=(lanczos, "_Run", at_call(1, lanczos._Run)), taken=2),
    "no memory when the basis is tried out": Fault(
        NO_MEMORY, patch=(memory.Memory, "try_out", at_call(1, memory.Memory.try_out)), taken=2
    ),
    "batch that can't be copied": Fault(
        "TypeError: no copy of this", patch=(batches, "copy_batch", at_call(1, batches.copy_batch, uncopyable)), taken=2
    ),
    "no batch": Fault(
        "no batch was captured",
        patch=(batches.BatchCollector, "take", at_call(1, batches.BatchCollector.take, lambda _: [])),
        taken=2,
    ),
}


def survived_on_this_rank(case: Case, fault: Fault, failing: int, directory: Path) -> dict[str, Any]:
    control = train(case, directory)
    here = rank() == failing
    if here and fault.patch is not None:
        setattr(*fault.patch)  # for good: this process is a fork
    watch = fault.monitor(here)
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prints = train(case, directory, watch)
    return {
        "seconds": time.perf_counter() - begin,
        "differences": differences(prints, control),
        "told": [str(w.message) for w in told if "SpectrumMonitor" in str(w.message)],
        "taken": [entry.step for entry in watch.history],
        "notes": [] if watch.reading is None else list(watch.reading.notes),
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FAULTS)
def test_all_ranks_skip_together(name, strategy, tmp_path):
    fault, failing = FAULTS[name], len(name) % 2
    seen = on_two_ranks(survived_on_this_rank, tmp_path, STRATEGIES[strategy], fault, failing, tmp_path)
    for on_this_rank in seen:
        assert on_this_rank["seconds"] < DEADLINE
        assert on_this_rank["differences"] == []
        assert len(on_this_rank["taken"]) == fault.taken
    assert any(fault.words in said for said in seen[failing]["told"]), seen[failing]["told"]
    other = seen[1 - failing]["told"]
    assert (other == []) if failing == 0 else all(ELSEWHERE in said for said in other) and other != [], other
