"""Runs a function in several processes, as a launcher would start them, and returns what each returned."""

from __future__ import annotations

import os
import pickle
import socket
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


def on_ranks(ranks: int, function: Callable[..., Any], directory: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on so many ranks; Lightning takes the environment for torchrun's.

    Forked, not spawned: half a second instead of ten, and the function need not be importable. A rank that raises ends
    the other one, and its traceback is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.start_processes(
        _child, (ranks, port, directory, function, arguments), nprocs=ranks, join=False, start_method="fork"
    )
    assert context is not None
    while not context.join(JOIN_SECONDS):
        pass
    return [pickle.loads(_result(directory, rank).read_bytes()) for rank in range(ranks)]


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
        _result(directory, rank).write_bytes(pickle.dumps(function(*arguments)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
