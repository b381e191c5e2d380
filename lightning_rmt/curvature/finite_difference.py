"""The Hessian by central differences of gradients: for losses whose operations have no second derivative."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.evaluation import Loss, Mean, as_batches, differentiable, differentiate, evaluate
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters
from lightning_rmt.curvature.randomness import RandomState

# The step that balances rounding against truncation in float32; kinks are looked for at this length in
# float64 too, where the steps themselves are too short to meet one often.
_COARSE = torch.finfo(torch.float32).eps ** (1 / 3)
# Most that the product with a random vector may change from a step of 4 _COARSE to one of _COARSE. Measured
# on 18 small networks with 4 seeds: smooth ones change by 7e-5 to 3e-2, those with kinks by 0.3 and more
# unless they meet none (a network of 4 PReLU units). Where the data are memorised (loss below 1e-2) both come
# closer, and smooth ones may fail.
_ROUGHNESS = 0.05
_TOLERANCE = 0.02


class FiniteDifferenceCheck(NamedTuple):
    """Whether finite differences can be trusted here. All numbers are relative.

    Attributes:
        roughness: change of the product with a random vector when a coarse step is made 4 times shorter, the
            worst of two vectors. Kinks (ReLU, max-pooling) make it large, whatever the step.
        disagreement: ``|H_h u - H_{h/4} u| / |H_{h/4} u|``, the worse of a random u and of ``Hu``, which the
            large eigenvalues dominate.
        asymmetry: ``|u'Hv - v'Hu| / |Hu|`` with ``v = Hu / |Hu|``.
        step: the step h.
        tolerance: the most that disagreement and asymmetry may be; roughness may be 0.05.
    """

    roughness: float
    disagreement: float
    asymmetry: float
    step: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether all three are small enough (NaN is not)."""
        return self.roughness <= _ROUGHNESS and self.error <= self.tolerance

    @property
    def error(self) -> float:
        """The larger of disagreement and asymmetry; NaN if either is."""
        return _worst(self.disagreement, self.asymmetry)


class FiniteDifferenceHessian(CurvatureOperator):
    """Hessian of the weighted mean of ``loss`` over ``batches``, by central differences of its gradient.

    ``Hv = |v| (g(theta + h v/|v|) - g(theta - h v/|v|)) / (2 h)``: two gradients for a product. It needs one
    derivative only, so it does what double backward can't: ``EmbeddingBag``, fused attention kernels, an
    ``autograd.Function`` without a second derivative. The parameters' data are swapped, not written: the
    original tensors come back untouched, after an exception too. Every evaluation starts from the same state
    of the random number generators.

    A difference across a kink measures the kink. Networks with ReLU or max-pooling give errors of 100% and
    more at steps where a smooth network has four correct digits, so the constructor tests the loss (see
    `FiniteDifferenceCheck`, about 11 products) and refuses what fails. Smooth networks that have memorised
    their data fail too where no step serves both ends of the spectrum.

    Args:
        loss: as for `Hessian`; evaluated twice per batch and product.
        parameters: as for `Hessian`, in float32 or float64.
        batches: as for `Hessian`.
        step: length h of the displacement. None: the best by the check of ``eps^(1/3) (1 + |theta|)`` (eps is
            the machine epsilon), a quarter and a sixteenth of it; without a check the first.
        tolerance: the largest disagreement and asymmetry that pass; infinity to take what comes, without a
            test.

    Attributes:
        step: the step h in use.
        checked: the check that the constructor made, or None for an infinite tolerance.
        noise: relative error of a product: what the check found, or 0.02 where none was made.

    Raises:
        TypeError: the loss is not a tensor, or the parameters aren't.
        ValueError: no batches or parameters, a loss that is not a finite scalar that depends on them, a step
            that is not positive, or parameters in half precision, whose rounding errors exceed the
            differences.
        CurvatureError: the check failed.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> H = FiniteDifferenceHessian(lambda batch: 0.5 * x @ A @ x, [x], [None])
        >>> torch.allclose(H.matmat(torch.eye(2, dtype=torch.float64)), A)
        True
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Parameters,
        batches: Iterable[Any],
        step: float | None = None,
        *,
        tolerance: float = _TOLERANCE,
    ) -> None:
        super().__init__(ParameterBlock(parameters))
        for name, p in zip(self.block.names, self.block.tensors, strict=True):
            if p.requires_grad and torch.finfo(p.dtype).bits < 32:
                raise ValueError(
                    f"parameter {name!r} is {p.dtype}; finite differences need float32 or float64 parameters"
                )
        if step is not None and not 0.0 < step < float("inf"):
            raise ValueError(f"the step must be positive and finite, got {step}")
        self._loss: Loss | None = loss
        self._batches = as_batches(batches)
        self._random = RandomState(p.device for p in self.block.tensors)
        with differentiable(), self._random.replay():
            mean = Mean(self.block)
            for index, batch in enumerate(self._batches):
                evaluation = evaluate(loss, (batch,), index)
                mean.add(evaluation, differentiate(evaluation.loss, self.block, index))
            self._describe(mean)
        self._fractions = mean.fractions

        point = self.block.flatten([p.detach() if p.requires_grad else None for p in self.block.tensors])
        self._scale = 1.0 + float(point.double().norm())
        finest = torch.finfo(self.dtype).eps ** (1 / 3) * self._scale
        self.step = finest if step is None else step
        self.checked: FiniteDifferenceCheck | None = None
        if tolerance < float("inf"):
            candidates = [finest, finest / 4, finest / 16] if step is None else [step]
            best = min(self._checks(candidates, tolerance), key=_rank)
            if not best.ok:
                raise CurvatureError(_refusal(best))
            self.step, self.checked = best.step, best
        self.noise = max(self.noise, _TOLERANCE if self.checked is None else self.checked.error)
        self.products = 0

    def check(self, tolerance: float = _TOLERANCE) -> FiniteDifferenceCheck:
        """Tests smoothness, two steps against each other, and symmetry, at `step`.

        It takes 8 products and waits for them.
        """
        return self._checks([self.step], tolerance)[0]

    def _checks(self, steps: list[float], tolerance: float) -> list[FiniteDifferenceCheck]:
        """One check per step; the steps are a factor of 4 apart."""
        generator = torch.Generator().manual_seed(0)
        u, other = (
            torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device) / self.size**0.5
            for _ in range(2)
        )
        coarse = _COARSE * self._scale
        roughness = _worst(*(_difference(self._product(x, 4 * coarse), self._product(x, coarse)) for x in (u, other)))
        lengths = [*steps, steps[-1] / 4]
        from_u = [self._product(u, h) for h in lengths]
        v = _direction(from_u[-1])
        from_v = [self._product(v, h) for h in lengths]
        return [
            FiniteDifferenceCheck(
                roughness,
                _worst(_difference(at_u[0], at_u[1]), _difference(at_v[0], at_v[1])),
                _ratio((u @ at_v[0] - v @ at_u[0]).abs(), at_u[0].norm()),
                h,
                tolerance,
            )
            for h, at_u, at_v in zip(steps, pairwise(from_u), pairwise(from_v), strict=True)
        ]

    def _matmat(self, V: Tensor) -> Tensor:
        products = self._zeros(V.shape[0])
        for row, v in zip(products, V, strict=True):
            row.copy_(self._product(v, self.step))
        return products

    def _product(self, v: Tensor, h: float) -> Tensor:
        # The length of v stays on the device; v = 0 gives 0 / tiny.
        unit = v / v.norm().clamp_min(torch.finfo(self.dtype).tiny)
        with differentiable():
            difference = self._zeros(1)[0]
            for sign in (1.0, -1.0):
                with self._displaced(unit, sign * h), self._random.replay():
                    for index, (fraction, batch) in enumerate(zip(self._fractions, self._batches, strict=True)):
                        assert self._loss is not None
                        value = evaluate(self._loss, (batch,), index).loss
                        gradients = differentiate(value, self.block, index)
                        difference.add_(self.block.flatten(gradients), alpha=sign * fraction)
        return difference.mul_(v.norm() / (2.0 * h))

    @contextmanager
    def _displaced(self, direction: Tensor, length: float) -> Iterator[None]:
        """Moves the parameters; the very tensors that held their data are back afterwards."""
        parts = self.block.split(direction)
        moved = [(p, p.data, part) for p, part in zip(self.block.tensors, parts, strict=True) if p.requires_grad]
        try:
            with torch.no_grad():
                for p, original, part in moved:
                    p.data = original.add(part, alpha=length)
            yield
        finally:
            for p, original, _ in moved:
                p.data = original

    def release(self) -> None:
        """Lets go of the loss and the batches; no product is possible after."""
        super().release()
        self._loss = None
        self._batches = []


def _worst(*numbers: float) -> float:
    """The maximum, NaN if any is: Python's own max depends on where the NaN stands."""
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def _rank(check: FiniteDifferenceCheck) -> float:
    return math.inf if math.isnan(check.error) else check.error


def _direction(v: Tensor) -> Tensor:
    return v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient on the host; 0/0 is 0, since a loss without curvature is not in doubt."""
    return 0.0 if float(numerator) == 0.0 else float(numerator) / max(float(denominator), 1e-300)


def _difference(a: Tensor, b: Tensor) -> float:
    return _ratio((a - b).norm(), b.norm())


def _refusal(check: FiniteDifferenceCheck) -> str:
    if not check.roughness <= _ROUGHNESS:
        why = (
            "the loss has kinks (ReLU, max-pooling) or is noisy, since the product changes by "
            f"{check.roughness:.1%} with the step. Use Hessian (double backward)"
        )
    else:
        why = (
            f"at the best step, {check.step:.1e}, two steps disagree by {check.disagreement:.1%} and the matrix is "
            f"asymmetric by {check.asymmetry:.1%}. Use Hessian (double backward), or a float64 copy of the model"
        )
    return f"finite differences can't be trusted here: {why}; tolerance=float('inf') takes them as they come"
