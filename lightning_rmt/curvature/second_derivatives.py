"""Whether what autograd gives for the second derivative of a user's own function agrees with differences of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rmt.curvature.difference_checks import difference
from lightning_rmt.curvature.evaluation import Loss, as_batches
from lightning_rmt.curvature.finite_difference import SAME_FUNCTION, FiniteDifferenceHessian
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov.collectives import OtherRankFailedError
from lightning_rmt.krylov.lanczos import start_vector

# Correct losses differ by 1e-5 to 3e-2 where two steps agree with each other. A kink that is crossed makes a difference that
# grows as the step shrinks: the two steps then differ by 3/4 of the mismatch, so it is never 5 times what they differ by.
MISMATCH = 0.15
_CLEAR = 5.0
_SLOPE = 0.03  # the most that g'g may differ from the loss's slope along g, in units of itself

_FAILED, _MISSING, _OPEN, _AGREES = 1, 2, 3, 4  # the smallest of any rank decides


class SecondDerivativeCheck(NamedTuple):
    """A Hessian product against finite differences of gradients, along a random direction.

    Attributes:
        functions: names of the classes of `torch.autograd.Function` in the loss's graph that aren't PyTorch's.
        mismatch: ``|Hv - Dv| / |Dv|``, D the central differences.
        error: how far two steps of the differences differ, in the same units; NaN where one step was enough.
        doubt: why nothing can be said, or not about every function; empty where all was seen.
        missing: whether autograd's second derivative lacks something: a mismatch above 15 % and 5 errors.
    """

    functions: tuple[str, ...]
    mismatch: float
    error: float
    doubt: str
    missing: bool


def check_second_derivatives(
    hessian: Hessian, loss: Loss, batches: Iterable[Any], agree: Callable[[int], int] = int
) -> SecondDerivativeCheck | None:
    """Compares one product of ``hessian`` with finite differences where a function of the user's is in the loss.

    A backward that multiplies the gradient with something saved detached (a fused loss that computes its gradient in the
    forward pass) can be differentiated, but lacks a term then, and no error says so. Where the steps of a difference don't
    agree with each other, as across the kinks of a ReLU, the direction is taken in the last two parameter tensors, above
    which there seldom are any. A function whose gradient isn't that of its value (straight-through) is left alone.

    It takes 3 gradients and one product where they agree, 13 gradients, 8 losses and two products at most; nothing where
    there is no such function. Waits for the device.

    Args:
        hessian: with its graphs.
        loss: that it was made of.
        batches: likewise.
        agree: as for `fitting_hessian`; then all ranks get the same verdict.

    Returns:
        What was found, None without such a function.

    Raises:
        OtherRankFailedError: another rank has failed.

    Example:
        >>> import torch
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.slope = 2 * x.detach()
        ...         return x**2
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return ctx.slope * gradient
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> loss = lambda batch: Square.apply(x).pow(2).sum()    # 12 x^2, of which 8 x^2 is seen
        >>> found = check_second_derivatives(Hessian(loss, [x], [None]), loss, [None])
        >>> found.functions, found.missing, round(found.mismatch, 3)
        (('Square',), True, 0.333)
    """
    if agree(1 if hessian.functions else 2) == 2:
        return None
    comparison = _Comparison(hessian, loss, as_batches(batches))
    seen = comparison.take(comparison.begin, agree)
    for direction in (comparison.everywhere, comparison.in_last_tensors):
        if seen != _OPEN:
            break
        seen = comparison.take(direction, agree)
        for _ in range(2):
            if seen == _OPEN:
                seen = comparison.take(comparison.shorten, agree)
    if seen == _MISSING:
        seen = comparison.take(comparison.follows_loss, agree)
    mismatch = comparison.mismatch
    if seen == _MISSING:  # the worst of all ranks, in thousandths
        mismatch = max(mismatch, (10**6 - agree(10**6 - int(1000 * min(mismatch, 900.0)))) / 1000)
    doubt = comparison.doubt
    if seen == _OPEN:
        doubt = "finite differences don't agree with each other (kinks, such as ReLU's, or rounding)"
    elif seen == _FAILED:
        doubt = doubt or "it failed on another rank"
    comparison.release()
    return SecondDerivativeCheck(hessian.functions, mismatch, comparison.error, doubt, seen == _MISSING)


class _Comparison:
    """One rank's part, in stages that all ranks take together, since collectives in the loss have to meet."""

    def __init__(self, hessian: Hessian, loss: Loss, batches: list[Any]) -> None:
        self._hessian, self._loss, self._batches = hessian, loss, batches
        self._differences: FiniteDifferenceHessian | None = None
        self._exact, self._before, self._v = (torch.empty(0),) * 3
        self.mismatch = self.error = float("nan")
        self.doubt = ""

    def take(self, stage: Callable[[], int], agree: Callable[[int], int]) -> int:
        """What the stage found on the rank where it found most."""
        try:
            found = stage()
        except OtherRankFailedError:
            raise
        except (RuntimeError, ValueError) as error:  # the measurement itself may still work
            found, self.doubt = _FAILED, str(error).strip().split("\n")[0] or type(error).__name__
        return agree(found)

    def begin(self) -> int:
        block = self._hessian.block
        named = zip(block.names, block.tensors, strict=True)
        with self._hessian.replay():  # the same dropout masks
            self._differences = FiniteDifferenceHessian(self._loss, named, self._batches, tolerance=float("inf"))
        if difference(self._hessian.gradient, self._differences.gradient) <= SAME_FUNCTION:
            return _OPEN
        self.doubt = "the loss isn't the same function when it is evaluated again"
        return _FAILED

    def everywhere(self) -> int:
        return self._along(start_vector(self._hessian, 0))

    def in_last_tensors(self) -> int:
        self.doubt = "only along the last parameters, since there are kinks (such as ReLU's) or rounding below them"
        block = self._hessian.block
        used = [
            i for i, (p, u) in enumerate(zip(block.tensors, self._hessian.used, strict=True)) if p.requires_grad and u
        ]
        v = start_vector(self._hessian, 0)
        for i, part in enumerate(block.split(v)):
            if i not in used[-2:]:
                part.zero_()
        return self._along(v / v.norm())

    def _along(self, v: Tensor) -> int:
        assert self._differences is not None
        self._v, self._exact = v, self._hessian.matvec(v)
        self._differences.step = self._differences.first_step
        self._before = self._differences.matvec(v)
        self.mismatch, self.error = difference(self._exact, self._before), float("nan")
        return _AGREES if self.mismatch <= MISMATCH else _OPEN

    def shorten(self) -> int:
        """The same with a step 4 times shorter, whose rounding error is 4 times larger."""
        assert self._differences is not None
        self._differences.step /= 4
        now = self._differences.matvec(self._v)
        self.mismatch, self.error = difference(self._exact, now), difference(self._before, now)
        self._before = now
        if self.mismatch <= MISMATCH:
            return _AGREES
        return _MISSING if self.mismatch > _CLEAR * self.error else _OPEN

    def follows_loss(self) -> int:
        """Whether the gradient is the loss's: differences of a straight-through gradient say nothing about a Hessian."""
        assert self._differences is not None
        gradient = self._differences.gradient
        squared = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        first = self._differences.first_step
        slopes = [self._differences.slope(gradient, first / 4**k) for k in range(4)]
        if self.mismatch <= MISMATCH:  # it was another rank's
            return _AGREES
        if any(abs(slope - squared) <= _SLOPE * squared for slope in slopes):
            return _MISSING
        self.doubt = "the gradient isn't that of the loss's value, as with straight-through functions"
        return _FAILED

    def release(self) -> None:
        if self._differences is not None:
            self._differences.release()
