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
    runs eagerly (it has none either: pytorch #91469), and weight normalisation is composed of elementary operations (its
    fused kernel has a second derivative, a wrong one; see `_weight_norm`).
    """
    with ExitStack() as undo:
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            # A stance takes effect when it is made, not when it is entered: make it here and nowhere earlier.
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for owner in (torch, sys.modules["torch.nn.utils.weight_norm"]):
            undo.callback(setattr, owner, "_weight_norm", owner._weight_norm)
            owner._weight_norm = _weight_norm  # type: ignore[attr-defined]
        yield


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What `torch._weight_norm` computes, from operations that can be differentiated twice.

    The fused kernel's double backward takes the norm for a constant: no error, and a Hessian that is wrong by as much as
    itself and not even symmetric (torch 2.13; `torch.autograd.gradgradcheck` fails on it).
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))
