"""The block of an operator that belongs to some of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock


class Restricted(CurvatureOperator):
    """The principal block of another operator: products with vectors that are zero outside some parameters, cut to them.

    Needs no graph of its own: it takes its products from the other's, which has to live as long. A `Hessian` differentiates
    no further than to the block, so that one near the loss costs a fraction of a whole product.

    Args:
        operator: the whole; its kept graphs serve all its blocks.
        names: parameters of the block.

    Raises:
        ValueError: a name isn't one of the operator's parameters, or there is none.
    """

    def __init__(self, operator: CurvatureOperator, names: Sequence[str]) -> None:
        known = {name: place for place, name in enumerate(operator.block.names)}
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"the operator has no parameter {missing[0]!r}")
        self._places = sorted(known[name] for name in set(names))
        super().__init__(ParameterBlock([(operator.block.names[i], operator.block.tensors[i]) for i in self._places]))
        self._whole = operator
        self._twice = operator._twice
        self.dtype, self.noise = operator.dtype, operator.noise
        self.exact, self.product_error = operator.exact, operator.product_error
        self.samples, self.loss_value = operator.samples, operator.loss_value
        parts = operator.gradient.split(operator.block.sizes)
        self.gradient = torch.cat([parts[i] for i in self._places])
        self.used = tuple(operator.used[i] for i in self._places)

    def _matmat(self, V: Tensor) -> Tensor:
        inside = V.split(self.block.sizes, dim=1)
        parts = [V.new_zeros(V.shape[0], size) for size in self._whole.block.sizes]
        for place, part in zip(self._places, inside, strict=True):
            parts[place] = part
        whole = torch.cat(parts, dim=1)
        with self._whole.within(self._places):
            product = self._whole._matmat(whole)
        columns = product.split(self._whole.block.sizes, dim=1)
        return torch.cat([columns[place] for place in self._places], dim=1)
