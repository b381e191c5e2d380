"""FSDP2 where whole parameters don't fit: spectra from differences on the shards, and training bitwise as without."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # FSDP imports it: here, and not in every process that is forked from this one
import torch.distributed as dist
from harness import Case, differences, train
from live_models import Classifier, vectors
from pytorch_lightning.strategies import ModelParallelStrategy
from several_ranks import on_two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_rmt import SpectrumMonitor
from lightning_rmt.live import measurement
from lightning_rmt.live import memory as live_memory
from lightning_rmt.live.memory import SHARE, WHOLE_VECTORS, Memory, Plan, gathered_bytes, plan

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
SIZE = 6 * 9 + 9 + 9 + 9 + 9 * 3 + 3


class Uneven(Classifier):
    """Nine rows and three over two ranks; one layer in its own group, the rest in the root's."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float32) -> None:
        net = [nn.Linear(6, 9), activation(), nn.Dropout(0.2), nn.LayerNorm(9), nn.Linear(9, 3)]
        super().__init__(nn.Sequential(*net).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(next(self.parameters()).dtype))

    def configure_model(self) -> None:
        if not hasattr(self, "sharded"):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


def fsdp2(**options: Any) -> Any:
    def build() -> dict[str, Any]:
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo", timeout=timedelta(seconds=30))
        return {"strategy": strategy, "devices": 2, **options}

    return build


def case(activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float32, accumulated: int = 1) -> Case:
    return Case("fsdp2", lambda: Uneven(activation, dtype), vectors, fsdp2(accumulate_grad_batches=accumulated))


@contextmanager
def free(on_second_rank: float) -> Any:
    """So much memory on the second rank, at the moment of the decision; nothing may be gathered where it isn't enough."""
    original, whole, unsharded = Memory.can_gather, live_memory.free_bytes, measurement.unsharded

    def can_gather(self: Memory, needed: int, device: torch.device) -> bool:
        if dist.get_rank() == 1:
            live_memory.free_bytes = lambda device: on_second_rank
        try:
            return original(self, needed, device)
        finally:
            live_memory.free_bytes = whole

    def gathered(module: Any) -> Any:
        assert on_second_rank >= ENOUGH  # else there is nothing to gather for
        return unsharded(module)

    Memory.can_gather, measurement.unsharded = can_gather, gathered
    try:
        yield
    finally:
        Memory.can_gather, measurement.unsharded = original, unsharded


#: The parameters once, a gradient, and a product's vectors, all in float32.
ENOUGH = 4 * SIZE * (2 + WHOLE_VECTORS) / SHARE * (1 + 1e-9)


def spectra_on_this_rank(directory: Path, dtype: torch.dtype, accumulated: int) -> dict[str, Any]:
    """With enough memory on one rank only: against training without a monitor, and against the whole Hessian."""
    of = case(dtype=dtype, accumulated=accumulated)
    control, seen = train(of, directory), {}
    enough, options = ENOUGH * dtype.itemsize / 4, {"every_n_steps": 4 // accumulated, "lanczos_steps": 20}
    monitor = SpectrumMonitor(**options, light_every_n_steps=2 // accumulated, blocks=["net.0.*"], on_error="raise")
    plans, planned = [], Memory.plan
    Memory.plan = lambda self, operator, *a, **k: plans.append(k) or planned(self, operator, *a, **k)
    try:
        with free(on_second_rank=0.99 * enough):
            seen["shards"] = differences(train(of, directory, monitor), control)
    finally:
        Memory.plan = planned
    seen["planned"] = {(k["local_size"], k["product_size"]) for k in plans}
    reading = monitor.reading
    seen["step"] = reading.step
    seen["product"], seen["error"], seen["notes"] = reading.product, reading.product_error, reading.notes
    seen["extras"] = (reading.levels, dict(reading.blocks))
    seen["parameters"], seen["samples"], seen["size"] = reading.parameters, reading.samples, reading.spectrum.size
    seen["history"] = [(e.step, e.speed, e.lambda_max) for e in monitor.history]
    whole = SpectrumMonitor(**options, levels=None, on_error="raise")
    with free(on_second_rank=enough):
        seen["whole"] = differences(train(of, directory, whole), control)
    seen["whole product"] = whole.reading.product
    seen["whole history"] = [(e.step, e.lambda_max) for e in whole.history]
    return seen


@pytest.mark.parametrize(
    ("dtype", "accumulated", "error"), [(torch.float32, 2, 3e-3), (torch.float32, 1, 3e-3), (torch.float64, 1, 1e-6)]
)
def test_spectra_on_shards_are_those_of_the_whole(dtype, accumulated, error, tmp_path):
    one, two = on_two_ranks(spectra_on_this_rank, tmp_path, tmp_path, dtype, accumulated)
    assert one["history"] == two["history"]
    for rank in (one, two):
        assert rank["shards"] == rank["whole"] == []
        assert (rank["product"], rank["whole product"]) == ("finite_difference", "exact")
        assert 0 < rank["error"] < error
        assert any("finite differences of gradients on the parameters' shards" in note for note in rank["notes"])
        assert sum("they take whole parameters" in note for note in rank["notes"]) == 3
        assert rank["extras"] == ((), {})
        assert rank["size"] == SIZE
        ((held, in_products),) = rank["planned"]
        assert held == in_products < 0.6 * SIZE
        assert rank["samples"] == 8
        assert rank["parameters"][0] == "net.0.weight"
        full = {step: value for step, speed, value in rank["history"] if speed == "full"}
        assert {speed for _, speed, _ in rank["history"]} == {"full", "light"}
        assert full.keys() == {step for step, _ in rank["whole history"]}
        for step, value in rank["whole history"]:  # the last reading's error is at hand
            assert abs(full[step] - value) <= (rank["error"] if step == rank["step"] else error) * value


def fails_on_one_rank(module: Any, batch: Any) -> Any:
    loss = nn.functional.cross_entropy(module(batch[0]), batch[1])
    if module.global_rank == 1:
        raise ValueError("only here")
    return loss


def fails_within(module: Any, batch: Any) -> Any:
    """On all ranks, within the backward pass."""
    out = module(batch[0])
    out.register_hook(_fail)
    return nn.functional.cross_entropy(out, batch[1])


def _fail(*_: Any) -> None:
    raise ValueError("everywhere")


def refusals_on_this_rank(directory: Path) -> dict[str, Any]:
    """What can't be had is said, on all ranks, and training is the same."""
    seen = {}
    smooth, kinked = case(), case(nn.ReLU)
    controls = {id(of): train(of, directory) for of in (smooth, kinked)}
    for name, of, options in (
        ("one rank", smooth, {"loss_fn": fails_on_one_rank}),
        ("all ranks", smooth, {"loss_fn": fails_within}),
        ("exact", smooth, {"product": "exact"}),
        ("ggn", smooth, {"curvature": "gradient_covariance"}),
        ("kinks", kinked, {}),
    ):
        monitor = SpectrumMonitor(every_n_steps=3, lanczos_steps=4, **options)
        with free(on_second_rank=0), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            prints = train(of, directory, monitor)
        said = [str(w.message) for w in told if "could not take its probe" in str(w.message)]
        seen[name] = (differences(prints, controls[id(of)]), len(monitor.history), said[0] if said else "")
    return seen


def test_what_cannot_be_had_on_shards_is_said_and_training_is_the_same(tmp_path):
    one, two = on_two_ranks(refusals_on_this_rank, tmp_path, tmp_path)
    for rank in (one, two):
        for name, (changed, readings, _) in rank.items():
            assert changed == [], name
            assert readings == 0
    said = {name: (one[name][2], two[name][2]) for name in one}
    assert "only here" in said["one rank"][1]
    assert "everywhere" in said["all ranks"][0]
    assert "product='exact' takes whole parameters" in said["exact"][0]
    assert "curvature='gradient_covariance' takes whole parameters" in said["ggn"][0]
    assert "the loss has kinks (Relu)" in said["kinks"][0]


def test_gathering_needs_the_parameters_a_gradient_and_the_products_vectors(monkeypatch):
    needed = gathered_bytes(1000, 100, 2, torch.float32)
    assert needed == 1000 + 400 + 2 * WHOLE_VECTORS * 400
    memory = Memory()
    for available, fits in ((needed / SHARE + 1, True), (needed / SHARE - 1, False)):
        monkeypatch.setattr(live_memory, "free_bytes", lambda device, available=available: available)
        assert memory.can_gather(needed, torch.device("cpu")) is fits


def test_a_product_on_shards_takes_parts_of_vectors_only():
    room = 4 * 25 * (3 + WHOLE_VECTORS + 10)
    assert plan(100, 10, 1, torch.float32, room, local_size=25, product_size=25) == Plan("full", 10)
    assert plan(100, 10, 1, torch.float32, room - 1, local_size=25, product_size=25).basis == "half"
    assert plan(100, 10, 1, torch.float32, room, local_size=25).basis == "none"


def test_graphs_that_do_not_fit_beside_whole_parameters_leave_them_sharded_next_time(monkeypatch):
    from lightning_rmt.curvature.errors import GraphTooLargeError

    memory = Memory()
    monkeypatch.setattr(live_memory, "free_bytes", lambda device: 1e9)
    assert memory.shrink(GraphTooLargeError(2, 1)) is None  # not sharded: what it had was all
    assert memory.can_gather(1, torch.device("cpu"))
    memory.gathered = True
    assert "on the shards" in memory.shrink(GraphTooLargeError(2, 1))
    assert not memory.can_gather(1, torch.device("cpu"))
    for _ in range(live_memory.PATIENCE):
        memory.worked()
    assert memory.can_gather(1, torch.device("cpu"))
