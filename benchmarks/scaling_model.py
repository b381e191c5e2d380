"""What a probe on several ranks costs, on paper: collectives, bytes and seconds from counts that the tests assert.

``python benchmarks/scaling_model.py`` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from lightning_rmt.krylov.shards import even_length

#: Gradients per product of a Hessian: measured on four models, benchmarks/RESULTS.md (products alone 2.0 to 2.25).
GRADIENTS_PER_PRODUCT = 2.25
#: And per central difference of gradients.
GRADIENTS_PER_DIFFERENCE = 2.0
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What the seconds are made from; the defaults are eight A100s a node, 80 GB each.

    Attributes:
        flops: that a rank's passes achieve, per second.
        memory_bandwidth: bytes per second of the device's own memory.
        link: bytes per second and rank that collectives move within a node.
        network: the same between nodes.
        latency: seconds of a small collective, times the logarithm of the ranks (base 2).
        ranks_per_node: ranks that share the faster links.
        memory: bytes of a rank.
    """

    flops: float = 120e12
    memory_bandwidth: float = 1.5e12
    link: float = 200e9
    network: float = 20e9
    latency: float = 15e-6
    ranks_per_node: int = 8
    memory: float = 80e9

    def bandwidth(self, ranks: int) -> float:
        """Of a collective over so many ranks, in bytes per second and rank."""
        return self.link if ranks <= self.ranks_per_node else self.network


def collectives(size: int, ranks: int, steps: int, probes: int, itemsize: int = 4) -> list[tuple[str, int]]:
    """Every collective of a sharded Lanczos run in its order, with the bytes of the tensor that it works on.

    One to agree that everyone has its memory, and one more for the exchange of several vectors at a time; then for each
    step the product's all-gather and reduce-scatter, whatever the number of parameters, batches and starts, and for each
    start alpha, the coefficients of one Gram-Schmidt pass (the first start only; imprecise products take two passes), and
    the residual's norm; at the first step also the unit.
    """
    whole = itemsize * probes * ranks * even_length(size, ranks)
    found = [("all_reduce", 8)] * (2 if probes > 1 else 1)
    for step in range(1, steps + 1):
        found += [("all_gather", whole), ("reduce_scatter", whole)]
        for probe in range(probes):
            unit = [("all_reduce", itemsize)] if step == 1 else []
            coefficients = [("all_reduce", 8 * step)] if probe == 0 else []
            found += [*unit, ("all_reduce", 8), *coefficients, ("all_reduce", 8)]
    return found


def bytes_sent(collective: str, size: int, ranks: int) -> float:
    """What a rank sends for a ring collective on a tensor of so many bytes."""
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks * size


@dataclass(frozen=True)
class Cost:
    """Of one full probe, per rank.

    Attributes:
        basis: bytes of the Lanczos basis.
        vectors: bytes of the other vectors of Lanczos and of the product.
        parameters: bytes of parameters that the probe holds beyond what training holds.
        sent: bytes that go out.
        products_seconds: passes through the model.
        wire_seconds: bytes over bandwidth, and latencies.
        lanczos_seconds: passes over the basis.
    """

    basis: float
    vectors: float
    parameters: float
    sent: float
    products_seconds: float
    wire_seconds: float
    lanczos_seconds: float

    @property
    def memory(self) -> float:
        """Bytes in all, besides graphs (which are those of one double backward pass on the curvature batch)."""
        return self.basis + self.vectors + self.parameters

    @property
    def seconds(self) -> float:
        """Of the whole probe; nothing overlaps."""
        return self.products_seconds + self.wire_seconds + self.lanczos_seconds


def probe_cost(
    size: int,
    ranks: int,
    *,
    steps: int = 100,
    tokens: int = 2048,
    sharded_parameters: bool = False,
    whole: bool = True,
    basis: bool = True,
    machine: Machine | None = None,
    itemsize: int = 4,
) -> Cost:
    """One start vector, with the basis sharded over the ranks.

    Args:
        size: parameters n.
        ranks: W.
        steps: Lanczos steps m.
        tokens: samples (tokens) in a rank's curvature batches; a gradient takes 6 n flops for each.
        sharded_parameters: FSDP2 in training; a probe that holds them whole gathers them first.
        whole: products with whole parameters (double backward). False: differences of gradients on the shards.
        basis: keep it; else three vectors.
        machine: what it runs on.
        itemsize: bytes of an entry.
    """
    machine = machine or Machine()
    part = itemsize * even_length(size, ranks)
    everything = itemsize * size
    calls = collectives(size, ranks, steps, 1, itemsize)
    small = [call for call in calls if call[0] == "all_reduce"]
    if whole:
        sent = sum(bytes_sent(*call, ranks) for call in calls)
        vectors, parameters = 3 * everything + 3 * part, everything if sharded_parameters else 0.0
        gradients, messages = GRADIENTS_PER_PRODUCT, len(calls)
    else:  # each difference is two gradients under FSDP: parameters gathered for either pass, gradients scattered
        passes = 2 * steps * [("all_gather", everything), ("all_gather", everything), ("reduce_scatter", everything)]
        sent = sum(bytes_sent(*call, ranks) for call in [*small, *passes])
        vectors, parameters = 5.0 * part, part  # the copy that the shards are restored from
        gradients, messages = GRADIENTS_PER_DIFFERENCE, len(small) + len(passes)
    kept = steps * part if basis else 0.0
    hops = max(ranks - 1, 1).bit_length()
    return Cost(
        basis=kept,
        vectors=vectors,
        parameters=parameters,
        sent=sent,
        products_seconds=steps * gradients * 6 * size * tokens / machine.flops,
        wire_seconds=sent / machine.bandwidth(ranks) + messages * hops * machine.latency,
        lanczos_seconds=((steps**2 if basis else 0) + 8 * steps) * part / machine.memory_bandwidth,
    )


def table() -> str:
    """Memory, bytes and seconds for three sizes on three numbers of ranks, in Markdown."""
    lines = [
        "| parameters | ranks | products | basis, GiB | memory, GiB | sent, GiB | passes, s | wire, s | basis, s | all, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, ranks in product((10**8, 10**9, 10**10), (8, 64, 512)):
        for whole in (True, False):
            cost = probe_cost(size, ranks, sharded_parameters=size >= 10**9, whole=whole)
            fits = cost.memory <= 0.5 * Machine().memory
            cells = [f"{size:.0e}".replace("e+", "e"), ranks, "exact, whole" if whole else "differences, on shards"]
            cells += [f"{value / GIB:.3g}" for value in (cost.basis, cost.memory, cost.sent)]
            cells += [f"{value:.2g}" for value in (cost.products_seconds, cost.wire_seconds, cost.lanczos_seconds)]
            cells.append(f"{cost.seconds:.2g}" if fits else f"{cost.seconds:.2g} (over half of 80 GB)")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
