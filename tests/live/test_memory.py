"""What a probe may take: ground truths are sums done by hand, files of a control group, and what a run then shows."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Case, differences, train
from live_models import Classifier, Metered, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature.errors import GraphTooLargeError, is_out_of_memory
from lightning_rmt.live import memory as live_memory
from lightning_rmt.live.memory import (
    FEWEST_LIGHT_STEPS,
    LOCAL_VECTORS,
    PATIENCE,
    SHARE,
    WHOLE_VECTORS,
    Memory,
    Plan,
    container_headroom,
    free_bytes,
    plan,
)

F32 = torch.float32
N, M = 1000, 50
VECTOR = 4 * N
WORKING_VECTORS = LOCAL_VECTORS + WHOLE_VECTORS
WORKING = WORKING_VECTORS * VECTOR


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (WORKING + M * VECTOR, "full"),
        (WORKING + M * VECTOR - 1, "half"),
        (WORKING + M * VECTOR // 2, "half"),
        (WORKING + M * VECTOR // 2 - 1, "none"),
        (0, "none"),
    ],
)
def test_the_best_basis_that_fits(available, expected):
    assert plan(N, M, 1, F32, available) == Plan(expected, M)


@pytest.mark.parametrize(
    ("host", "expected"),
    [(M * VECTOR, "host"), (M * VECTOR - 1, "half"), (0, "half")],
)
def test_the_hosts_memory_before_a_lesser_basis(host, expected):
    short = WORKING + M * VECTOR - 1
    assert plan(N, M, 1, F32, short, host=host) == Plan(expected, M)
    assert plan(N, M, 1, F32, short + 1, host=host) == Plan("full", M)
    assert plan(N, M, 1, F32, short, host=host, largest="half").basis == "half"
    light = plan(N, M, 1, F32, short, host=host, light=True)
    assert light == (Plan("host", M) if expected == "host" else Plan("full", M - 1))


def test_processes_of_one_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(live_memory, "container_headroom", lambda root: 12000)
    for said, share in (("4", 3000), ("", 12000), ("0", 12000), ("none", 12000)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert free_bytes(torch.device("cpu")) == share
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert free_bytes(torch.device("cpu")) == 12000
    assert live_memory.host_bytes(torch.device("meta")) == 12000


def test_a_cpu_has_no_other_host():
    assert live_memory.host_bytes(torch.device("cpu")) == 0


def test_ranks_share_the_basis():
    """With 1/4 of every vector, a quarter of the bytes, besides the whole vectors of a product."""
    quarter = (WHOLE_VECTORS * N + LOCAL_VECTORS * N // 4) * 4 + M * VECTOR // 4
    assert plan(N, M, 1, F32, quarter, local_size=N // 4) == Plan("full", M)
    assert plan(N, M, 1, F32, quarter - 1, local_size=N // 4).basis == "half"


def test_more_starts_and_wider_vectors_take_more():
    assert plan(N, M, 3, F32, WORKING + M * VECTOR).basis == "half"
    assert plan(N, M, 1, torch.float64, WORKING + M * VECTOR).basis == "half"
    assert plan(20, M, 1, F32, 1e9) == Plan("full", 20)


def test_a_light_probe_takes_fewer_steps_rather_than_a_lesser_basis():
    assert plan(N, M, 1, F32, WORKING + 23.5 * VECTOR, light=True) == Plan("full", 23)
    assert plan(N, M, 1, F32, 0, light=True) == Plan("full", FEWEST_LIGHT_STEPS)
    assert plan(N, M, 1, F32, 1e9, largest="half", light=True) == Plan("full", M // 4)
    assert plan(5, M, 1, F32, 0, light=True) == Plan("full", 5)


def test_no_better_basis_than_allowed():
    assert plan(N, M, 1, F32, 1e9, largest="half").basis == "half"
    assert plan(N, M, 1, F32, 1e9, largest="none").basis == "none"


def test_free_memory_is_what_the_system_says(monkeypatch):
    found = free_bytes(torch.device("cpu"))
    assert 2**20 < found < 2**50
    monkeypatch.setattr(live_memory, "container_headroom", lambda root: 12345)
    assert free_bytes(torch.device("cpu")) == 12345
    assert free_bytes(torch.device("meta")) > 2**50  # nobody knows


@pytest.mark.parametrize(
    ("names", "cache"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
)
def test_a_containers_limit(names, cache, tmp_path):
    assert container_headroom(tmp_path) > 2**50
    (tmp_path / names[0]).parent.mkdir(exist_ok=True)
    for name, text in zip(names, ("1000", "700", f"anon 500\n{cache} 150\nother 3\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert container_headroom(tmp_path) == 1000 - 700 + 150
    (tmp_path / names[0]).write_text("max\n")
    assert container_headroom(tmp_path) > 2**50


def caused(error: Exception) -> Exception:
    outer = ValueError("a product failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("no"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (caused(MemoryError()), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_an_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_allocators_own_error_is_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def operator(size: int = N) -> Any:
    return SimpleNamespace(size=size, dtype=F32, device=torch.device("cpu"))


def test_after_an_out_of_memory_the_larger_part_gets_smaller(monkeypatch):
    monkeypatch.setattr(live_memory, "free_bytes", lambda device: 10**9)
    memory = Memory()
    assert memory.for_graphs(torch.device("cpu")) == int(SHARE * 10**9)
    assert "as little as it could" in memory.shrink(MemoryError())  # nothing was there yet
    memory.graphs = 8000
    assert memory.plan(operator(), M, 1) == Plan("full", M)
    assert "in bfloat16" in memory.shrink(MemoryError())
    assert memory.plan(operator(), M, 1) == Plan("half", M)
    assert "not at all" in memory.shrink(MemoryError())
    assert memory.plan(operator(), M, 1) == Plan("none", M)
    assert "graphs get" in memory.shrink(MemoryError())
    assert memory.for_graphs(torch.device("cpu")) == 2000
    assert memory.shrink(KeyError("another reason")) is None
    assert "just that" in memory.shrink(GraphTooLargeError(2500, 2000))  # the smallest form that there is
    assert memory.for_graphs(torch.device("cpu")) == 2500
    for _ in range(PATIENCE):
        memory.worked()
    assert (memory.largest_basis, memory.graph_limit) == ("full", None)  # the shortage may have passed


def test_graphs_get_smaller_before_eigenvalues_are_given_up(monkeypatch):
    monkeypatch.setattr(live_memory, "free_bytes", lambda device: 10**9)
    memory = Memory()
    memory.plan(operator(), M, 1)  # a basis of 200 kB
    memory.graphs = 190_000
    assert "graphs get" in memory.shrink(MemoryError())
    assert "in bfloat16" in memory.shrink(MemoryError())
    memory.worked()
    assert memory.largest_basis == "half"


# --- on a real training -------------------------------------------------------------------------------------------------

CASE = Case("mlp, Adam, scheduler, torchmetrics", Metered, vectors)


def monitor(**options: Any) -> SpectrumMonitor:
    return SpectrumMonitor(**{"every_n_steps": 4, "lanczos_steps": 20, "figures_every": 0, **options})


@pytest.mark.parametrize(("share_of_basis", "kept"), [(0.75, "bfloat16"), (0.1, "not kept")])
def test_a_basis_that_does_not_fit_leaves_the_density(share_of_basis, kept, tmp_path, monkeypatch):
    size = sum(p.numel() for p in Metered().parameters())
    free = (share_of_basis * 40 + WORKING_VECTORS) * 4 * size / SHARE
    monkeypatch.setattr(live_memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(Memory, "for_graphs", lambda self, device: 2**40)
    watch = monitor(on_error="raise", lanczos_steps=40)
    assert differences(train(CASE, tmp_path / "watched", watch), train(CASE, tmp_path / "control")) == []
    reading = watch.reading
    assert any("memory is short" in note and kept in note for note in reading.notes)
    assert reading.spectrum.top == ()
    assert reading.spectrum.outliers.high.count is None
    whole = monitor(on_error="raise", lanczos_steps=40)
    monkeypatch.setattr(live_memory, "free_bytes", lambda device: 2**40)
    train(CASE, tmp_path / "whole", whole)
    assert whole.reading.spectrum.top
    for k in (1, 2, 3):  # the same start vector sees the same measure
        seen = [float(r.spectrum.weights[0] @ r.spectrum.nodes[0] ** k) for r in (reading, whole.reading)]
        assert seen[0] == pytest.approx(seen[1], rel=5e-3)  # bfloat16 rounds to 2e-3, and these are few entries
    assert not any("memory" in note for note in whole.reading.notes)


def test_the_probe_after_an_out_of_memory_is_smaller_and_the_log_says_so(tmp_path, monkeypatch):
    """The allocation of a whole basis fails, as on a device that is nearly full; that of half of it works."""
    from lightning_rmt.krylov import lanczos

    class Run(lanczos._Run):
        def __init__(self, start: Any, basis: str, *arguments: Any) -> None:
            if basis == "full":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
            super().__init__(start, basis, *arguments)

    monkeypatch.setattr(lanczos, "_Run", Run)
    watch = monitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prints = train(CASE, tmp_path / "watched", watch)
    said = [str(w.message) for w in caught if "SpectrumMonitor" in str(w.message)]
    assert len(said) == 1
    assert re.search("out of memory.*the next probe keeps its Lanczos basis in bfloat16", said[0])
    assert differences(prints, train(CASE, tmp_path / "control")) == []
    assert [entry.step for entry in watch.history] == [4, 8]
    assert any("bfloat16" in note for note in watch.reading.notes)


def many() -> DataLoader:
    """Two batches of 96 samples: graphs of activations rather than of weights."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(192, 6, generator=generator), torch.randint(3, (192,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=96, shuffle=True)


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)))


def test_graphs_that_do_not_fit_are_built_in_pieces(tmp_path, monkeypatch):
    """The same eigenvalues, from products with two of four samples at a time; and the reading says so."""
    case = Case("mlp without dropout", Small, many)
    whole = monitor(on_error="raise", lanczos_steps=30)
    train(case, tmp_path / "whole", whole)
    needed = whole._memory.graphs
    assert needed > 0
    monkeypatch.setattr(Memory, "for_graphs", lambda self, device: int(0.9 * needed))
    watch = monitor(on_error="raise", lanczos_steps=30)
    assert differences(train(case, tmp_path / "watched", watch), train(case, tmp_path / "control")) == []
    assert any("memory is short: pieces of" in note for note in watch.reading.notes)
    assert watch.reading.spectrum.lambda_max.value == pytest.approx(whole.reading.spectrum.lambda_max.value, rel=1e-5)
    assert watch.reading.samples == whole.reading.samples == 96


def test_a_product_that_runs_out_of_memory_leads_to_a_smaller_probe(tmp_path, monkeypatch):
    from lightning_rmt.curvature.hessian import Hessian

    product = Hessian._batch_products

    def fails(self: Hessian, index: int, V: torch.Tensor) -> torch.Tensor:
        if self._rerun is None and self.samples == 96:  # with whole graphs
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return product(self, index, V)

    monkeypatch.setattr(Hessian, "_batch_products", fails)
    monkeypatch.setattr(Memory, "plan", lambda self, operator, steps, probes, **limits: Plan("full", steps))
    case = Case("dropout", Metered, many)
    watch = monitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="out of memory.*the next probe's graphs get .* MiB, and are built in pieces"):
        prints = train(case, tmp_path / "watched", watch)
    assert differences(prints, train(case, tmp_path / "control")) == []
    assert [entry.step for entry in watch.history] == [1, 2, 3]
    assert any("memory is short: the first" in note for note in watch.reading.notes)
