"""Evaluating a loss so that it can be differentiated twice, and reading what it returned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_rmt.curvature.batches import sample_count
from lightning_rmt.curvature.errors import explain

# loss(batch) -> the mean over the batch, or (mean, weight) where the sample count is not the right weight
Loss: TypeAlias = Callable[[Any], "Tensor | tuple[Tensor, Any]"]


class Evaluation(NamedTuple):
    """A loss at one batch: the scalar with its graph, and the batch's weight in the mean over batches."""

    loss: Tensor
    weight: float


@contextmanager
def differentiable() -> Iterator[None]:
    """Modes that a loss needs to be differentiable twice, in its forward pass and in a checkpoint's recomputation.

    Gradients on, inference mode off, attention under the math backend (the fused kernels have no second derivative:
    pytorch #116350) and compiled code run eagerly (compiled code has none either: pytorch #91469). Errors of autograd
    leave translated by `explain`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is imported, which takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            explained = explain(error)
            if explained is None:
                raise
            raise explained from error


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
        TypeError: one batch was given in place of an iterable of batches.
        ValueError: there are none.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"batches must be an iterable of batches, got one {type(batches).__name__}; write [batch]"
        )
    listed = list(batches)
    if not listed:
        raise ValueError("no batches were given; curvature needs at least one (a generator is used up once)")
    return listed


def evaluate(loss: Loss, batch: Any, index: int) -> Evaluation:
    """Calls ``loss(batch)`` and checks that a scalar with a graph came back. Call it inside `differentiable`.

    Args:
        loss: returns the mean over the batch, or ``(mean, weight)``.
        batch: handed to the loss as it is.
        index: position of the batch, for messages.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: it is not a scalar, or no parameter is in its graph, or the weight is not positive.
    """
    torch.clear_autocast_cache()  # casts of the weights that an enclosing autocast region keeps may be stale
    return _read(loss(batch), batch, index)


def _read(result: Any, batch: Any, index: int) -> Evaluation:
    value, weight = (
        result if isinstance(result, tuple) and len(result) == 2 else (result, sample_count(batch))
    )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss(batch) must return a tensor or (tensor, weight), got {type(value).__name__} in batch {index}"
        )
    if value.numel() != 1:
        raise ValueError(
            f"loss(batch) must return a scalar, got shape {tuple(value.shape)} in batch {index}; "
            "take the mean over the batch"
        )
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no graph: no parameter with requires_grad=True is in it, or it was computed "
            "under no_grad, detached, or turned into a number"
        )
    weight = float(weight)
    if not 0.0 < weight < float("inf"):
        raise ValueError(f"batch {index} has weight {weight}; it must be positive and finite")
    return Evaluation(value.reshape(()), weight)


def require_finite(losses: list[Tensor]) -> list[float]:
    """The losses as floats, moved to the host together.

    Raises:
        ValueError: one is NaN or infinite; the message says which batch.
    """
    values = torch.stack([loss.detach().double().to(losses[0].device) for loss in losses]).tolist()
    for index, value in enumerate(values):
        if not abs(value) < float("inf"):
            raise ValueError(f"the loss of batch {index} is {value}; its curvature means nothing")
    return [float(value) for value in values]
