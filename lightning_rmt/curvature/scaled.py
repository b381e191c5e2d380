"""A curvature matrix in other coordinates: one diagonal on either side."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor

from lightning_rmt.curvature.operator import CurvatureOperator


class Scaled(CurvatureOperator):
    """``S C S`` for a diagonal S: the matrix C of another operator, in coordinates that S stretches.

    With ``S = P^(-1/2)`` it has the eigenvalues of ``P^-1 C``, which decide on the stability of steps ``P^-1`` times the
    gradient. Everything that takes a curvature operator takes this one, sums over ranks included.

    Args:
        operator: C; it is released with this one.
        scale: diagonal of S, shape (n,), in the operator's dtype and on its device.

    Raises:
        ValueError: ``scale`` has another shape, or ``operator`` has no exact products: how far others err in these
            coordinates isn't known.
    """

    def __init__(self, operator: CurvatureOperator, scale: Tensor) -> None:
        if scale.shape != (operator.size,):
            raise ValueError(f"scale must have shape ({operator.size},), got {tuple(scale.shape)}")
        if not operator.exact:
            raise ValueError("products of finite differences have an error that isn't known in other coordinates")
        super().__init__(operator.block)
        self._inside, self._scale = operator, scale
        self._twice = operator._twice
        self.dtype, self.device, self.noise = operator.dtype, operator.device, operator.noise
        self.samples, self.loss_value, self.used = operator.samples, operator.loss_value, operator.used
        self.gradient = operator.gradient * scale

    def _matmat(self, V: Tensor) -> Tensor:
        self._inside.at_once = self.at_once
        return self._inside._matmat(V * self._scale) * self._scale

    def compare_routes(self, rows: int) -> bool:
        """As of the operator inside."""
        return self._inside.compare_routes(rows)

    def within(self, places: Iterable[int]) -> AbstractContextManager[None]:
        """As of the operator inside."""
        return self._inside.within(places)

    def graph_bytes(self) -> int:
        """Of the operator inside."""
        return self._inside.graph_bytes()

    def release(self) -> None:
        """Releases the operator inside as well."""
        self._inside.release()
        super().release()
