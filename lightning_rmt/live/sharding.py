"""FSDP2: the parameters whole on every rank while curvature is measured, sharded again afterwards.

Autograd can't take a second derivative through sharded parameters: `autograd.grad` doesn't find them in the graph, and
`backward(create_graph=True)` gives gradients without a graph. So each rank gathers the whole parameters for the time of
a probe, which costs their full size in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_rmt.krylov.collectives import collective

# What decides whether a group of parameters is sharded again, or its gradients reduced, after a pass.
_FLAGS = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")


def try_room_for_whole(module: nn.Module) -> None:
    """Takes the memory of `unsharded` once and gives it back: a rank without it fails here, before the collective."""
    sharded = {p for part in _sharded_modules(module) for p in part.parameters()}
    for device in {p.device for p in sharded}:
        needed = sum(p.numel() * p.element_size() for p in sharded if p.device == device)
        torch.empty(needed, dtype=torch.uint8, device=device)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather the parameters that `fully_shard` has sharded; inside, `module.parameters()` are plain parameters.

    Forward and backward passes inside neither shard them again nor reduce gradients. On leaving, also through an
    exception, the parameters are sharded again, bitwise as they were, and all settings are back. Does nothing for a
    module without sharded parts.

    All ranks have to enter together: gathering is a collective.

    Args:
        module: the LightningModule, or any module with parts that are sharded, or none.

    Raises:
        LostRankError: gathering failed.
    """
    sharded = _sharded_modules(module)
    with ExitStack() as undo:
        for part in sharded:
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                if group is not None:
                    _keep_whole(state, group, undo)
            undo.callback(part.reshard)
            undo.callback(_idle, state)  # before it: a group that believes to be in a pass ignores `reshard`
            with collective():
                part.unshard()
        yield


def _sharded_modules(module: nn.Module) -> list[Any]:
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule  # half a second of imports that an unsharded run does without

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _keep_whole(state: Any, group: Any, undo: ExitStack) -> None:
    """Switch off what would shard the group again, or reduce gradients that it may still be accumulating.

    That also makes a pass free of collectives, so that a rank on which it fails leaves no other one waiting. The public
    setters can't be read back, hence the attributes that they set.
    """
    for flag in _FLAGS:
        undo.callback(setattr, group, flag, getattr(group, flag))
    group.post_forward_mesh_info = None
    group.reshard_after_backward = False
    group.reduce_grads = False
    group.all_reduce_grads = False


def _idle(state: Any) -> None:
    """Forget a pass that the block began and didn't end, through an exception or because it only ran forward."""
    idle = type(state._training_state).IDLE
    state._training_state = idle
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    getattr(state._comm_ctx, "post_forward_order", []).clear()  # a part that was never run has none yet
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None:
            group._training_state = idle
            group._post_forward_indices.clear()
