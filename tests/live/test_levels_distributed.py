"""Level statistics on two ranks, DDP and FSDP2 over gloo: every rank's spectra on all of them, or on none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Case, differences, train
from level_modules import Headed, agree, monitor, spied
from live_models import CLASSES, vectors
from several_ranks import on_two_ranks
from test_bitwise_distributed import ddp, fsdp2
from torch import nn
from torch.nn import functional as F

from lightning_rmt.live import levels, memory

# of Lightning: the metrics of one rank are what the test is about
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
HEAD = ["net.4.bias", "net.4.weight"]


class TwoHeads(Headed):
    """The second head is for a loss that takes another way through the module on the other rank."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(20, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        h = self.net[:4](batch[0])
        return F.cross_entropy(self.net[4](h), batch[1]) + F.cross_entropy(self.other(h), batch[1])


class Sharded(TwoHeads):
    """Layer by layer, and the module itself, whose `forward` no step runs."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self, "sharded"):
            for layer in (*self.net[::2], self.other, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


def plain(module: Any, batch: Any) -> Any:
    return F.cross_entropy(module.net(batch[0]), batch[1])


def forks(module: Any, batch: Any) -> Any:
    """The first rank's last layer is another one than the second's."""
    head = module.other if module.global_rank == 1 else module.net[4]
    return F.cross_entropy(head(module.net[:4](batch[0])), batch[1])


def fails(module: Any, batch: Any) -> Any:
    """In the levels' float64 only, and on one rank."""
    if batch[0].dtype == torch.float64 and module.global_rank == 1:
        raise ValueError("only here")
    return plain(module, batch)


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    levels.TIME_SHARE = 1e6  # of this process, which is a fork
    control = train(case, directory)
    seen: dict[str, Any] = {}
    for name, options in {
        "auto": {"loss_fn": plain},
        "batches": {"levels": ["net.0", "net.4"], "batches": 2, "loss_fn": plain},
        "forks": {"loss_fn": forks},
        "fails": {"loss_fn": fails, "every_n_steps": 2},
        "fails, one block": {"loss_fn": fails, "levels": ["net.0"]},
    }.items():
        watch = monitor(**options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            seen[name] = {"differences": differences(train(case, directory, watch), control)}
        found = {b.name: b.eigenvalues for b in watch.reading.levels}
        notes = [n for n in watch.reading.notes if "level" in n]
        seen[name] |= {"levels": found, "notes": notes, "probes": len(watch.history)}
        seen[name]["told"] = [str(w.message) for w in told if "SpectrumMonitor" in str(w.message)]

    rank = int(os.environ["LOCAL_RANK"])
    whole, levels.free_bytes = levels.free_bytes, lambda device: 1 if rank else memory.free_bytes(device)
    watch = monitor(loss_fn=plain)
    seen["memory"] = {"differences": differences(train(case, directory, watch), control), "notes": watch.reading.notes}
    levels.free_bytes = whole
    asked = iter([300 - 20 * rank])
    levels.rows_affordable = lambda *_: next(asked)
    watch = monitor(loss_fn=plain)
    spy = spied(directory, watch, case)
    seen["mine"] = spy.levels(Spied(case), watch.reading.step, HEAD, keep=280)
    seen["keep"] = {b.description: b.eigenvalues for b in watch.reading.levels}
    return seen


class Spied(TwoHeads):
    """What the spied module computes, in one process; only the first head's loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.forward = self.net.forward


@pytest.mark.parametrize("strategy", [ddp(), fsdp2], ids=["ddp", "fsdp2"])
def test_two_ranks(strategy, tmp_path):
    ignore = ("SpectrumMonitor .* no gradient reaches other",)
    case = Case("two ranks", Sharded if strategy is fsdp2 else TwoHeads, vectors, strategy, ignore=ignore)
    one, two = on_two_ranks(on_this_rank, tmp_path, case, tmp_path)
    for rank in (one, two):
        for name in ("auto", "batches", "forks", "fails", "fails, one block", "memory"):
            assert rank[name]["differences"] == [], name
    for name in ("auto", "batches", "forks", "keep"):
        found, other = (rank[name] if name == "keep" else rank[name]["levels"] for rank in (one, two))
        assert found.keys() == other.keys()
        for key in found:
            assert np.array_equal(found[key], other[key])
            assert not np.array_equal(*found[key][:2])
    shapes = {name: {k: v.shape for k, v in one[name]["levels"].items()} for name in ("auto", "batches", "forks")}
    assert shapes["auto"] == {"net.4": (2, 315)}
    assert shapes["batches"] == {"net.0": (4, 112), "net.4": (4, 315)}
    assert shapes["forks"] == {"net.2": (2, 340)}

    # each rank's row is what that rank would find alone
    ((description, kept),) = one["keep"].items()
    assert description == "the first 280 of the 315 parameters in net.4.bias, net.4.weight"
    agree(kept, np.concatenate([one["mine"], two["mine"]]))

    for rank, why in ((one, "it failed on rank 1 (ValueError: only here)"), (two, "only here")):
        assert rank["fails"]["levels"] == rank["fails, one block"]["levels"] == {}
        assert rank["fails"]["notes"] == [f"no level statistics: {why}"]
        assert rank["fails, one block"]["notes"] == [f"no level statistics of net.0: {why}"]
        assert rank["fails"]["told"] == []
        assert rank["fails"]["probes"] > 1
    start = "no level statistics: it failed on rank 1 (a copy of the model in float64"
    assert any(n.startswith(start) for n in one["memory"]["notes"])
    assert any("a copy of the model in float64" in n for n in two["memory"]["notes"])
