"""The Hessian by differences of gradients: one derivative, no second-order graph, and an error that is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rmt.curvature.difference_checks import (
    COARSE,
    TOLERANCE,
    FiniteDifferenceCheck,
    MeasuredError,
    difference,
    kinks,
    measure_errors,
    self_checks,
)
from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.evaluation import Loss, Mean, as_batches, differentiable, differentiate, evaluate
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters
from lightning_rmt.curvature.randomness import RandomState

Scheme = Literal["central", "forward"]

# Gradients of one function in two implementations (fused or composed attention, compiled or eager) agree to 1e-5 in
# float32. Other dropout masks, which fused and compiled code may draw, change them by 0.1 and more.
SAME_FUNCTION = 0.01
_ANOTHER_FUNCTION = "kernels with a second derivative compute another function (other dropout masks, say)"

# Largest error of 60 products of a Lanczos run over lambda_max and over the error that was measured on its first
# vectors: 0.3 to 1.0 for six networks, 9 for an untrained LSTM, whose Ritz values were off by 1.4 of the error.
_MARGIN = 2.0


class FiniteDifferenceHessian(CurvatureOperator):
    """Hessian of the weighted mean of ``loss`` over ``batches``, by finite differences of its gradient.

    ``"central"``: ``Hv = |v| (g(theta + h v/|v|) - g(theta - h v/|v|)) / (2 h)``, two gradients for a product;
    ``"forward"``: ``Hv = |v| (g(theta + h v/|v|) - g(theta)) / h``, one gradient, with some two digits fewer.

    One derivative is needed, so this does what double backward can't: ``EmbeddingBag``, fused attention,
    compiled code, an ``autograd.Function`` without a second derivative. The loss runs with its own kernels. The
    parameters' data are swapped, not written: the original tensors come back untouched, after an exception
    too. Every evaluation starts from the same state of the random number generators.

    A difference across a kink measures the kink. Networks with ReLU or max-pooling give errors of 100% and
    more at steps where a smooth network has three or four correct digits. So the constructor refuses activations
    and pooling that it sees in the loss's graph to have kinks, tests the loss, and refuses what fails: central
    differences by `FiniteDifferenceCheck` (22 gradients), forward ones by `MeasuredError`, against two products of
    double backward, whose graph is then dropped (13 gradients, all in). Where double backward can't be had or
    disagrees, central differences that pass their own check take its place. Smooth networks that have memorised
    their data may fail too, where no step serves both ends of the spectrum.

    Args:
        loss: as for `Hessian`; evaluated once or twice per batch and product.
        parameters: as for `Hessian`, in float32 or float64.
        batches: as for `Hessian`.
        step: length h of the displacement. None: the best that the check finds, near
            ``eps^(1/3) (1 + |theta|)`` (eps is the machine epsilon) for central and ``eps^(1/2) (1 + |theta|) / 4``
            for forward differences; without a check that length.
        scheme: ``"central"`` or ``"forward"``.
        tolerance: the largest error that passes; infinity to take what comes, without a test.
        memory_limit: bytes that the graphs of double backward may take while errors are measured; None: no limit.

    Attributes:
        step: the step h in use.
        checked: the check of central differences that the constructor made, if it did.
        measured: the errors that the constructor measured; None for central differences or an infinite
            tolerance.
        doubts: why forward differences weren't measured against double backward; empty where they were.
        product_error: relative error of a product: what was found, or 0.02 where nothing was tested.
        noise: the same, twice that for forward differences, whose later products in a Lanczos run err more.

    Raises:
        TypeError: the loss is not a tensor, or the parameters aren't.
        ValueError: no batches or parameters, a loss that is not a finite scalar that depends on them, a step
            that is not positive, an unknown scheme, or parameters in half precision, whose rounding errors exceed
            the differences.
        CurvatureError: the check failed; from a product of forward differences, the parameters have changed.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> H = FiniteDifferenceHessian(lambda batch: 0.5 * x @ A @ x, [x], [None])
        >>> torch.allclose(H.matmat(torch.eye(2, dtype=torch.float64)), A)
        True
    """

    exact = False
    _twice = False

    def __init__(
        self,
        loss: Loss,
        parameters: Parameters,
        batches: Iterable[Any],
        step: float | None = None,
        *,
        scheme: Scheme = "central",
        tolerance: float = TOLERANCE,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(ParameterBlock(parameters))
        for name, p in zip(self.block.names, self.block.tensors, strict=True):
            if p.requires_grad and torch.finfo(p.dtype).bits < 32:
                raise ValueError(
                    f"parameter {name!r} is {p.dtype}; finite differences need float32 or float64 parameters"
                )
        if step is not None and not 0.0 < step < float("inf"):
            raise ValueError(f"the step must be positive and finite, got {step}")
        if scheme not in ("central", "forward"):
            raise ValueError(f"scheme must be 'central' or 'forward', got {scheme!r}")
        self.scheme = scheme
        self._memory_limit = memory_limit
        self._loss: Loss | None = loss
        self._batches = as_batches(batches)
        self._random = RandomState(p.device for p in self.block.tensors)
        self._trainable = [i for i, p in enumerate(self.block.tensors) if p.requires_grad]
        self._displacements: list[Tensor] = []
        with differentiable(twice=False), self._random.replay():
            mean = Mean(self.block)
            for index, batch in enumerate(self._batches):
                evaluation = evaluate(loss, (batch,), index)
                if tolerance < float("inf") and (found := kinks(evaluation.loss)):
                    raise CurvatureError(
                        _refused(f"the loss has kinks ({', '.join(found)}). Use Hessian (double backward)")
                    )
                mean.add(evaluation, differentiate(evaluation.loss, self.block, index))
            self._describe(mean)
        self._weights = mean.weights
        # The sum, not the mean: what is subtracted must have been rounded like what it is subtracted from.
        self._origin = mean.weighted_gradient
        self._versions = self._current_versions()

        point = self.block.flatten([p.detach() if p.requires_grad else None for p in self.block.tensors])
        self._scale = 1.0 + float(point.double().norm())
        del point
        self.step = self._first_step(scheme) if step is None else step
        self.checked: FiniteDifferenceCheck | None = None
        self.measured: MeasuredError | None = None
        self.doubts = ""
        self.product_error = TOLERANCE
        if tolerance < float("inf"):
            if scheme == "central":
                self.checked = self._check_central(step, tolerance)
                self.step, self.product_error = self.checked.step, self.checked.error
            else:
                self.measured = self._measure_forward(step, tolerance)
                self.step, self.product_error = self.measured.step, self.measured.product
        self.noise = max(self.noise, self.product_error * (_MARGIN if self.measured is not None else 1.0))
        self.products = 0

    def check(self, tolerance: float = TOLERANCE) -> FiniteDifferenceCheck:
        """Tests smoothness, two steps against each other, and symmetry, of central differences at `step`.

        It takes 8 products of two gradients and waits for them.
        """
        return self._self_checks([self.step], tolerance)[0]

    def _check_central(self, step: float | None, tolerance: float) -> FiniteDifferenceCheck:
        finest = self._first_step("central")
        candidates = [finest, finest / 4, finest / 16] if step is None else [step]
        checks = self._self_checks(candidates, tolerance)
        best = min(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error)
        if not best.ok:
            raise CurvatureError(_refused(best.refusal))
        return best

    def _measure_forward(self, step: float | None, tolerance: float) -> MeasuredError:
        """Errors against double backward; against central differences where that fails or disagrees."""
        try:
            found = self._against_double_backward(step, tolerance)
        except RuntimeError as error:  # of autograd or of memory: the loss itself has just been evaluated
            self.doubts = str(error).strip().split("\n")[0] or type(error).__name__
        else:
            if found is not None and found.ok:
                return found
            self.doubts = _ANOTHER_FUNCTION if found is None else f"double backward disagrees: {found.refusal}"
        # Kinks fail the following check as well. What passes it is smooth, and has a wrong second derivative.
        self.checked = self._check_central(None, tolerance)
        length = self.checked.step
        measured = self._errors(lambda v: self._product(v, length, "central"), "central differences", step, tolerance)
        if not measured.ok:
            raise CurvatureError(_refused(measured.refusal))
        return measured

    def _errors(
        self, better: Callable[[Tensor], Tensor], method: str, step: float | None, tolerance: float
    ) -> MeasuredError:
        return measure_errors(
            lambda v, h: self._product(v, h, "forward"),
            better,
            method,
            self._random_units()[0],
            self.step,
            COARSE * self._scale,
            tolerance,
            adjust=step is None,
        )

    def _against_double_backward(self, step: float | None, tolerance: float) -> MeasuredError | None:
        """None where double backward is of another function. Its graphs are gone on return."""
        assert self._loss is not None
        named = zip(self.block.names, self.block.tensors, strict=True)
        keep = len(self._batches) == 1  # else rebuilt for every product: the memory of one batch's graph
        limit = self._memory_limit
        with (
            self._random.replay(),
            Hessian(self._loss, named, self._batches, keep_graphs=keep, memory_limit=limit) as exact,
        ):
            if not difference(exact.gradient, self.gradient) <= SAME_FUNCTION:
                return None
            return self._errors(exact.matvec, "double backward", step, tolerance)

    def _self_checks(self, steps: list[float], tolerance: float) -> list[FiniteDifferenceCheck]:
        def central(v: Tensor, h: float) -> Tensor:
            return self._product(v, h, "central")

        return self_checks(central, self._random_units(), steps, COARSE * self._scale, tolerance)

    def _random_units(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        u, other = (
            torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device) / self.size**0.5
            for _ in range(2)
        )
        return u, other

    def _first_step(self, scheme: Scheme) -> float:
        eps = torch.finfo(self.dtype).eps
        return self._scale * (eps ** (1 / 3) if scheme == "central" else eps**0.5 / 4)

    @property
    def first_step(self) -> float:
        """The longest step that is tried: at which rounding and truncation errors of a usual loss are equal."""
        return self._first_step(self.scheme)

    def slope(self, v: Tensor, h: float) -> float:
        """``|v| (L(theta + h v/|v|) - L(theta - h v/|v|)) / (2 h)``, which is ``g'v``. Waits for the device."""
        assert self._loss is not None
        norm = torch.linalg.vector_norm(v, dtype=torch.float64)
        total = 0.0
        for sign in (1.0, -1.0):
            with differentiable(twice=False), self._displaced(v, sign * h / norm), self._random.replay():
                for index, (weight, batch) in enumerate(zip(self._weights, self._batches, strict=True)):
                    total += sign * weight * float(evaluate(self._loss, (batch,), index).loss.detach())
        return total * float(norm) / (2 * h * sum(self._weights))

    def _matmat(self, V: Tensor) -> Tensor:
        if self.scheme == "forward" and self._current_versions() != self._versions:
            raise CurvatureError(
                "the parameters have changed since the operator was made, which keeps their gradient: make a new one"
            )
        products = self._zeros(V.shape[0])
        for row, v in zip(products, V, strict=True):
            self._add_product(row, v, self.step, self.scheme)
        return products

    def _product(self, v: Tensor, h: float, scheme: Scheme) -> Tensor:
        with differentiable(twice=False):
            product = self._zeros(1)[0]
            self._add_product(product, v, h, scheme)
        return product

    def _add_product(self, out: Tensor, v: Tensor, h: float, scheme: Scheme) -> None:
        """Writes the product into ``out``, which is zero."""
        norm = torch.linalg.vector_norm(v, dtype=torch.float64)  # stays on the device
        length = h / norm.clamp_min(torch.finfo(self.dtype).tiny)  # v = 0 gives 0 / tiny
        self._add_gradients(out, v, length, 1.0)
        if scheme == "central":
            self._add_gradients(out, v, -length, -1.0)
            h = 2.0 * h
        else:
            out.sub_(self._origin)
        out.mul_(norm / (h * sum(self._weights)))

    def _add_gradients(self, out: Tensor, v: Tensor, length: Tensor, sign: float) -> None:
        """Adds the weighted sum of the batches' gradients, with the parameters displaced by ``length * v``."""
        assert self._loss is not None
        parts = [part.view(p.shape) for part, p in zip(out.split(self.block.sizes), self.block.tensors, strict=True)]
        with self._displaced(v, length), self._random.replay():
            for index, (weight, batch) in enumerate(zip(self._weights, self._batches, strict=True)):
                value = evaluate(self._loss, (batch,), index).loss
                for part, gradient in zip(parts, differentiate(value, self.block, index), strict=True):
                    if gradient is not None:
                        part.add_(gradient.to(part), alpha=sign * weight)

    @contextmanager
    def _displaced(self, v: Tensor, length: Tensor) -> Iterator[None]:
        """Moves the parameters; the very tensors that held their data are back afterwards."""
        tensors = [self.block.tensors[i] for i in self._trainable]
        if not self._displacements:  # the same memory for every displacement
            self._displacements = [torch.empty_like(p.data) for p in tensors]
        parts = self.block.split(v)
        moved = [
            (p, p.data, parts[i], to) for i, p, to in zip(self._trainable, tensors, self._displacements, strict=True)
        ]
        try:
            with torch.no_grad():
                for p, original, part, displaced in moved:
                    torch.addcmul(original, part, length.to(p), out=displaced)
                    p.data = displaced
            yield
        finally:
            for p, original, _, _ in moved:
                p.data = original

    def _current_versions(self) -> list[tuple[int, int]]:
        """Which memory holds the parameters, and how often it was written to."""
        return [(self.block.tensors[i].data_ptr(), self.block.tensors[i]._version) for i in self._trainable]

    def release(self) -> None:
        """Lets go of the loss and the batches; no product is possible after."""
        super().release()
        self._loss = None
        self._batches = []
        self._displacements = []


def _refused(why: str) -> str:
    return f"finite differences can't be trusted here: {why}; tolerance=float('inf') takes them as they come"
