"""Runs a function in several processes, as a launcher would start them, and returns what each returned."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
JOIN_SECONDS = 120


def on_two_ranks(function: Callable[..., Any], directory: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on two ranks; see `on_ranks`."""
    return on_ranks(RANKS, function, directory, *arguments)


def on_ranks(
    ranks: int, function: Callable[..., Any], directory: Path, *arguments: Any, fresh: bool = False
) -> list[Any]:
    """`function(*arguments)` on so many ranks; Lightning takes the environment for torchrun's.

    Forked, not spawned: half a second instead of ten, and the function need not be importable. A rank that raises ends
    the other one, and its traceback is raised here. ``fresh`` spawns them, with nothing of what other tests have left.
    """
    context = _start(ranks, function, directory, arguments, "spawn" if fresh else "fork")
    while not context.join(JOIN_SECONDS):
        pass
    return [pickle.loads(_result(directory, rank).read_bytes()) for rank in range(ranks)]


def on_one_survivor(
    survivor: int, function: Callable[..., Any], directory: Path, *arguments: Any, seconds: float
) -> Any:
    """`function(*arguments)` on two ranks, of which only one lives to return; both are ended after so many seconds."""
    context = _start(RANKS, function, directory, arguments)
    end, result = time.monotonic() + seconds, _result(directory, survivor)
    try:
        while time.monotonic() < end and context.processes[survivor].is_alive() and not result.exists():
            time.sleep(0.05)
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return pickle.loads(result.read_bytes())


def _start(
    ranks: int, function: Callable[..., Any], directory: Path, arguments: tuple[Any, ...], method: str = "fork"
) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(ranks):
        _result(directory, rank).unlink(missing_ok=True)
    context = mp.start_processes(
        _child, (ranks, port, directory, function, arguments), nprocs=ranks, join=False, start_method=method
    )
    assert context is not None
    return context


def _result(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.pickle"


def _child(
    rank: int, ranks: int, port: int, directory: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    try:
        result = _result(directory, rank)
        partial = result.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(function(*arguments)))
        partial.rename(result)  # there as a whole, or not at all
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
