"""Gradients of a live training at the moment that its optimizer takes its step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rmt.live.namespaces import MisconfigurationException

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy", "XLAStrategy")


def refuse_sharded_gradients(trainer: Any, who: str) -> None:
    """Lets pass one device, and DDP and its variants, under which every rank holds whole, averaged gradients.

    Raises:
        MisconfigurationException: any strategy that shards gradients.
    """
    kind = type(trainer.strategy).__name__
    if kind in _SHARDING or "DeepSpeed" in kind:
        raise MisconfigurationException(
            f"{who} needs whole gradients, and under {kind} each rank has a part of them: run it under DDP or on one "
            "device; a shorter run of a smaller model says as much"
        )


def refuse_sharded_parameters(module: nn.Module, who: str) -> None:
    """Refuses parameters that the module has sharded itself.

    Raises:
        MisconfigurationException: a parameter is a DTensor; the message names the first.
    """
    sharded = [name for name, parameter in module.named_parameters() if hasattr(parameter, "_local_tensor")]
    if sharded:
        raise MisconfigurationException(
            f"{who} needs whole gradients, and {sharded[0]} is sharded (DTensor): run it under DDP or on one device"
        )


def own_scale(trainer: Any, optimizer: Any) -> float:
    """What takes a gradient scaler's scale off gradients, where the Trainer leaves that to the optimizer; 1 elsewhere."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return 1.0 / float(scaler.get_scale())


def clips(trainer: Any, module: Any) -> bool:
    """Whether gradients are clipped after ``on_before_optimizer_step``: by the Trainer, or in the module's own hook."""
    hook = type(module).configure_gradient_clipping
    own = not hook.__module__.startswith(("pytorch_lightning.", "lightning."))
    return own or bool(trainer.gradient_clip_val)


def gradient_norm(optimizer: Any) -> float:
    """Euclidean norm of the dense gradients of all that an optimizer trains."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = [torch.linalg.vector_norm(g).double() for g in gradients if g.layout is torch.strided]
    return math.hypot(*(float(norm) for norm in norms))


def all_finite(gradients: list[Tensor]) -> bool:
    """Whether no gradient has a NaN or an infinity: one look at the device for all of them."""
    if not gradients:
        return True
    device = gradients[0].device
    return bool(torch.stack([gradient.isfinite().all().to(device) for gradient in gradients]).all())
