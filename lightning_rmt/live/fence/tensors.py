"""The tensors of a module that autograd leaves alone and a training step may not: buffers and parameters."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_rmt.live.fence.enclosure import Enclosure

# Frozen parameters are copied while they are at most this many times as many as the trained ones. A momentum encoder,
# which the step itself moves, is about as large as the network that it follows; the frozen backbone under an adapter,
# which nobody moves and which may fill the memory, is far larger.
_FROZEN_PER_TRAINED = 2

# For a trained parameter, whether its training step overwrote it when last compared; unknown ones are absent.
_overwritten: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def buffers(enclosure: Enclosure, undo: ExitStack) -> None:
    """Let the step write to copies, and put the original tensor objects back.

    Not by copying values back: that would count as an in-place change, on which the backward pass of a live graph fails,
    and DDP holds on to the objects.
    """
    for module in enclosure.modules:
        undo.callback(_refill, module._buffers, dict(module._buffers))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = enclosure.copy_of(buffer)


def _refill(namespace: dict[str, Any], original: dict[str, Any]) -> None:
    namespace.clear()
    namespace.update(original)


def parameters(enclosure: Enclosure, undo: ExitStack) -> None:
    """Keep `grad`, `requires_grad`, the gradient hooks and the values of every parameter.

    Inside, `grad` is None, as before the first step, so that nothing can be accumulated into it; and hooks are off: a
    hook that scales a gradient would scale a Hessian-vector product twice.

    The values need care because some steps write to parameters themselves: momentum encoders (MoCo, BYOL), normalised
    prototypes (SwAV), clipped weights (WGAN). A parameter that is bound to new memory is simply bound back. In-place
    writes need a copy, taken of frozen parameters (see `_FROZEN_PER_TRAINED`), of those known to be overwritten, and in
    the first fence of all, to find out which these are.
    """
    everything = [p for p in enclosure.parameters() if not is_lazy(p)]
    trained = sum(p.numel() for p in everything if p.requires_grad)
    frozen = sum(p.numel() for p in everything if not p.requires_grad)
    copy_frozen = frozen <= _FROZEN_PER_TRAINED * trained
    for parameter in everything:
        copied = _overwritten.get(parameter, True) if parameter.requires_grad else copy_frozen
        undo.callback(_Kept.of(parameter, copied).restore, enclosure.module)
        parameter.grad = None
        parameter._backward_hooks = None


@dataclass(frozen=True)
class _Kept:
    """One parameter as it was."""

    parameter: nn.Parameter
    requires_grad: bool
    grad: Tensor | None
    hooks: Any
    memory: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, p: nn.Parameter, copied: bool) -> _Kept:
        memory = p.data
        values = _local(memory).clone() if copied else None
        return cls(p, p.requires_grad, p.grad, p._backward_hooks, memory, p._version, values)

    def restore(self, module: nn.Module) -> None:
        p = self.parameter
        p.requires_grad_(self.requires_grad)
        p.grad = self.grad
        p._backward_hooks = self.hooks
        memory = _local(self.memory)
        if _local(p.data).data_ptr() != memory.data_ptr():
            p.data = self.memory
        if self.values is not None:
            changed = _overwritten.get(p) or not torch.equal(memory, self.values)
            if changed:
                memory.copy_(self.values)  # through `.data`, which has a version counter of its own
            if self.requires_grad:
                _overwritten[p] = bool(changed)
        elif p._version != self.version:
            _overwritten[p] = True
            self._warn(module)

    def _warn(self, module: nn.Module) -> None:
        name = next((name for name, p in module.named_parameters() if p is self.parameter), "?")
        warnings.warn(
            f"The training step wrote to the parameter {name!r} in place while it was run again to measure curvature. "
            "It had not done so before, so no copy was kept: this once, training is disturbed by the measurement. "
            "A loss of its own (loss_fn) that leaves the parameters alone avoids this.",
            stacklevel=2,
        )


def _local(tensor: Tensor) -> Tensor:
    """The shard of this rank where the tensor is a DTensor, else the tensor."""
    return getattr(tensor, "_local_tensor", tensor)
