"""What can go wrong in a curvature product, in words that say what to do about it."""

from __future__ import annotations

import re

import torch

from lightning_rmt.krylov.collectives import OtherRankFailedError


class CurvatureError(RuntimeError):
    """A curvature product can't be had from this loss; the message says why and what to do."""


class GraphTooLargeError(CurvatureError):
    """The second-order graphs would take more memory than they may.

    Attributes:
        needed: bytes that they are expected to take.
        limit: bytes that they may take.
    """

    def __init__(self, needed: int, limit: int) -> None:
        self.needed = needed
        self.limit = limit
        super().__init__(
            f"the second-order graphs take about {needed / 2**20:.3g} MiB, more than the {limit / 2**20:.3g} MiB that they "
            "may: take smaller batches, fewer of them, or FiniteDifferenceHessian, which keeps no graph"
        )

    def __reduce__(self) -> tuple[type[GraphTooLargeError], tuple[int, int]]:
        return (GraphTooLargeError, (self.needed, self.limit))


class NotAMeanError(CurvatureError):
    """The loss of a batch is not the mean of the losses of its pieces, so its Hessian can't be had from theirs."""


class SecondDerivativeError(CurvatureError):
    """An operation in the loss has no second derivative, so double backward is impossible.

    Attributes:
        operation: name of the operation as PyTorch reports it, for example ``"_embedding_bag_backward"``.
        remedy: what to do.
    """

    def __init__(
        self,
        operation: str,
        remedy: str = "First derivatives are enough for FiniteDifferenceHessian (SpectrumMonitor: the Hessian with "
        'product="auto") and GradientCovariance (curvature="gradient_covariance"); or replace this operation in the loss.',
    ) -> None:
        self.operation = operation
        self.remedy = remedy
        super().__init__(f"PyTorch has no second derivative of `{operation}`. {remedy}")

    def __reduce__(self) -> tuple[type[SecondDerivativeError], tuple[str, str]]:
        return (SecondDerivativeError, (self.operation, self.remedy))  # to cross a process boundary


REENTRANT = (
    "a reentrant activation checkpoint can't be differentiated with torch.autograd.grad: call "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)

# "derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented",
# "the derivative for '_embedding_bag_backward' is not implemented.", and of an operator made by torch.library.custom_op:
# "Trying to backward through my_library.my_backward.default but no autograd formula was registered."
_NO_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?(?P<aten>[\w.]+)'? is not implemented"
    r"|backward through (?P<custom>[\w.:]+?)(?:\.default)? but no autograd formula was registered"
)


def explain(error: BaseException) -> CurvatureError | None:
    """Translates an error of the autograd engine into one that says what to do.

    Args:
        error: what PyTorch raised while a loss was evaluated or differentiated.

    Returns:
        The error to raise from it, or None where the original message is the best there is.
    """
    if isinstance(error, CurvatureError):
        return None
    message = str(error)
    if found := _NO_DERIVATIVE.search(message):
        return SecondDerivativeError(found["aten"] or found["custom"])
    if "support double backward" in message or "donated buffers" in message:
        return SecondDerivativeError(
            "torch.compile",
            "Compiled code can be differentiated only once: evaluate the loss with the uncompiled module, or "
            'under `with torch.compiler.set_stance("force_eager"):`.',
        )
    if "Double backwards is not supported for CuDNN RNN" in message:
        return SecondDerivativeError(
            "_cudnn_rnn_backward",
            "Evaluate the loss under `with torch.backends.cudnn.flags(enabled=False):`, or use "
            "FiniteDifferenceHessian.",
        )
    if "once_differentiable" in message:
        return SecondDerivativeError("an autograd.Function marked @once_differentiable")
    if "use_reentrant=True" in message:
        return CurvatureError(REENTRANT)
    if "Inference tensors cannot be saved for backward" in message:
        return CurvatureError(
            "the batch or the model holds inference tensors, which autograd can't use: clone them outside "
            "torch.inference_mode() before taking curvature"
        )
    if "modified by an inplace operation" in message:
        return CurvatureError(
            "a tensor of the loss's graph was changed in place after it was built: by a training step since the operator "
            "was made (make a new one), or by an in-place operation in the loss"
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this, or what caused it, is memory that could not be had in this process."""
    if isinstance(error, OtherRankFailedError):  # it may well quote one
        return False
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(seen, RuntimeError)
            and ("can't allocate memory" in text or "out of memory" in text or "ALLOC_FAILED" in text)
        ):
            return True
        seen = seen.__cause__
    return False
