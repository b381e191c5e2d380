"""The modes in which a step is differentiated: gradients on, kernels with a second derivative, the precision."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from torch import nn

from lightning_rmt.curvature.kernels import twice_differentiable_kernels
from lightning_rmt.live.fence.enclosure import Enclosure


def gradient_mode(enclosure: Enclosure, undo: ExitStack) -> None:
    """Record gradients, also when called from within `no_grad` or `inference_mode`."""
    undo.enter_context(torch.inference_mode(False))
    undo.enter_context(torch.enable_grad())


def training_flags(enclosure: Enclosure, undo: ExitStack) -> None:
    """Put every submodule back into the mode, training or evaluation, that it was in.

    Written to `training` directly: `module.train()` recurses, and users override it.
    """
    undo.callback(_restore_training, [(module, module.training) for module in enclosure.modules])


def _restore_training(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        if module.training is not training:
            module.training = training


def twice_differentiable(enclosure: Enclosure, undo: ExitStack) -> None:
    """Choose implementations whose backward pass can itself be differentiated.

    See `twice_differentiable_kernels`; further, cuDNN's recurrent kernels and sparse gradients can't. And an embedding
    with `max_norm` rescales rows of its weight in the forward pass: inside, its rows are taken as they are.

    For first derivatives the kernels stay the module's own.
    """
    if enclosure.first_order:
        if "torch._dynamo" in sys.modules:
            # What the fence puts in the way of a compiled step may fail its guards; then it runs eagerly, since
            # another graph would count against the limit of training's own.
            undo.enter_context(torch.compiler.set_stance("eager_on_recompile"))
    else:
        undo.enter_context(twice_differentiable_kernels())
        if enclosure.device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in enclosure.modules):
            undo.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
    for module in enclosure.modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            undo.callback(setattr, module, "sparse", module.sparse)
            undo.callback(setattr, module, "max_norm", module.max_norm)
            module.sparse = False
            module.max_norm = None


def precision(enclosure: Enclosure, undo: ExitStack) -> None:
    """Compute as the Trainer's precision plugin does, with its autocast switched off unless asked for.

    The plugin's context is entered either way: under "bf16-true" it sets the default dtype, without which a tensor that
    the step creates would not fit the parameters.
    """
    plugin = getattr(enclosure.trainer, "precision_plugin", None)
    if plugin is not None:
        undo.enter_context(plugin.train_step_context())
    if not enclosure.autocast:
        undo.enter_context(torch.autocast(enclosure.device.type, enabled=False))
