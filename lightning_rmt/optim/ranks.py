"""Scalars that all ranks must see alike, since what is decided from them must be the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_rmt.krylov.collectives import collective


def mean_over_ranks(numbers: Sequence[float], group: dist.ProcessGroup | None, device: torch.device) -> list[float]:
    """Means over the ranks of a group; NaN on one rank is NaN on all.

    Args:
        numbers: as many on every rank.
        group: None: this process decides alone.
        device: where NCCL reduces; gloo doesn't mind.

    Raises:
        LostRankError: another rank is gone.
    """
    if group is None or not dist.is_initialized():
        return [float(number) for number in numbers]
    nccl = "nccl" in str(dist.get_backend(group))
    totals = torch.tensor(list(numbers), dtype=torch.float64, device=device if nccl else "cpu")
    with collective():
        dist.all_reduce(totals, group=group)
    return [total / dist.get_world_size(group) for total in totals.tolist()]
