"""What all curvature operators share: a flat parameter block, and products with stacks of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from lightning_rmt.curvature.evaluation import Mean, differentiable
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.krylov.lanczos import rounding_noise

_Operator = TypeVar("_Operator", bound="CurvatureOperator")


class CurvatureOperator(ABC):
    """A symmetric linear operator on flat parameter vectors.

    Attributes:
        block: the parameters and their flat layout.
        size: dimension n.
        device: of the vectors.
        dtype: of the vectors, float32 or float64.
        noise: relative rounding error of a product, from the least precise trainable parameter: half precision
            parameters have half precision products, though the vectors are float32.
        samples: total weight of the batches; the number of samples unless the loss returned weights of its
            own.
        loss_value: weighted mean loss over the batches.
        gradient: weighted mean gradient, shape (size,), detached.
        used: for each parameter of the block, whether the loss depends on it.
        products: operator-vector products taken so far.
        at_once: whether products with several vectors are taken together, where there is a choice; see `compare_routes`.
        exact: whether products are exact up to rounding. Finite differences aren't: never take level statistics
            from them.
        product_error: relative error of a product as measured, where products aren't exact; else None.
    """

    exact: bool = True
    product_error: float | None = None
    _twice: bool = True  # whether the loss is differentiated twice, which not every kernel can

    samples: float
    loss_value: float
    gradient: Tensor
    used: tuple[bool, ...]

    def __init__(self, block: ParameterBlock) -> None:
        self.block = block
        self.size = block.size
        self.device = block.device
        self.dtype = block.dtype
        trainable = (rounding_noise(p.dtype) for p in block.tensors if p.requires_grad)
        self.noise = max(trainable, default=rounding_noise(block.dtype))
        self.products = 0
        self.at_once = False
        self._released = False

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the trainable parameters that the loss does not depend on.

        They were never used, or they sit behind a reentrant activation checkpoint whose input needs no
        gradient, which hides them from autograd without an error: worth a warning. Their rows and columns are
        zero.
        """
        return tuple(
            name
            for name, p, used in zip(self.block.names, self.block.tensors, self.used, strict=True)
            if p.requires_grad and not used
        )

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the rows of ``V``. Never waits for the device.

        Args:
            V: shape (k, size), in the operator's dtype and on its device.

        Returns:
            A new tensor of the same shape: row i is the operator applied to row i of ``V``.

        Raises:
            ValueError: ``V`` has another shape, dtype or device.
            CurvatureError: the loss can't be differentiated as needed.
            RuntimeError: the operator was released.
        """
        if V.ndim != 2 or V.shape[1] != self.size:
            raise ValueError(f"V must have shape (k, {self.size}), got {tuple(V.shape)}")
        if V.dtype != self.dtype or V.device != self.device:
            raise ValueError(f"V must be {self.dtype} on {self.device}, got {V.dtype} on {V.device}")
        if self._released:
            raise RuntimeError(f"this {type(self).__name__} was released: its graphs are gone; build a new one")
        if V.shape[0] == 0:
            return torch.empty_like(V)
        with differentiable(twice=self._twice):  # a checkpoint recomputes its forward pass in here
            product = self._matmat(V.detach())
        self.products += V.shape[0]
        return product

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector of shape (size,); see `matmat`."""
        if v.shape != (self.size,):
            raise ValueError(f"v must have shape ({self.size},), got {tuple(v.shape)}")
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def compare_routes(self, rows: int) -> bool:
        """Finds out whether ``rows`` products are faster together, where there is a choice; see `Hessian`.

        Returns:
            What `at_once` should be: False here, where there is one way only.
        """
        return False

    def within(self, places: Iterable[int]) -> AbstractContextManager[None]:
        """Inside, only products of the block of these parameters are taken, with vectors that are zero outside it.

        An operator that can take them for less does; what it gives outside the block is then left out.

        Args:
            places: positions of the parameters in ``block``.
        """
        return nullcontext()

    def graph_bytes(self) -> int:
        """Memory of the autograd graphs that are kept between products; 0 where there are none."""
        return 0

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """Products with the rows of a detached ``V`` of the right shape, dtype and device; at least one row."""

    def release(self) -> None:
        """Frees what products need, such as graphs with their activations; no product is possible after."""
        self._released = True

    def __enter__(self: _Operator) -> _Operator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _zeros(self, k: int) -> Tensor:
        return torch.zeros(k, self.size, dtype=self.dtype, device=self.device)

    def _describe(self, mean: Mean) -> None:
        """Takes over what the evaluation of the batches showed."""
        self.loss_value = mean.loss()
        self.gradient = mean.gradient
        self.samples = mean.total
        self.used = tuple(mean.used)
