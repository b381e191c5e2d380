"""Lanczos with its vectors spread over ranks is Lanczos: same coefficients, one collective where one is enough, 1/W of the
memory."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scaling_model import bytes_sent, collectives, probe_cost, table
from several_ranks import on_ranks
from torch import nn

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov import shards as shards_module
from lightning_rmt.krylov.lanczos import basis_bytes, lanczos_lockstep, start_vector
from lightning_rmt.krylov.shards import EvenShards, even_length
from lightning_rmt.probe import check_product, estimate_spectrum

STEPS = 40
SAMPLES = 24
#: Shares of the batch by number of ranks.
EQUAL = {1: (24,), 2: (12, 12), 4: (6, 6, 6, 6)}
UNEVEN = {1: (24,), 2: (19, 5), 4: (1, 10, 6, 7)}


def operator_on(shares, dtype, rank):
    """A tanh network of 243 parameters (not divisible by 2 or 4) on this rank's share of the global batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    x, y = torch.randn(SAMPLES, 6).to(dtype), torch.randn(SAMPLES, 1).to(dtype)
    first = sum(shares[:rank])
    mine = slice(first, first + shares[rank])
    return Hessian(lambda b: F.mse_loss(net(b[0]), b[1]), net.parameters(), [(x[mine], y[mine])])


class Counted:
    """Counts collectives and the bytes that go into them."""

    def __enter__(self):
        self.calls, self._originals = [], {}
        for module, name in (
            (dist, "all_reduce"),
            (shards_module, "_all_gather"),
            (shards_module, "_reduce_scatter"),
        ):
            original = self._originals[module, name] = getattr(module, name)

            def counted(*args, _original=original, _name=name, **kwargs):
                tensor = args[0] if _name != "_reduce_scatter" else args[1]
                self.calls.append((_name.strip("_"), tensor.numel() * tensor.itemsize))
                return _original(*args, **kwargs)

            setattr(module, name, counted)
        return self

    def __exit__(self, *_):
        for (module, name), original in self._originals.items():
            setattr(module, name, original)


def spectra_on_this_rank(ranks, shares, dtype):
    if ranks > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank() if ranks > 1 else 0
    found = {}
    for sharded in (False, True):
        operator = operator_on(shares, dtype, rank)
        if ranks > 1:
            operator = RankSum(operator, sharded=sharded)
        found[sharded] = estimate_spectrum(operator, steps=STEPS, probes=2, seed=3)
        found["ok", sharded] = check_product(operator, seed=1).ok
    return found


@cache
def spectra(ranks, kind, dtype, directory):
    shares = {"equal": EQUAL, "uneven": UNEVEN}[kind][ranks]
    return on_ranks(ranks, spectra_on_this_rank, directory, ranks, shares, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def assert_same(one, other, relative):
    """All Ritz values of the run that keeps its basis, in double precision; in single precision what a user reads off."""
    scale = abs(other.lambda_max.value)
    if relative < 1e-6:
        assert np.abs(one.nodes[0] - other.nodes[0]).max() <= relative * scale
    for mine, theirs in zip((*one.top, *one.bottom), (*other.top, *other.bottom), strict=True):
        assert abs(mine.value - theirs.value) <= relative * scale
    for mine, theirs in ((one.trace, other.trace), (one.frobenius, other.frobenius)):
        assert abs(mine.mean - theirs.mean) <= 1e-3 * theirs.stderr  # the second start keeps no basis: rounding shows
    for x in (one.quantile(0.1), one.quantile(0.9)):
        assert abs(one.cdf(x) - other.cdf(x)) <= 2 / one.size  # the same second start, two levels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["equal", "uneven"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_spectrum(ranks, kind, dtype, folder):
    alone = spectra(1, "equal", dtype, folder)[0][False]
    everyone = spectra(ranks, kind, dtype, folder)
    for sharded in (False, True):
        first = everyone[0][sharded]
        assert_same(first, alone, 1e-10 if dtype == torch.float64 else 1e-5)
        for seen in everyone:  # every rank decides from the same numbers, to the last bit
            assert seen["ok", sharded]
            for mine, one in zip(seen[sharded].runs, first.runs, strict=True):
                assert np.array_equal(mine.alpha, one.alpha)
                assert np.array_equal(mine.beta, one.beta)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_and_replicated_bases_agree(ranks, folder):
    seen = spectra(ranks, "uneven", torch.float64, folder)[0]
    assert_same(seen[True], seen[False], 1e-12)


def collectives_on_this_rank(steps, probes):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = {}
    for sharded in (False, True):
        operator = RankSum(operator_on(EQUAL[2], torch.float64, dist.get_rank()), sharded=sharded)
        starts = [start_vector(operator, probe) for probe in range(probes)]
        with Counted() as counted:
            lanczos_lockstep(operator, starts, steps, bases=["full"] + ["none"] * (probes - 1))
        found[sharded] = counted.calls
    return operator.size, found


@pytest.mark.parametrize("probes", [1, 2])
def test_collectives_and_their_bytes_are_those_of_the_scaling_model(probes, tmp_path):
    """One collective a product (in two halves where vectors are sharded), one for a Gram-Schmidt pass, one for a norm."""
    steps = 6
    (size, found), other = on_ranks(2, collectives_on_this_rank, tmp_path, steps, probes)
    assert other == (size, found)
    agreed = [("all_reduce", 8)]  # that everyone has its memory
    assert found[False] == agreed + steps * [("all_reduce", 8 * probes * size)]

    assert found[True] == collectives(size, 2, steps, probes, itemsize=8)
    names = [name for name, _ in found[True]]
    assert names.count("all_gather") == names.count("reduce_scatter") == steps
    assert names.count("all_reduce") == (1 + (probes > 1)) + probes + 2 * steps * probes + steps


class ShardedDiagonal:
    """Needs no communication, so that nothing but Lanczos takes memory."""

    def __init__(self, size):
        self.size, self.device, self.dtype = size, torch.device("cpu"), torch.float32
        self.shards = EvenShards(size)
        self._values = torch.linspace(0, 1, self.shards.local_size)

    def matmat(self, V):
        return V * self._values


def test_the_scaling_model_adds_up_what_is_counted():
    size, ranks, steps = 1001, 4, 7
    cost = probe_cost(size, ranks, steps=steps)
    assert cost.basis == basis_bytes("full", size, steps, torch.float32, even_length(size, ranks))
    assert cost.sent == sum(bytes_sent(*call, ranks) for call in collectives(size, ranks, steps, 1))
    # reduce-scatter and all-gather: what one all-reduce of the product would send
    assert cost.sent == pytest.approx(steps * bytes_sent("all_reduce", 4 * size, ranks), rel=0.15)
    assert probe_cost(10**8, 8).basis == 100 * 4 * 10**8 / 8


def test_the_published_table_is_the_models():
    assert table() in (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def memory_on_this_rank(size, steps):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    operator = ShardedDiagonal(size)
    start = start_vector(operator, 0)
    process = psutil.Process()
    before = process.memory_info().rss
    held = []
    lanczos_lockstep(
        operator, [start], steps, bases=["full"], on_step=lambda _: held.append(process.memory_info().rss - before)
    )
    return held[-1], basis_bytes("full", size, steps, operator.dtype, operator.shards.local_size)


def test_the_memory_of_a_rank_falls_as_the_number_of_ranks(tmp_path):
    size, steps = 2_000_001, 40
    per_rank = {}
    for ranks in (1, 2, 4):
        seen = on_ranks(ranks, memory_on_this_rank, tmp_path, size, steps)
        for measured, forecast in seen:
            assert forecast == 4 * steps * even_length(size, ranks)
            vectors = 4 * 12 * even_length(size, ranks)
            assert forecast * 0.95 <= measured <= forecast + vectors + 2**25
        per_rank[ranks] = max(measured for measured, _ in seen)
    assert per_rank[2] == pytest.approx(per_rank[1] / 2, rel=0.15)
    assert per_rank[4] == pytest.approx(per_rank[1] / 4, rel=0.2)


def fewer_entries_than_ranks(size):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    x = torch.ones(size, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1.0, size + 1, dtype=torch.float64)
    operator = RankSum(Hessian(lambda b: 0.5 * (scale * x**2).sum() * b.mean(), [x], [torch.ones(2)]), sharded=True)
    return estimate_spectrum(operator, steps=10, seed=0).nodes[0]


def test_fewer_entries_than_ranks(tmp_path):
    for nodes in on_ranks(4, fewer_entries_than_ranks, tmp_path, 3):
        assert nodes == pytest.approx([1.0, 2.0, 3.0])


def allocation_fails_on_one_rank():
    from lightning_rmt.krylov import lanczos

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    operator = RankSum(operator_on(EQUAL[2], torch.float64, dist.get_rank()), sharded=True)
    if dist.get_rank() == 1:
        lanczos._Run = None
    try:
        estimate_spectrum(operator, steps=4)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    after = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(after)  # nobody is still waiting in the probe
    return said, after.item()


def test_a_rank_without_memory_for_its_basis_stops_all_before_the_first_product(tmp_path):
    one, two = on_ranks(2, allocation_fails_on_one_rank, tmp_path)
    assert "OtherRankFailedError: another rank has no memory" in one[0]
    assert "TypeError" in two[0]
    assert one[1] == two[1] == 3.0


def test_host_basis_is_as_good_as_one_on_the_device():
    operator = operator_on(EQUAL[1], torch.float64, 0)
    full, host = (estimate_spectrum(operator, steps=STEPS, seed=3, basis=basis) for basis in ("full", "host"))
    assert np.array_equal(full.nodes, host.nodes)
    assert host.top == full.top
