"""FSDP2: the parameters whole on every rank while curvature is measured, sharded again afterwards.

Autograd can't take a second derivative through sharded parameters: `autograd.grad` doesn't find them in the graph, and
`backward(create_graph=True)` gives gradients without a graph. So each rank gathers the whole parameters for the time of
a probe, which costs their full size in memory. Where that doesn't fit, see `on_shards`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_rmt.curvature.fsdp_passes import forget_pass, parameter_groups, sharded_modules
from lightning_rmt.krylov.collectives import collective

# What decides whether a group of parameters is sharded again, or its gradients reduced, after a pass.
_FLAGS = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")


def try_room_for_whole(module: nn.Module) -> None:
    """Takes the memory of `unsharded` once and gives it back: a rank without it fails here, before the collective."""
    sharded = {p for part in sharded_modules(module) for p in part.parameters()}
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
    with ExitStack() as undo:
        for part in sharded_modules(module):
            state = part._get_fsdp_state()
            for group in parameter_groups(state):
                _keep_whole(group, undo)
            undo.callback(part.reshard)
            undo.callback(forget_pass, state)  # before it: a group that believes to be in a pass ignores `reshard`
            with collective():
                part.unshard()
        yield


def _keep_whole(group: Any, undo: ExitStack) -> None:
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
