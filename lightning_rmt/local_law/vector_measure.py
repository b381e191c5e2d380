"""What a curvature matrix does to one vector, from a Lanczos run that starts there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.local_law.arguments import not_negative, vector


@dataclass(frozen=True, eq=False)
class VectorMeasure:
    """Quadratic forms ``v' f(H) v = sum_j w_j f(x_j)`` of one vector v, by Gauss quadrature (Golub and Meurant 2010).

    Not the spectrum: a random start sees all directions alike, a gradient mostly those of large curvature. One belongs in
    ``tau``, the other in what a step along the gradient gains and costs.

    Attributes:
        nodes: Ritz values, shape (m,), in the operator's units.
        weights: shape (m,), at least 0, summing to ``|v|^2``.

    Raises:
        ValueError: the shapes differ or are no vectors, a number isn't finite, or a weight is negative.

    Example:
        >>> v = VectorMeasure([1.0, 3.0], [4.0, 1.0])
        >>> v.resolvent(1.0)  # 4 / 2 + 1 / 4
        2.25
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]

    def __post_init__(self) -> None:
        nodes, weights = vector(self.nodes, "nodes"), vector(self.weights, "weights")
        if nodes.shape != weights.shape or not nodes.size or (weights < 0).any():
            raise ValueError(
                f"a vector's measure has as many weights as nodes, at least one and none negative; got {nodes.size} nodes "
                f"and {weights.size} weights, the smallest {weights.min() if weights.size else 'missing'}"
            )
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "weights", weights)

    @classmethod
    def from_run(cls, run: Tridiagonal, norm: float) -> VectorMeasure:
        """From a Lanczos run that started at ``v / |v|``.

        Args:
            run: the run.
            norm: ``|v|``.

        Raises:
            ValueError: the norm is negative or not finite.
        """
        return cls(run.nodes, run.weights * not_negative(norm, "norm", "it is the length of the start vector") ** 2)

    def resolvent(self, damping: float, power: int = 1) -> float:
        """``v' (H + damping)^-power v``."""
        return float(self.weights @ (self.nodes + damping) ** -power)

    def curvature(self, damping: float, shift: float) -> tuple[float, float]:
        """``v' R (H + shift) R v`` with ``R = (H + damping)^-1``, and the same with the absolute values of its terms."""
        terms = self.weights * ((self.nodes + shift) / (self.nodes + damping)) / (self.nodes + damping)
        return math.fsum(terms), math.fsum(np.abs(terms))
