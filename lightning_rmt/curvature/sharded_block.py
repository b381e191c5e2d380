"""The parameters of an FSDP2 module as one flat vector, of which every rank holds what its shards hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rmt.curvature.fsdp_passes import parameter_groups, sharded_modules
from lightning_rmt.krylov.shards import GroupShards


class ShardedBlock:
    """What `ParameterBlock` is for whole parameters; entries lie in the same order.

    Args:
        parameters: pairs of names and sharded parameters, cut along dimension 0 over ``group`` and along nothing else.
        module: the module whose parts `fully_shard` was called on.
        group: the ranks; None: all.
        batches: number of this rank's batches, which has to be the same on all ranks, since passes are made together.

    Attributes:
        names: of the parameters.
        size: total number of entries, over all ranks.
        dtype: of vectors: the widest of the parameters'.
        device: of vectors: that of the shards.
        ranks: number of ranks.
        shards: which entries this rank holds.

    Raises:
        ValueError: on every rank: there are no parameters or no batches, ranks differ, or one has a parameter that isn't
            sharded in this way, or that is kept or computed in half precision.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], module: nn.Module, group: dist.ProcessGroup | None, batches: int
    ) -> None:
        named = list({id(p): (name, p) for name, p in parameters}.values())
        if not named:
            raise ValueError("no parameters were given; pass for example module.named_parameters()")
        self.names = tuple(name for name, _ in named)
        self._tensors: list[Any] = [p for _, p in named]
        self._ranks = range(dist.get_world_size(group))
        self.ranks = len(self._ranks)
        self.size = sum(p.numel() for p in self._tensors)
        self.device: torch.device = self._tensors[0].device
        self.dtype: torch.dtype = max((p.dtype for p in self._tensors), key=lambda dtype: torch.finfo(dtype).bits)
        segments = _segments(self._tensors, dist.get_rank(group), self.ranks)
        self._sizes = [stop - start for start, stop in segments]
        self._filled = sum(self._sizes)  # none, where all parameters have fewer rows than there are ranks
        self.shards = GroupShards(segments, max(self._filled, 1), group)
        over = dist.get_process_group_ranks(group or dist.group.WORLD)
        known = {id(p.sharded_param): (g, p) for g in _groups(module) for p in g.fsdp_params}
        objections = (
            _objection(name, p, size, over, known.get(id(p)))
            for name, p, size in zip(self.names, self._tensors, self._sizes, strict=True)
        )
        self._agree(next(filter(None, objections), ""), batches)

    def _agree(self, objection: str, batches: int) -> None:
        counts = [batches, self.size]
        mine = [*counts, *(-count for count in counts), float(bool(objection))]
        *largest, any_objects = self.shards.largest(
            torch.tensor(mine, dtype=torch.float64, device=self.device)
        ).tolist()
        if any_objects:
            raise ValueError(objection or "another rank's parameters can't be taken as shards; its log says why")
        if largest[:2] != [-least for least in largest[2:]]:
            raise ValueError(
                f"ranks have {-largest[2]:g} to {largest[0]:g} batches and {-largest[3]:g} to {largest[1]:g} parameters; "
                "passes are made together, so it takes as many of both on each"
            )
        if batches == 0:
            raise ValueError("no batches were given; curvature needs at least one")

    def point(self) -> Tensor:
        """This rank's part of the parameters."""
        return self._joined([p._local_tensor.detach() for p in self._tensors])

    def gradient(self) -> Tensor:
        """This rank's part of what the shards' ``grad`` hold."""
        return self._joined([None if p.grad is None else p.grad._local_tensor for p in self._tensors])

    def without_gradient(self) -> tuple[str, ...]:
        """Names of the trainable parameters whose ``grad`` is None."""
        return tuple(
            name for name, p in zip(self.names, self._tensors, strict=True) if p.requires_grad and p.grad is None
        )

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        return v[: self._filled].split(self._sizes)

    def _joined(self, tensors: list[Tensor | None] | list[Tensor]) -> Tensor:
        joined = torch.zeros(self.shards.local_size, dtype=self.dtype, device=self.device)
        for part, tensor in zip(self._parts(joined), tensors, strict=True):
            if tensor is not None:
                part.copy_(tensor.reshape(-1))
        return joined

    @contextmanager
    def displaced(self, v: Tensor, length: Tensor) -> Iterator[None]:
        """Moves the trainable shards by ``length * v``, this rank's part, in place; they are put back bitwise.

        In place, since FSDP keeps the memory that it gathers from; through ``.data``, since a live graph that has saved a
        shard must not take offence at its version.
        """
        moved = [
            (p._local_tensor.data, p._local_tensor.detach().clone(), part)
            for p, part in zip(self._tensors, self._parts(v), strict=True)
            if p.requires_grad
        ]
        try:
            for shard, origin, part in moved:
                torch.addcmul(origin, part.view(shard.shape).to(shard), length.to(shard), out=shard)
            yield
        finally:
            for shard, origin, _ in moved:
                shard.copy_(origin)


def _groups(module: nn.Module) -> list[Any]:
    return [group for part in sharded_modules(module) for group in parameter_groups(part._get_fsdp_state())]


def _segments(parameters: list[Any], rank: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """First and last entry (exclusive) of each shard: the rows that `torch.chunk` gives this rank, perhaps none."""
    found, first = [], 0
    for p in parameters:
        rows = p.shape[0] if p.ndim else 1
        share, entries = -(-rows // ranks), p.numel() // max(rows, 1)
        found.append((first + min(rank * share, rows) * entries, first + min((rank + 1) * share, rows) * entries))
        first += p.numel()
    return tuple(found)


def _objection(name: str, parameter: Any, size: int, ranks: list[int], known: tuple[Any, Any] | None) -> str:
    """Why this parameter can't be taken as a shard; empty where it can."""
    if known is None or not hasattr(parameter, "_local_tensor"):
        return f"parameter {name!r} isn't sharded by fully_shard, though differences are to be taken on shards"
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.ndim != 1 or mesh.mesh.tolist() != ranks or not placements[0].is_shard(0):
        return (
            f"parameter {name!r} is placed as {placements} on {mesh}: differences on shards need parameters that are cut "
            "along dimension 0 over the data-parallel ranks, and along nothing else"
        )
    group, fsdp_parameter = known
    computed = (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype)
    if any(torch.finfo(dtype).bits < 32 for dtype in (parameter.dtype, *computed) if dtype is not None):
        return f"parameter {name!r} is kept, computed or reduced in half precision; finite differences need float32"
    local = parameter._local_tensor
    gathered, own = (t.untyped_storage().data_ptr() for t in (fsdp_parameter._sharded_param_data, local))
    if local.numel() != size or (size and gathered != own):  # moving the shard would leave the loss where it is
        return f"FSDP doesn't gather parameter {name!r} from the memory of its shard"
    return ""
