"""The covariance of the per-sample gradient: the noise that stochastic gradient descent sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rmt.curvature.batches import micro_batches
from lightning_rmt.curvature.evaluation import Loss, Mean, as_batches, differentiable, differentiate, evaluate
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters


class GradientCovariance(CurvatureOperator):
    r"""Covariance matrix of the gradient of one sample, over the samples of the curvature batches.

    With ``microbatch=1`` it is exactly the population covariance ``1/N sum_i (g_i - g)(g_i - g)'`` of the N
    per-sample gradients. Larger micro-batches (m_j samples with mean gradient G_j, K of them) cost fewer
    passes and give

        (N - 1) / (N (K - 1)) * sum_j m_j (G_j - g)(G_j - g)',

    whose mean over all ways to deal the samples into micro-batches is that same matrix: averaging m samples
    divides a covariance by m, and sampling without replacement is what the first factor is for (Cochran 1977,
    chapter 2). Its rank is at most K - 1.

    The covariance of a mini-batch gradient of B samples is this matrix over B. Micro-batches pass through the
    loss one by one, so a layer that mixes samples (batch normalisation in training mode) sees another batch
    than in training.

    Memory: the K gradients are stored, ``K * size`` entries of the operator's dtype, and nothing else. A product
    is two passes over them and no pass through the network.

    Args:
        loss: as for `Hessian`; a returned weight counts as the micro-batch's number of samples, so ten times the
            weights give about ten times the covariance.
        parameters: as for `Hessian`.
        batches: as for `Hessian`; each is cut along its samples (`micro_batches`).
        microbatch: samples per gradient, at least 1.

    Raises:
        TypeError: the loss is not a tensor, or a batch can't be cut.
        ValueError: no batches or parameters, ``microbatch`` below 1, or a loss that is not a finite scalar
            that depends on the parameters; from a product, fewer than two micro-batches, or weights that average
            below one per micro-batch.

    Example:
        The gradients of ``x * b`` by x are the samples b; their population variance is 2/3.

        >>> import torch
        >>> x = torch.zeros(1, requires_grad=True)
        >>> C = GradientCovariance(lambda b: (x * b).mean(), [x], [torch.tensor([1.0, 2.0, 3.0])])
        >>> C.matvec(torch.ones(1))
        tensor([0.6667])
    """

    def __init__(self, loss: Loss, parameters: Parameters, batches: Iterable[Any], microbatch: int = 1) -> None:
        super().__init__(ParameterBlock(parameters))
        parts = [part for batch in as_batches(batches) for part in micro_batches(batch, microbatch)]
        with differentiable():
            self._rows = self._zeros(len(parts))  # gradients; centred and scaled at the first product
            mean = Mean(self.block)
            for index, part in enumerate(parts):
                evaluation = evaluate(loss, (part,), index)
                self._rows[index] = mean.add(evaluation, differentiate(evaluation.loss, self.block, index))
            self._describe(mean)
        self._weights = mean.weights
        self._scaled = False
        self.parts = len(parts)
        self.pool(self.gradient, self.samples, self.parts)

    def pool(self, gradient: Tensor, samples: float, parts: int) -> None:
        """Makes this one rank's share of the covariance over several ranks. Call it before the first product.

        The sample-weighted mean over ranks of the products then is the covariance of the union of their batches,
        which the mean of their own covariances is not: that leaves out how the ranks' means differ.

        Args:
            gradient: mean gradient over all ranks, shape (size,).
            samples: over all ranks.
            parts: micro-batches over all ranks.

        Raises:
            RuntimeError: a product was taken already.
        """
        if self._scaled:
            raise RuntimeError("the gradients are centred already; pool before the first product")
        self._centre, self._total, self._parts = gradient, samples, parts

    def _matmat(self, V: Tensor) -> Tensor:
        if not self._scaled:
            self._scale()
        return (V @ self._rows.mT) @ self._rows

    def _scale(self) -> None:
        if self._parts < 2:
            raise ValueError(
                "the gradient covariance needs at least two micro-batches, got 1: use a smaller `microbatch` "
                "or more batches"
            )
        if self._total < self._parts:
            raise ValueError(
                f"the loss returned weights that sum to {self._total:g} over {self._parts} micro-batches; the gradient "
                "covariance takes a weight for a number of samples, so scale them to at least one per micro-batch"
            )
        factor = (self._total - 1) / (self.samples * (self._parts - 1))
        for row, weight in zip(self._rows, self._weights, strict=True):  # in place: the rows are the memory
            row.sub_(self._centre).mul_((factor * weight) ** 0.5)
        self._scaled = True

    def release(self) -> None:
        """Drops the stored gradients; no product is possible afterwards."""
        super().release()
        self._rows = torch.empty(0, self.size, dtype=self.dtype, device=self.device)
