"""The Hessian in the memory that there is: graphs kept, built anew in every product, or built in pieces of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_rmt.curvature.batches import micro_batches, sample_count
from lightning_rmt.curvature.errors import (
    GraphTooLargeError,
    NotAMeanError,
    is_out_of_memory,
)
from lightning_rmt.curvature.evaluation import Loss, Mean, as_batches, differentiable, differentiate, evaluate
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters
from lightning_rmt.krylov.collectives import OtherRankFailedError, clear_frames
from lightning_rmt.krylov.lanczos import rounding_noise

#: How to build an operator with so many samples of a batch at a time, and words for that.
Attempt: TypeAlias = tuple[Callable[[int], Hessian], int, str]


def fitting_hessian(
    loss: Loss,
    parameters: Parameters,
    batches: Iterable[Any],
    memory_limit: int | None = None,
    resident: Iterable[Tensor] = (),
    agree: Callable[[int], int] = int,
) -> tuple[Hessian, str]:
    """The fastest form of the Hessian whose graphs fit.

    In this order: all graphs kept (a product takes about two gradients); with several batches, one batch's graph at a time,
    built anew in every product (about four); the batches cut in halves, quarters and so on, one piece's graph at a time; and
    where a loss can't be cut (see `hessian_in_pieces`), the first half, quarter and so on of every batch's samples only.
    What an attempt held is gone before the next one begins.

    Args:
        loss: as for `Hessian`.
        parameters: as for `Hessian`.
        batches: as for `Hessian`.
        memory_limit: bytes that graphs may take at a time. None: whatever the device gives.
        resident: as for `Hessian`.
        agree: where several ranks build theirs, gives the smallest number of any rank: they take every attempt together, so
            that collectives in the loss meet. All numbers are positive.

    Returns:
        The operator, and words on what was done to make it fit; empty where nothing had to be.

    Raises:
        GraphTooLargeError: not even one sample's graph fits.
        OtherRankFailedError: it failed on another rank.
        Exception: as `Hessian`; an out-of-memory where nothing smaller is left to try.
    """
    block, listed = ParameterBlock(parameters), as_batches(batches)
    named = list(zip(block.names, block.tensors, strict=True))
    limits: dict[str, Any] = {"memory_limit": memory_limit, "resident": list(resident)}
    # Agreed, since ladders of different lengths would leave a rank waiting: batches may be uneven over the ranks.
    largest, batch_count = agree(max(1, *map(sample_count, listed))), agree(len(listed))

    def whole(samples: int) -> Hessian:
        return Hessian(loss, named, listed, **limits)

    def first_samples(samples: int) -> Hessian:
        chosen = [micro_batches(batch, samples)[0] for batch in listed]
        return Hessian(loss, named, chosen, **limits)

    def batch_by_batch(samples: int) -> Hessian:
        return Hessian(loss, named, listed, keep_graphs=False, **limits)

    def in_pieces(samples: int) -> Hessian:
        return hessian_in_pieces(loss, named, listed, samples, **limits)

    halves = list(_halves(largest))
    anew = "graph at a time, built anew in every product"
    attempts: list[Attempt] = [(whole, largest, "")]
    if batch_count > 1:
        attempts.append((batch_by_batch, largest, f"one batch's {anew}"))
    attempts += [(in_pieces, n, f"pieces of {n} of {largest} samples, one piece's {anew}") for n in halves]
    fewer: list[Attempt] = [(first_samples, n, f"the first {n} of {largest} samples only") for n in halves]

    queue, reason = attempts, ""
    first: Exception | None = None
    error: Exception | None = None
    try:
        while True:
            attempt, samples, words = queue.pop(0)
            found, error = None, None
            try:
                found = attempt(samples)
            except Exception as caught:
                error = caught
            agreed = agree(_verdict(error, samples == largest))
            if agreed == FITS and found is not None:
                return found, f"{words}, because {reason}" if words else ""
            if found is not None:
                found.release()
            if agreed == CANNOT_BE_CUT and queue is not fewer:
                queue, reason = fewer, f"{reason} and the batches can't be cut"
            if agreed == FAILED or not queue:
                if error is None:
                    raise OtherRankFailedError("another rank could not build its curvature operator; its log says why")
                if first is None or _verdict(error, True) == TOO_LARGE:
                    raise error
                raise first from error
            if error is not None:
                clear_frames(error)  # they hold the graph that didn't fit
                first = first or error
            reason = reason or _reason(error)
    finally:
        first = error = None  # or their tracebacks' frames would hold them, and with them the batches


def _reason(error: Exception | None) -> str:
    if error is None:
        return "memory is short on another rank"
    too_large = isinstance(error, GraphTooLargeError)
    return str(error).split(":")[0] if too_large else "memory ran out while graphs were built"


#: How an attempt went, the worse the lower.
FAILED, CANNOT_BE_CUT, TOO_LARGE, FITS = range(1, 5)


def _verdict(error: Exception | None, whole: bool) -> int:
    if error is None:
        return FITS
    if isinstance(error, GraphTooLargeError) or is_out_of_memory(error):
        return TOO_LARGE
    return FAILED if whole else CANNOT_BE_CUT  # whole batches work in training: it is the pieces that don't


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number = -(-number // 2)
        yield number


def hessian_in_pieces(
    loss: Loss,
    parameters: Parameters,
    batches: Iterable[Any],
    samples: int,
    *,
    memory_limit: int | None = None,
    resident: Iterable[Tensor] = (),
) -> Hessian:
    """The Hessian of whole batches from products with pieces of them, one piece's graph at a time.

    The same matrix as long as a batch's loss is the mean over its samples (or the loss returns weights). Batch normalisation
    in training mode, dropout, contrastive losses and means over valid tokens aren't: loss and gradient of the whole batches,
    which need one derivative only, are compared with the pieces' own.

    Args:
        loss: as for `Hessian`.
        parameters: as for `Hessian`.
        batches: as for `Hessian`.
        samples: in a piece.
        memory_limit: bytes that a piece's graph may take.
        resident: as for `Hessian`.

    Raises:
        NotAMeanError: the pieces' loss or gradient is another one than the whole's.
        GraphTooLargeError: a piece's graph is larger than ``memory_limit``.
    """
    block, listed = ParameterBlock(parameters), as_batches(batches)
    pieces = [piece for batch in listed for piece in micro_batches(batch, samples)]
    whole, _ = _first_order(loss, block, listed)
    parts, spread = _first_order(loss, block, pieces)
    noise = max(rounding_noise(p.dtype) for p in block.tensors)
    tolerance = min(max(100 * noise, 1e-6), 0.05)
    size = max(abs(whole.loss()), torch.finfo(torch.float32).tiny)
    differ = {
        "loss": abs(parts.loss() - whole.loss()) / size,
        "gradient": float((parts.gradient - whole.gradient).norm()) / max(spread, torch.finfo(torch.float32).tiny),
    }
    if not max(differ.values()) <= tolerance:  # NaN differs
        raise NotAMeanError(
            f"in pieces of {samples} samples the loss is another one (off by {differ['loss']:.1e}, its gradient by "
            f"{differ['gradient']:.1e}): it isn't a mean over samples (batch normalisation in training mode, dropout, a "
            "contrastive loss, a mean over valid tokens). Return (loss, weight) from the loss, or take finite differences, "
            "which keep no second-order graph"
        )
    named = list(zip(block.names, block.tensors, strict=True))
    return Hessian(loss, named, pieces, keep_graphs=False, memory_limit=memory_limit, resident=resident)


def _first_order(loss: Loss, block: ParameterBlock, batches: list[Any]) -> tuple[Mean, float]:
    """Loss and gradient, and the mean length of the batches' gradients: what a difference is to be compared with."""
    mean, lengths = Mean(block), []
    with differentiable():
        for index, batch in enumerate(batches):
            evaluation = evaluate(loss, (batch,), index)
            lengths.append(float(mean.add(evaluation, differentiate(evaluation.loss, block, index)).norm()))
            del evaluation
    return mean, sum(f * length for f, length in zip(mean.fractions, lengths, strict=True))
