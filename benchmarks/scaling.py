"""Lanczos on several ranks, measured: seconds a step and memory a rank, with the basis whole on every rank and sharded.

By hand: ``OMP_NUM_THREADS=1 python benchmarks/scaling.py --ranks 2`` (gloo, on this machine's CPU), or under a launcher, on
GPUs if there are any: ``torchrun --nproc-per-node 8 benchmarks/scaling.py --sizes 100000000``. The local product is one pass
over the vector, so what is timed is Lanczos and its collectives; a real product comes on top, and is peers.py's business.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from statistics import median

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scaling_model import GIB, bytes_sent, collectives

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.krylov.lanczos import Basis, basis_bytes, lanczos_lockstep, shards_of, start_vector

KINDS: tuple[tuple[bool, Basis], ...] = ((False, "full"), (True, "full"), (False, "none"), (True, "none"))


class Diagonal(CurvatureOperator):
    """A product that costs one pass over the vector."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(ParameterBlock([torch.zeros(size, device=device, requires_grad=True)]))
        self.samples, self.loss_value, self.used = 1.0, 0.0, (True,)
        self.gradient = torch.zeros(size, device=device)
        self._values = torch.linspace(0, 1, size, device=device)

    def _matmat(self, V: torch.Tensor) -> torch.Tensor:
        return V * self._values


def measure(size: int, steps: int, repeats: int, device: torch.device) -> list[str]:
    """A row for each kind of basis; the kinds take turns."""
    operators = {sharded: RankSum(Diagonal(size, device), sharded=sharded) for sharded in (False, True)}
    seconds: dict[tuple[bool, Basis], list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats + 1):
        for sharded, basis in KINDS if repeat % 2 else KINDS[::-1]:
            operator = operators[sharded]
            start = start_vector(operator, repeat)
            dist.barrier()
            begin = time.perf_counter()
            lanczos_lockstep(operator, [start], steps, bases=[basis])  # its end waits for the device
            if repeat:  # the first round warms up
                seconds[sharded, basis].append(time.perf_counter() - begin)
    ranks = dist.get_world_size()
    rows = []
    for sharded, basis in KINDS:
        local = shards_of(operators[sharded]).local_size
        kept = basis_bytes(basis, size, steps, torch.float32, local)
        calls = collectives(size, ranks, steps, 1) if sharded else [("all_reduce", 4 * size)] * steps
        sent = sum(bytes_sent(name, count, ranks) for name, count in calls)
        each = [1e3 * s / steps for s in seconds[sharded, basis]]
        where = "sharded" if sharded else "whole"
        rows.append(
            f"| {ranks} | {size:.3g} | {where} | {basis} | {kept / GIB:.3g} | {sent / steps / 2**20:.3g} | "
            f"{median(each):.3g} ({min(each):.3g} to {max(each):.3g}) |"
        )
    return rows


def run(rank: int, arguments: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        world = {
            "RANK": str(rank),
            "WORLD_SIZE": str(arguments.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29517",
        }
        os.environ.update(world)
        torch.set_num_threads(1)
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank))) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=5))
    if dist.get_rank() == 0:
        cores = f"{psutil.cpu_count()} cores" if not gpus else torch.cuda.get_device_name(device)
        print(f"{dist.get_backend()}, {cores}, torch {torch.__version__}, {arguments.steps} steps\n")
        print("| ranks | n | vectors | basis kept | basis a rank, GiB | sent a step, MiB | ms a step (range) |")
        print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        rows = measure(size, arguments.steps, arguments.repeats, device)
        if dist.get_rank() == 0:
            print("\n".join(rows), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, where no launcher has")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000, 4_000_000])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), arguments)
    else:
        mp.start_processes(run, (arguments,), nprocs=arguments.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
