"""The tensors of a module that autograd leaves alone and a training step may not: buffers and parameters."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_rmt.live.fence.enclosure import Enclosure

# Frozen parameters are copied while they are at most this many times as many as the trained ones. A momentum encoder,
# which the step itself moves, is about as large as the network that it follows; the frozen backbone under an adapter,
# which nobody moves and which may fill the memory, is far larger.
_FROZEN_PER_TRAINED = 2

# Whether its training step overwrites a parameter, as last seen; unknown parameters are absent.
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


def _refill(namespace: Any, original: dict[str, Any]) -> None:
    if isinstance(namespace, dict):  # that of a scripted module isn't one; it can't grow either
        namespace.clear()
    for name, buffer in original.items():
        namespace[name] = buffer


def parameters(enclosure: Enclosure, undo: ExitStack) -> None:
    """Keep `grad`, `requires_grad`, the gradient hooks and the values of every parameter.

    Inside, `grad` is None, as before the first step, so that nothing can be accumulated into it; and hooks are off: a
    hook that scales a gradient would scale a Hessian-vector product twice.

    The values need care because some steps write to parameters themselves: momentum encoders (MoCo, BYOL), normalised
    prototypes (SwAV), clipped weights (WGAN). A parameter that is bound to new memory is simply bound back. In-place
    writes need a copy, taken of frozen parameters (see `_FROZEN_PER_TRAINED`), of those known to be overwritten, and of
    all trained ones in their first fence, to find out which these are.
    """
    everything = [p for p in enclosure.parameters() if not is_lazy(p)]
    # A teacher that is hidden in a list may forget to switch `requires_grad` off: no optimizer has it all the same.
    registered = {id(p) for p in enclosure.module.parameters()}
    is_trained = {id(p): p.requires_grad and id(p) in registered for p in everything}
    trained = sum(p.numel() for p in everything if is_trained[id(p)])
    frozen = sum(p.numel() for p in everything if not is_trained[id(p)])
    copy_unknown = {True: True, False: frozen <= _FROZEN_PER_TRAINED * trained}
    for parameter in everything:
        copied = _overwritten.get(parameter, copy_unknown[is_trained[id(parameter)]])
        undo.push(_Kept(parameter, copied, is_trained[id(parameter)], enclosure.module))
        parameter.grad = None
        parameter._backward_hooks = None


class _Kept:
    """One parameter as it was; put back on leaving."""

    def __init__(self, parameter: nn.Parameter, copied: bool, trained: bool, module: nn.Module) -> None:
        self.parameter = parameter
        self.trained = trained
        self.module = module
        self.requires_grad = parameter.requires_grad
        self.grad = parameter.grad
        self.hooks = parameter._backward_hooks
        self.memory = parameter.data
        self.version = parameter._version
        self.version_counter = _unsafe_preserve_version_counter(parameter) if copied else None
        self.values = _local(self.memory).clone() if copied else None

    def __enter__(self) -> None: ...

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        p = self.parameter
        memory = _local(self.memory)
        if _local(p.data).data_ptr() != memory.data_ptr():
            p.data = self.memory
        if self.values is not None and self.version_counter is not None:
            overwritten = _overwritten.get(p) or not torch.equal(memory, self.values)
            if overwritten:
                memory.copy_(self.values)
                # Bitwise what a live graph has saved, which must not take offence at the version.
                self.version_counter.__exit__()
            if overwritten or (error is None and self.trained):
                _overwritten[p] = bool(overwritten)
        elif p._version != self.version:
            _overwritten[p] = True
            self._warn()
        p.requires_grad_(self.requires_grad)
        p.grad = self.grad
        p._backward_hooks = self.hooks

    def _warn(self) -> None:
        name = next((name for name, p in self.module.named_parameters() if p is self.parameter), "?")
        warnings.warn(
            f"The training step wrote to the parameter {name!r} in place while it was run again to measure curvature. "
            "It had not done so before, so no copy was kept: this once, training is disturbed by the measurement. "
            "A loss of its own (loss_fn) that leaves the parameters alone avoids this.",
            stacklevel=2,
        )


def _local(tensor: Tensor) -> Tensor:
    """The shard of this rank where the tensor is a DTensor, else the tensor."""
    return getattr(tensor, "_local_tensor", tensor)
