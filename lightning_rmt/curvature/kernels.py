"""Implementations whose backward pass can itself be differentiated, and rightly so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def twice_differentiable_kernels() -> Iterator[None]:
    """Keeps to kernels with a second derivative while a loss is computed.

    Attention runs under the math backend (the fused kernels have no second derivative: pytorch #116350), compiled code
    runs eagerly (it has none either: pytorch #91469), and two normalisations are composed of elementary operations: weight
    normalisation, whose fused kernel has a second derivative that is wrong (see `_weight_norm`), and batch normalisation,
    whose fused one is slow (see `_batch_norm`).
    """
    with ExitStack() as undo:
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            # A stance takes effect when it is made, not when it is entered: make it here and nowhere earlier.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for owner in (torch, sys.modules["torch.nn.utils.weight_norm"]):
            undo.callback(setattr, owner, "_weight_norm", owner._weight_norm)
            owner._weight_norm = _weight_norm  # type: ignore[attr-defined]
        if torch.batch_norm is _FUSED_BATCH_NORM:  # else somebody has put another function there, and it is to be run
            undo.callback(setattr, torch, "batch_norm", torch.batch_norm)
            torch.batch_norm = _batch_norm
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What `torch._weight_norm` computes, from operations that can be differentiated twice.

    The fused kernel's double backward takes the norm for a constant: no error, and a Hessian that is wrong by as much as
    itself and not even symmetric (torch 2.13; `torch.autograd.gradgradcheck` fails on it).
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


_FUSED_BATCH_NORM = torch.batch_norm


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """What `torch.batch_norm` computes, from operations whose second derivatives are cheap; same arguments.

    A curvature product of a ResNet-20 takes 2.25 gradients with it and 2.45 with the fused kernel, 2.30 and 2.64 with the
    statistics of the batch (one CPU thread). With those it also has the right third derivative, which the fused one has
    not. Half and mixed precision stay with the fused kernel, which accumulates in float32.
    """
    x = input
    tensors = [t for t in (x, weight, bias, running_mean, running_var) if t is not None]
    single = all(t.dtype == x.dtype for t in tensors) and x.dtype in (torch.float32, torch.float64)
    if not single or x.ndim < 2 or not (training or running_mean is not None):
        return _FUSED_BATCH_NORM(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    per_channel = [1, -1] + [1] * (x.ndim - 2)
    if training:
        others = [0, *range(2, x.ndim)]
        mean = x.mean(others, keepdim=True)
        x = x - mean
        variance = (x * x).mean(others, keepdim=True)
        _follow(running_mean, mean, momentum)
        count = x.numel() // x.shape[1]
        _follow(running_var, variance * (count / max(count - 1, 1)), momentum)
    else:
        assert running_var is not None
        variance = running_var.view(per_channel)
    factor = torch.rsqrt(variance + eps)
    if weight is not None:
        factor = factor * weight.view(per_channel)
    if not training:
        assert running_mean is not None
        shift = -running_mean.view(per_channel) * factor
        return x * factor + (shift if bias is None else shift + bias.view(per_channel))
    return x * factor if bias is None else x * factor + bias.view(per_channel)


def _follow(running: Tensor | None, statistic: Tensor, momentum: float) -> None:
    """Moves a running statistic towards the batch's, as the fused kernel does."""
    if running is not None:
        with torch.no_grad():
            running.lerp_(statistic.detach().view(-1), momentum)
