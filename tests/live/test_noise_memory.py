"""What the noise's vectors take, as it is announced, against what a process takes."""

from __future__ import annotations

import ctypes
import gc
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several_ranks import on_ranks

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.krylov.shards import EvenShards, even_length
from lightning_rmt.live.memory import noise_vectors
from lightning_rmt.live.noise import MOST_DIRECTIONS, RANDOM, RESOLVED
from lightning_rmt.local_law.noise import noise_scale

SIZE = 1_000_001
PROC = Path("/proc/self")


class Scaled(CurvatureOperator):
    """A multiple of the identity, which keeps nothing but its gradient."""

    def __init__(self, x: torch.Tensor, factor: float) -> None:
        super().__init__(ParameterBlock([("x", x)]))
        self.factor, self.samples, self.loss_value, self.used = factor, 4.0, 0.0, (True,)
        self.gradient = x.detach()  # no memory of its own

    def _matmat(self, V: torch.Tensor) -> torch.Tensor:
        return V * self.factor


def status(name: str) -> int:
    """In bytes."""
    lines = (line.split() for line in (PROC / "status").read_text().splitlines())
    return next(1024 * int(line[1]) for line in lines if line[0] == f"{name}:")


def peak_on_this_rank() -> int:
    """Bytes that the noise of an operator takes at most, its outliers' directions included."""
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = dist.get_world_size()
    x = torch.zeros(SIZE, requires_grad=True)
    halves = [Scaled(x, factor) for factor in (1.0, 2.0)]
    if ranks > 1:
        halves = [RankSum(half, sharded=True) for half in halves]
        assert isinstance(halves[0].shards, EvenShards)
    noise_scale(*halves, 1, 0)  # what is loaded and made once
    for half in halves:
        if ranks > 1:
            half.shards._parts = half.shards._whole = torch.empty(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    (PROC / "clear_refs").write_text("5")  # forgets the peak so far
    outliers = torch.full((MOST_DIRECTIONS, even_length(SIZE, ranks)), 1e-4)
    noise_scale(*halves, RANDOM, 0, outliers=outliers, resolved=RESOLVED)
    return status("VmHWM") - before


@pytest.mark.skipif(not (PROC / "clear_refs").exists(), reason="the peak of a process is read where Linux keeps it")
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_noises_vectors_take_what_is_forecast(ranks, tmp_path):
    forecast = noise_vectors(SIZE, torch.float32, MOST_DIRECTIONS, RANDOM + RESOLVED, RANDOM, even_length(SIZE, ranks))
    assert forecast.directions == MOST_DIRECTIONS * 4 * even_length(SIZE, ranks)
    for measured in on_ranks(ranks, peak_on_this_rank, tmp_path, fresh=True):
        assert 0.85 * sum(forecast) <= measured <= 1.05 * sum(forecast)
