"""On two ranks, too, training with a probe is bitwise training without it: DDP and FSDP2 over gloo."""

from __future__ import annotations

import copy
import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import EVERY, Case, ProductProbe, differences, digest, train
from live_models import Classifier, Collected, cnn, images, vectors
from nasty_models import WritesToLogger
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from several_ranks import on_two_ranks
from torch import nn

from lightning_rmt import SpectrumMonitor
from lightning_rmt.callbacks import spectrum_monitor
from lightning_rmt.live import memory
from lightning_rmt.live.namespaces import MisconfigurationException

# of Lightning: the metrics of one rank are what the test is about
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
TIMEOUT = timedelta(seconds=30)


def ddp(find_unused: bool = False, **options: Any) -> Any:
    def build() -> dict[str, Any]:
        strategy = DDPStrategy(
            find_unused_parameters=find_unused, process_group_backend="gloo", timeout=TIMEOUT, start_method="popen"
        )
        return {"strategy": strategy, "devices": 2, **options}

    return build


class Unused(Classifier):
    """A layer that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Sharded(Classifier):
    """Both layers and the whole sharded, so that every way a group can be nested occurs."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self, "sharded"):
            for layer in (self.net[0], self.net[3]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


def fsdp2(**options: Any) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", timeout=TIMEOUT
    )
    return {"strategy": strategy, "devices": 2, **options}


CASES = (
    Case("ddp", Classifier, vectors, ddp()),
    Case("ddp, batch norm", lambda: Classifier(cnn()), images, ddp()),
    Case(
        "ddp, find_unused",
        Unused,
        vectors,
        ddp(find_unused=True),
        ignore=("SpectrumMonitor 'rmt': no gradient reaches unused",),
    ),
    Case("ddp, accumulate 2", Classifier, vectors, ddp(accumulate_grad_batches=2)),
    Case("ddp, synchronised logs", WritesToLogger, vectors, ddp()),
    Case("ddp, metric collection", Collected, vectors, ddp()),
    Case("fsdp2", Sharded, vectors, fsdp2),
    Case("fsdp2, accumulate 2", Sharded, vectors, partial(fsdp2, accumulate_grad_batches=2)),
)


def compared_on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    """In one pair of processes: the differences to a control, and what the probes saw."""
    control, seen = train(case, directory), {}
    seen["control"] = differences(train(case, directory), control)
    products = ProductProbe(case)
    seen["products"] = differences(train(case, directory, products), control)
    monitor = SpectrumMonitor(every_n_steps=EVERY, lanczos_steps=4, on_error="raise")
    seen["monitor"] = differences(train(case, directory, monitor), control)
    failing = SpectrumMonitor(every_n_steps=1, lanczos_steps=4, loss_fn=fails_on_one_rank)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen["failing"] = differences(train(case, directory, failing), control)
    seen["told"] = any("could not take its probe" in str(warning.message) for warning in told)
    seen["taken"] = (products.taken, len(monitor.history), len(failing.history))
    seen["spectrum"] = digest([monitor.reading.spectrum.nodes, monitor.reading.spectrum.weights])
    return seen


def fails_on_one_rank(module: Any, batch: Any) -> Any:
    loss = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
    if module.global_rank == 1:
        raise ValueError("only here")
    return loss


@cache
def compared(case: Case, directory: Path) -> list[dict[str, Any]]:
    return on_two_ranks(compared_on_this_rank, directory, case, directory)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_on_two_ranks_is_the_same(case, tmp_path_factory):
    one, two = compared(case, tmp_path_factory.mktemp("ranks"))
    for rank in (one, two):
        for run in ("control", "products", "monitor", "failing"):
            assert rank[run] == [], run
        assert rank["taken"][0] > 0
        assert rank["taken"][1] > 0
        assert rank["taken"][2] == 0
        assert rank["told"]
    assert one["spectrum"] == two["spectrum"]


class Ticks:
    """A clock that advances at each look, on each rank at its own pace: no budget depends on the machine's load."""

    def __init__(self, pace: int) -> None:
        self.now, self.pace = 0, pace

    def perf_counter(self) -> float:
        self.now += self.pace
        return float(self.now)


def two_speeds_on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    """Light and full probes, by steps and by budget; and a rank with less memory, or one that runs out of it."""
    control, seen = train(case, directory), {}
    fixed = SpectrumMonitor(every_n_steps=6, light_every_n_steps=2, lanczos_steps=30, on_error="raise")
    seen["fixed"] = differences(train(case, directory, fixed), control)
    budget = SpectrumMonitor(max_overhead=1.0, lanczos_steps=20, on_error="raise")
    long = replace(case, trainer=lambda: {**case.trainer(), "max_epochs": 10})
    plain = train(long, directory)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ["LOCAL_RANK"])
    spectrum_monitor.time = Ticks(1 + rank)
    try:
        seen["budget"] = differences(train(long, directory, budget), plain)
    finally:
        spectrum_monitor.time = time
    for name, monitor in (("fixed", fixed), ("budget", budget)):
        seen[f"{name} probes"] = [(e.step, e.speed, e.products, e.lambda_max) for e in monitor.history]

    size = sum(p.numel() for p in case.module().parameters())
    whole = memory.free_bytes
    memory.free_bytes = lambda device: 8 * 4 * size / memory.SHARE if rank == 1 else whole(device)
    try:
        short = SpectrumMonitor(every_n_steps=6, lanczos_steps=30, on_error="raise")
        seen["short"] = differences(train(case, directory, short), control)
        seen["basis"] = [run.reorthogonalised for run in short.reading.spectrum.runs]
        seen["spectrum"] = digest([short.reading.spectrum.nodes])
    finally:
        memory.free_bytes = whole
    return seen


def test_two_speeds_and_uneven_memory_on_two_ranks(tmp_path):
    case = CASES[0]
    one, two = on_two_ranks(two_speeds_on_this_rank, tmp_path, case, tmp_path)
    for rank in (one, two):
        assert rank["fixed"] == rank["budget"] == rank["short"] == []
        assert {speed for _, speed, _, _ in rank["fixed probes"]} == {"full", "light"}
        assert len(rank["budget probes"]) > 2
        assert rank["basis"] == [False]  # what the poorer rank can afford
    for key in ("fixed probes", "budget probes", "spectrum"):
        assert one[key] == two[key]


class WrapperProbe(ProductProbe):
    """What not to do: take the loss through the strategy, that is through DDP's forward pass."""

    def loss(self, module: Any) -> Any:
        return module.trainer.strategy.training_step(*copy.deepcopy(self._batch))


def on_every_batch(case: Case, directory: Path) -> list[str]:
    """The right way, for comparison: through the module itself, in the midst of the accumulation as well."""
    return differences(train(case, directory, ProductProbe(case, every=1)), train(case, directory))


def through_the_wrapper(case: Case, directory: Path) -> list[str]:
    return differences(train(case, directory, WrapperProbe(case, every=1)), train(case, directory))


def test_harness_sees_a_loss_that_is_taken_through_ddp(tmp_path):
    """With accumulation, DDP takes it for the pass whose gradients it has to reduce. No error, other weights."""
    (accumulated,) = (case for case in CASES if case.name == "ddp, accumulate 2")
    assert on_two_ranks(on_every_batch, tmp_path, accumulated, tmp_path) == [[], []]
    for seen in on_two_ranks(through_the_wrapper, tmp_path, accumulated, tmp_path):
        assert {"weights", "gradients"} <= set(seen)


class Hybrid(Classifier):
    """Replicated over one mesh dimension and sharded over another."""

    def configure_model(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def refused(directory: Path) -> str:
    monitor = SpectrumMonitor(every_n_steps=EVERY, lanczos_steps=4)
    try:
        train(Case("hybrid", Hybrid, vectors, fsdp2), directory, monitor)
    except MisconfigurationException as error:
        return str(error)
    return "nothing"


def test_hybrid_sharding_is_refused_before_the_first_step(tmp_path):
    for said in on_two_ranks(refused, tmp_path, tmp_path):
        assert "mesh of shape (2, 1): HSDP or tensor parallelism" in said
        assert "fully_shard over one mesh dimension" in said
