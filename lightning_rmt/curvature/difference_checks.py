"""What finite differences of gradients are worth on a given loss: against exact products, or against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rmt.curvature.graph_memory import graph_nodes
from lightning_rmt.krylov.shards import Shards, Unsharded

# (v, h) -> the product with v from a displacement of length h
Product = Callable[[Tensor, float], Tensor]

# The step that balances rounding against truncation in float32; kinks are looked for at this length in
# float64 too, where the steps themselves are too short to meet one often.
COARSE = torch.finfo(torch.float32).eps ** (1 / 3)
TOLERANCE = 0.02
# Most that the product with a random vector may change from a step of 4 COARSE to one of COARSE. Measured
# on 18 small networks with 4 seeds: smooth ones change by 7e-5 to 3e-2, those with kinks by 0.3 and more
# unless they meet none (a network of 4 PReLU units). Where the data are memorised (loss below 1e-2) both come
# closer, and smooth ones may fail.
_ROUGHNESS = 0.05
# Most that a forward difference of length COARSE with a random vector may err. A GPT, an LSTM, a tanh MLP and a
# GELU CNN, fresh, trained and memorised: 4e-3 to 7e-2. ResNet-20, ReLU CNN with BatchNorm, max-pooling CNN and
# ReLU MLP: 1.1 to 12, memorised or not. Networks of a few units may meet no kink, and err by no more than others.
_KINKS = 0.25


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

    @property
    def doubt(self) -> str:
        """What is wrong where it isn't `ok`."""
        if not self.roughness <= _ROUGHNESS:
            return (
                "the loss has kinks (ReLU, max-pooling) or is noisy, since the product changes by "
                f"{self.roughness:.1%} with the step"
            )
        return (
            f"at the best step, {self.step:.1e}, two steps disagree by {self.disagreement:.1%} and the matrix is "
            f"asymmetric by {self.asymmetry:.1%}"
        )

    @property
    def refusal(self) -> str:
        """The same, with what to do about it."""
        smooth = self.roughness <= _ROUGHNESS
        return f"{self.doubt}. Use Hessian (double backward)" + (", or a float64 copy of the model" if smooth else "")


# Activations and pooling whose gradient jumps, by their autograd nodes. A few vectors may miss every kink that later ones
# meet, so what can be seen to have kinks isn't measured at all.
_JUMPS = re.compile(
    r"(Relu|LeakyRelu|PreluKernel|RreluWithNoise|Threshold|Hardtanh|Hardsigmoid|Hardswish|Hardshrink|Softshrink"
    r"|(Adaptive)?MaxPool[23]D(WithIndices)?)Backward\d+$"
)


def kinks(value: Tensor) -> list[str]:
    """Names of the operations in a loss's graph whose gradients jump; compiled code hides its own."""
    names = {type(node).__name__ for node in graph_nodes([value])}
    return sorted(re.sub(r"Backward\d*$", "", name) for name in names if _JUMPS.match(name))


class MeasuredError(NamedTuple):
    """Relative errors of finite differences against better products.

    Attributes:
        random: ``|Du - Hu| / |Hu|``, D the finite differences and u a random vector: as the bulk has it.
        leading: ``|Dv - Hv| / |Hv|``, v along ``D(Du)``: as the largest eigenvalues have it, where the loss
            bends most and a step must be shortest.
        quadratic: ``|u'Du - u'Hu| / |u'Hu|``.
        coarse: as ``random``, at a long step. Kinks make it large.
        step: length h of the displacement.
        method: how the better products were had.
        tolerance: the most that ``random`` and ``leading`` may be.
    """

    random: float
    leading: float
    quadratic: float
    coarse: float
    step: float
    method: str
    tolerance: float

    @property
    def product(self) -> float:
        """Relative error of a product, the worse of the two; NaN if either is."""
        return _worst(self.random, self.leading)

    @property
    def ok(self) -> bool:
        """Whether products are good enough and no kinks were met (NaN is not)."""
        return self.product <= self.tolerance and self.coarse <= _KINKS

    @property
    def refusal(self) -> str:
        """What to tell the user where it isn't `ok`."""
        if not self.coarse <= _KINKS:
            return (
                f"a forward difference differs from {self.method} by {self.coarse:.1%}: the loss has kinks (ReLU, "
                "max-pooling) or is noisy. Use Hessian (double backward)"
            )
        return (
            f"at the best step, {self.step:.1e}, forward differences differ from {self.method} by {self.product:.1%}. "
            "Use Hessian (double backward), or central differences"
        )


def self_checks(
    product: Product,
    vectors: tuple[Tensor, Tensor],
    steps: Sequence[float],
    coarse: float,
    tolerance: float,
    shards: Shards | None = None,
) -> list[FiniteDifferenceCheck]:
    """One check per step: smoothness, two steps against each other, symmetry. Waits for the device.

    Args:
        product: central differences.
        vectors: two random unit vectors.
        steps: a factor of 4 apart, the longest first.
        coarse: length at which to look for kinks.
        tolerance: of the checks.
        shards: which parts of the vectors this process holds; None: all. Every process gets the same checks.
    """
    u, other = vectors
    shards = shards or Unsharded(u.numel())
    roughness = _worst(*(difference(product(x, 4 * coarse), product(x, coarse), shards) for x in (u, other)))
    lengths = [*steps, steps[-1] / 4]
    from_u = [product(u, h) for h in lengths]
    v = _direction(from_u[-1], shards)
    from_v = [product(v, h) for h in lengths]
    return [
        FiniteDifferenceCheck(
            roughness,
            _worst(difference(at_u[0], at_u[1], shards), difference(at_v[0], at_v[1], shards)),
            _ratio(shards.total((_dot(u, at_v[0]) - _dot(v, at_u[0]))[None])[0].abs(), shards.norm(at_u[0])),
            h,
            tolerance,
        )
        for h, at_u, at_v in zip(steps, pairwise(from_u), pairwise(from_v), strict=True)
    ]


def measure_errors(
    product: Product,
    better: Callable[[Tensor], Tensor],
    method: str,
    u: Tensor,
    step: float,
    coarse: float,
    tolerance: float,
    *,
    adjust: bool,
) -> MeasuredError:
    """Errors of ``product`` at the best step found. Waits for the device.

    It takes 4 of the products, 6 with ``adjust``, and 2 of the better ones. Truncation grows with the step and is
    largest along the leading eigenvectors, rounding shrinks with it and is largest along a random vector. So one
    more step is tried, longer or shorter by the root of the two errors' ratio, which balances them; the better one
    of both stays.

    Args:
        product: finite differences.
        better: what they are measured against.
        method: how the better products are had.
        u: random unit vector.
        step: length to begin with.
        coarse: length at which to look for kinks.
        tolerance: of the result.
        adjust: try another step.
    """
    Hu, Du = better(u), product(u, step)
    v = _direction(product(_direction(Du), step))
    Hv = better(v)
    kinks = difference(product(u, coarse), Hu)

    def errors(h: float, Du: Tensor, Dv: Tensor) -> MeasuredError:
        quadratic = _ratio(_dot(u, Du - Hu).abs(), _dot(u, Hu).abs())
        return MeasuredError(difference(Du, Hu), difference(Dv, Hv), quadratic, kinks, h, method, tolerance)

    first = errors(step, Du, product(v, step))
    if not (adjust and 0.0 < first.random < math.inf and 0.0 < first.leading < math.inf):
        return first
    h = step * min(16.0, max(1 / 16, (first.random / first.leading) ** 0.5))
    second = errors(h, product(u, h), product(v, h))
    return second if second.product < first.product else first


def _direction(v: Tensor, shards: Shards | None = None) -> Tensor:
    """The unit vector along ``v``; zero stays zero."""
    length = (shards or Unsharded(v.numel())).norm(v)
    return (v / length.clamp_min(torch.finfo(v.dtype).tiny)).to(v.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.double(), b.double())


def _worst(*numbers: float) -> float:
    """The maximum, NaN if any is: Python's own max depends on where the NaN stands."""
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient on the host; 0/0 is 0, since a loss without curvature is not in doubt."""
    return 0.0 if float(numerator) == 0.0 else float(numerator) / max(float(denominator), 1e-300)


def difference(a: Tensor, b: Tensor, shards: Shards | None = None) -> float:
    """``|a - b| / |b|``, on the host."""
    shards = shards or Unsharded(b.numel())
    return _ratio(shards.norm(a - b), shards.norm(b))
