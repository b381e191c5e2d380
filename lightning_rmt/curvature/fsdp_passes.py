"""Forward and backward passes of a module that `fully_shard` has sharded, which its training never notices.

FSDP2 keeps more than the parameters: what a pass has begun, gradients that wait to be reduced, settings of the user's.
The public setters can't be read back, hence the attributes that they set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

# What a pass needs, whatever training has set: gradients averaged over all ranks, and the parameters sharded after it.
_AVERAGING = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    "gradient_divide_factor": None,
}


# What a pass leaves where it is broken off, in groups of parameters and in what they share.
_OF_GROUPS = ("_all_gather_result", "_post_reduce_event", "_reshard_after_forward_event")
_SHARED = ("all_gather_state", "reduce_scatter_state", "reduce_scatter_states", "_last_post_reduce_events")


def sharded_modules(module: nn.Module) -> list[Any]:
    """The parts of a module that `fully_shard` was called on, the module itself included."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule  # half a second of imports that an unsharded run does without

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def parameter_groups(state: Any) -> list[Any]:
    """The groups of parameters that are gathered together, of the state of one sharded part."""
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def forget_pass(state: Any) -> None:
    """Forget a pass that was begun and not ended, through an exception or because it only ran forward."""
    idle = type(state._training_state).IDLE
    state._training_state = idle
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    getattr(state._comm_ctx, "post_forward_order", []).clear()  # a part that was never run has none yet
    for group in parameter_groups(state):
        group._training_state = idle
        group._post_forward_indices.clear()


@contextmanager
def averaged_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, passes with ``.backward()`` leave the mean gradient over all ranks in the shards' ``grad``, at first None.

    Several passes add up. Afterwards, also after an exception that all ranks meet, the parameters are sharded, every
    ``grad`` is the very object that it was, what waits to be reduced still waits, and FSDP believes that nothing has
    happened. An optimizer that steps in the backward pass doesn't.

    Args:
        module: a module with parts that are sharded. Parameters that aren't are kept out as well.
    """
    with ExitStack() as undo:
        for parameter in module.parameters():
            _set_aside(parameter, undo)
        for part in sharded_modules(module):
            state = part._get_fsdp_state()
            _set(state._state_ctx, "is_last_backward", True, undo)
            _keep_event(state, undo)
            for group in parameter_groups(state):
                for name, value in _AVERAGING.items():
                    if hasattr(group, name):  # not in every version of torch
                        _set(group, name, value, undo)
                for parameter in group.fsdp_params:
                    _set_aside(parameter.sharded_param, undo)
                    _set(parameter, "unsharded_accumulated_grad", None, undo)
                    undo.callback(_restore_whole, parameter, _whole_gradient(parameter))
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None
            undo.callback(part.reshard)
            undo.callback(forget_pass, state)
            undo.callback(_drain, state)
            part.reshard()  # where training leaves it gathered
        yield


def _set(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _set_aside(parameter: Any, undo: ExitStack) -> None:
    """The gradient, and hooks on it: FSDP calls those that follow its accumulation, in which an optimizer may step."""
    for name in ("grad", "_post_accumulate_grad_hooks"):
        _set(parameter, name, None, undo)


def _whole_gradient(parameter: Any) -> Any:
    """The gradient of the whole parameter, which waits to be reduced; None before the first pass."""
    return parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None


def _restore_whole(parameter: Any, gradient: Any) -> None:
    if hasattr(parameter, "_unsharded_param"):
        parameter._unsharded_param.grad = gradient


def _keep_event(state: Any, undo: ExitStack) -> None:
    """Let gathering wait for all that was queued, and not just for the optimizer's event, inside and afterwards."""
    event = getattr(state._state_ctx, "post_optim_event", None)
    if event is not None:
        record: Callable[[], Any] = event.record
        undo.callback(setattr, state._state_ctx, "post_optim_event", event)
        undo.callback(record)
        state._state_ctx.post_optim_event = None


def _drain(state: Any) -> None:
    """Wait for what a pass that was broken off has left on its way, and drop it. After a whole one there is nothing."""
    groups, shared = parameter_groups(state), state._comm_ctx
    left: dict[str, list[Any]] = {  # what holds it; the names differ between versions of torch
        name: [owner for owner in owners if getattr(owner, name, None)]
        for owners, names in ((groups, _OF_GROUPS), ([shared], _SHARED))
        for name in names
    }
    for group in left["_all_gather_result"]:
        if hasattr(group._all_gather_result.all_gather_work, "wait"):
            group._all_gather_result.all_gather_work.wait()
    if any(left.values()):
        state._device_handle.synchronize()
    for name, owners in left.items():
        for owner in owners:
            held = getattr(owner, name)
            setattr(owner, name, type(held)() if isinstance(held, (list, dict)) else None)
