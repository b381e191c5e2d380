"""What is free, and what a probe may take of it: how it keeps its basis, how large its graphs may be."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_rmt.curvature.errors import GraphTooLargeError, is_out_of_memory
from lightning_rmt.krylov.lanczos import BASES, Basis, SymmetricOperator, basis_bytes
from lightning_rmt.live.ranks import Ranks

#: Share of the free memory that a probe may take. The rest is for what it holds for a moment (the temporaries of a backward
#: pass) and for other processes.
SHARE = 0.7
#: Whole vectors that a run holds besides its basis: the product's input, itself and its parts. On shards, parts of vectors:
#: a copy of the parameters, a gradient and the product.
WHOLE_VECTORS = 3
#: Vectors that it holds as long as they are (a part of each, where there are several ranks): the last two and the next one.
LOCAL_VECTORS = 3
#: Fewest steps that a light probe is cut down to where its basis doesn't fit.
FEWEST_LIGHT_STEPS = 10
#: An out-of-memory leaves graphs this share of what they took.
SMALLER = 0.25
#: Probes that work after one that ran out of memory before a larger one is tried again: the shortage may have passed.
PATIENCE = 10

_UNLIMITED = 2**60
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now, in bytes; a very large number where nobody knows.

    On a CPU this process's share of what the system calls available, but no more than a container's limit leaves. On an
    accelerator what is free on it and what PyTorch's caching allocator holds unused.
    """
    if device.type == "cpu":
        import psutil

        return min(int(psutil.virtual_memory().available), container_headroom(_CGROUP)) // processes_here()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return _UNLIMITED


def host_bytes(device: torch.device) -> int:
    """The host's memory that a process can have besides its device's; 0 on a CPU."""
    return 0 if device.type == "cpu" else free_bytes(torch.device("cpu"))


def processes_here() -> int:
    """Processes of this training that share the host's memory: what the launcher says, else as if all were on one host."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def container_headroom(root: Path) -> int:
    """What a control group's limit leaves, in bytes; psutil sees the whole machine.

    Args:
        root: where control groups are mounted; version 2 and version 1 are known.
    """
    for folder, limit_name, used_name, cache_key in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))  # "max" is no number
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = next((int(value) for key, value in lines if key == cache_key), 0)
        except (OSError, ValueError):
            continue
        return max(limit - used + cache, 0)  # file pages that nobody uses are given back before anything is refused
    return _UNLIMITED


class Plan(NamedTuple):
    """How a probe keeps its Lanczos basis, in this process.

    Attributes:
        basis: see `Basis`.
        steps: products per start, at most.
    """

    basis: Basis
    steps: int


def least_plan(ranks: Ranks, mine: Plan) -> Plan:
    """The least that any rank planned."""
    least, fewest = ranks.largest((BASES.index(mine.basis), -mine.steps))
    return Plan(BASES[least], -fewest)


def plan(
    size: int,
    steps: int,
    probes: int,
    dtype: torch.dtype,
    available: float,
    *,
    host: float = 0.0,
    local_size: int | None = None,
    largest: Basis = "full",
    light: bool = False,
    product_size: int | None = None,
) -> Plan:
    """The best basis that fits: whole, whole in the host's memory, in bfloat16 (density only), or none (density only).

    A light probe is after eigenvalues, which only a whole basis gives, so it takes fewer steps rather than a lesser one.

    Args:
        size: n.
        steps: products per start that are wanted.
        probes: start vectors.
        dtype: of the vectors.
        available: bytes that it may take.
        host: bytes that it may take of the host's memory, where that isn't the device's.
        local_size: entries of each vector that this process holds; None: all.
        largest: the best basis that may be chosen.
        light: for a light probe.
        product_size: entries of the vectors that a product works on; None: n.
    """
    steps = min(steps, size)
    length = size if local_size is None else local_size
    whole = size if product_size is None else product_size
    left = max(available - (WHOLE_VECTORS * whole + LOCAL_VECTORS * length) * probes * dtype.itemsize, 0)
    room = {"full": left, "host": host, "half": left, "none": left}
    bases = BASES[BASES.index(largest) :]
    fitting = [b for b in bases if basis_bytes(b, size, steps, dtype, length) <= room[b]]
    if not light or fitting[:1] == ["full"] or fitting[:1] == ["host"]:
        return Plan(next(iter(fitting), "none"), steps)
    wanted = steps if largest == "full" else steps // 4  # a whole basis ran out of memory before
    rows = min(int(left // (length * dtype.itemsize)), wanted)
    return Plan("full", min(max(rows, FEWEST_LIGHT_STEPS), steps))


def gathered_bytes(parameters: int, size: int, probes: int, dtype: torch.dtype) -> int:
    """What products with the whole parameters of a sharded module take at least: these, a gradient, and vectors.

    Graphs come on top, of which nobody knows before; they get what is left, as without sharding.

    Args:
        parameters: bytes of all parameters.
        size: n.
        probes: start vectors.
        dtype: of the vectors.
    """
    return parameters + (1 + WHOLE_VECTORS * probes) * size * dtype.itemsize


class NoiseVectors(NamedTuple):
    """Vectors of the noise measurement in this process, in bytes.

    Attributes:
        directions: of the outliers, taken while the basis is there.
        working: what the halves' products take besides, once it is gone.
    """

    directions: int = 0
    working: int = 0


def noise_vectors(
    size: int, dtype: torch.dtype, directions: int, products: int, random: int, local_size: int | None = None
) -> NoiseVectors:
    """The memory of `noise_scale` in this process, besides graphs.

    Alone: the random vectors as they are drawn, then a stack of all, both halves' products and their difference. With parts
    of vectors: buffers of either half's exchange, parts and whole, and within a product whole vectors twice more.

    Args:
        size: n.
        dtype: of the vectors.
        directions: of outliers, at most.
        products: vectors that either half is multiplied with, together.
        random: how many of these are random.
        local_size: entries of each vector that this process holds; None: all.
    """
    length = size if local_size is None else local_size
    stacks, whole = (4, 0) if length == size else (5, 4)
    working = (random + stacks * products) * length + whole * products * size
    return NoiseVectors(min(directions, size // 2) * length * dtype.itemsize, working * dtype.itemsize)


class Memory:
    """What probes may take of the free memory; after an out-of-memory, less, until enough of them have worked.

    Attributes:
        largest_basis: the best basis that a probe may keep.
        graph_limit: bytes that its graphs may take, whatever is free; None: no limit of their own.
        graphs: bytes that they took when that was last looked at.
        free: bytes that were free before the last probe.
        gathered: whether the last probe had whole parameters, where training has them sharded.
    """

    def __init__(self) -> None:
        self.largest_basis: Basis = "full"
        self.graph_limit: int | None = None
        self.graphs = 0
        self.free = 0
        self.gathered = False
        self._may_gather = True
        self._basis_bytes = 0
        self._has_host = False
        self._worked = 0

    def can_gather(self, needed: int, device: torch.device) -> bool:
        """Whether a probe may gather the whole parameters of a sharded module on this device; see `gathered_bytes`."""
        self.free = free_bytes(device)
        return self._may_gather and needed <= SHARE * self.free

    def for_graphs(self, device: torch.device) -> int:
        """Bytes that the graphs of a probe on this device may take."""
        self.free = free_bytes(device)
        allowed = int(SHARE * self.free)
        return allowed if self.graph_limit is None else min(allowed, self.graph_limit)

    def plan(
        self,
        operator: SymmetricOperator,
        steps: int,
        probes: int,
        *,
        local_size: int | None = None,
        light: bool = False,
        product_size: int | None = None,
    ) -> Plan:
        """The basis of a probe with this operator, whose graphs are there already; see `plan`."""
        size, dtype, device, free = operator.size, operator.dtype, operator.device, free_bytes(operator.device)
        self.free = max(self.free, free)
        host = SHARE * host_bytes(device)
        found = plan(
            size,
            steps,
            probes,
            dtype,
            SHARE * free,
            host=host,
            local_size=local_size,
            largest=self.largest_basis,
            light=light,
            product_size=product_size,
        )
        self._basis_bytes = basis_bytes(found.basis, size, found.steps, dtype, local_size)
        self._has_host = host > 0
        return found

    def try_out(self, operator: SymmetricOperator, found: Plan, local_size: int | None = None) -> None:
        """Takes the memory of the basis once and gives it back: whoever hasn't got it fails now."""
        kept = basis_bytes(found.basis, operator.size, found.steps, operator.dtype, local_size)
        torch.empty(kept, dtype=torch.uint8, device="cpu" if found.basis == "host" else operator.device)

    def worked(self) -> None:
        """Notes a probe that worked: after `PATIENCE` of them the next is as large as the first one was meant to be."""
        self._worked += 1
        if self._worked >= PATIENCE:
            self.largest_basis, self.graph_limit, self._worked, self._may_gather = "full", None, 0, True

    def shrink(self, error: BaseException) -> str | None:
        """What a probe that failed means for the next one: where memory ran out, it is to be smaller; words that say how.

        Returns:
            None where it didn't fail for want of memory.
        """
        self._worked = 0
        if isinstance(error, GraphTooLargeError) and self.graph_limit is not None:  # it asked for more than can be done
            self.graph_limit = max(self.graph_limit, error.needed)
            return "the next probe's graphs get just that"
        if isinstance(error, GraphTooLargeError) and self.gathered:
            return self._on_shards()
        return self._after_out_of_memory() if is_out_of_memory(error) else None

    def _on_shards(self) -> str:
        self._may_gather = False
        return "the next probe leaves the parameters sharded, and takes finite differences on the shards"

    def _after_out_of_memory(self) -> str:
        """Smaller graphs cost time, a lesser basis all eigenvalues: graphs first, unless they are small beside the basis."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        graphs = self.graphs if self.graph_limit is None else self.graph_limit
        if self._basis_bytes * SMALLER > graphs and self.largest_basis != "none":
            lesser = BASES[BASES.index(self.largest_basis) + 1 :]
            self.largest_basis = next(basis for basis in lesser if basis != "host" or self._has_host)
            if self.largest_basis == "host":
                return "the next probe keeps its Lanczos basis in the host's memory"
            kept = "in bfloat16" if self.largest_basis == "half" else "not at all (three vectors)"
            return f"the next probe keeps its Lanczos basis {kept}, and shows the density without eigenvalues"
        if graphs > 1:
            self.graph_limit = int(SMALLER * graphs)
            return f"the next probe's graphs get {self.graph_limit / 2**20:.3g} MiB, and are built in pieces if need be"
        return self._on_shards() if self.gathered else "it had begun with as little as it could"
