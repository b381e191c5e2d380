"""The generalised Gauss-Newton matrix of a loss over a network's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_rmt.curvature.evaluation import (
    Mean,
    as_batches,
    differentiable,
    differentiate,
    evaluate,
    watched_functions,
)
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters

Outputs: TypeAlias = "Tensor | tuple[Tensor, ...] | list[Tensor]"


class _Graphs(NamedTuple):
    """What one batch's product needs; lists run over the outputs that have a graph."""

    places: list[int]  # parameters that the outputs depend on, by place in the block
    outputs: list[Tensor]
    cotangents: list[Tensor]  # the free variables w of the pullback
    pullback: list[Tensor]  # J'w, one per place
    leaves: list[Tensor]  # the outputs as the loss saw them, cut off from the network
    loss_gradients: list[Tensor | None]  # of the loss by the leaves, with their graph


class GaussNewton(CurvatureOperator):
    """Generalised Gauss-Newton matrix ``J' H_L J`` of the weighted mean of a loss over batches.

    J is the Jacobian of the network's outputs and H_L the Hessian of the loss by the outputs (Schraudolph
    2002). Where the loss is convex in the outputs (cross-entropy, squared error) the matrix is positive
    semidefinite, and for cross-entropy it is the Fisher information of the model's own predictions. A product
    takes three passes: ``Jv`` by differentiating the pullback ``w -> J'w`` by w, then H_L, then ``J'``. All
    graphs are built once and kept.

    Args:
        outputs: ``outputs(batch)`` returns a tensor, or a tuple or list of tensors, that depend on the
            parameters.
        loss: ``loss(outputs, batch)`` returns the mean over the batch as a scalar, or ``(mean, weight)``. It
            must reach the parameters only through the outputs.
        parameters: as for `Hessian`.
        batches: as for `Hessian`.

    Raises:
        TypeError: the outputs are not tensors, or the loss isn't.
        ValueError: no batches or parameters, outputs without a graph, or a loss that is not a finite scalar
            that depends on them.
        SecondDerivativeError: from the constructor or from a product, where an operation can't be
            differentiated twice.

    Example:
        Linear regression with a mean squared error has ``J' H_L J = 2 X'X / N``.

        >>> import torch
        >>> w = torch.zeros(2, requires_grad=True)
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> G = GaussNewton(lambda b: b @ w, lambda out, b: (out**2).mean(), [w], [X])
        >>> G.matmat(torch.eye(2))
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(
        self,
        outputs: Callable[[Any], Outputs],
        loss: Callable[[Any, Any], Tensor | tuple[Tensor, Any]],
        parameters: Parameters,
        batches: Iterable[Any],
    ) -> None:
        super().__init__(ParameterBlock(parameters))
        self._graphs: list[_Graphs] = []
        with differentiable():
            mean = Mean(self.block)
            for index, batch in enumerate(as_batches(batches)):
                self._graphs.append(self._build(outputs, loss, batch, index, mean))
            self._describe(mean)
        self._fractions = mean.fractions

    def _build(
        self, outputs: Callable[[Any], Outputs], loss: Callable[..., Any], batch: Any, index: int, mean: Mean
    ) -> _Graphs:
        torch.clear_autocast_cache()
        produced = outputs(batch)
        items = [produced] if isinstance(produced, Tensor) else produced
        if not isinstance(items, (tuple, list)) or not all(isinstance(item, Tensor) for item in items):
            raise TypeError(
                f"outputs(batch) must return a tensor or a tuple or list of tensors, got {type(produced).__name__}"
            )
        live = [item for item in items if item.requires_grad]
        if not live:
            raise ValueError(
                f"the outputs of batch {index} have no graph: no parameter with requires_grad=True is in them"
            )
        seen = [item.detach().requires_grad_() if item.requires_grad else item for item in items]
        leaves = [item for item in seen if item.requires_grad]
        evaluation = evaluate(loss, (_like(produced, seen), batch), index)
        with watched_functions(evaluation.loss) as watched:
            slopes = torch.autograd.grad(watched, leaves, create_graph=True, allow_unused=True)
        if all(slope is None for slope in slopes):
            raise ValueError(f"the loss of batch {index} does not depend on the outputs")

        # A scalar whose gradient is J'w: its gradient by the parameters is the pullback, and at w = loss
        # gradient it is the loss's own gradient. Ones, since a backward that leaves autograd isn't seen at w = 0.
        cotangents = [torch.ones_like(item, requires_grad=True) for item in live]
        pairing = sum((item * w).sum() for item, w in zip(live, cotangents, strict=True))
        assert isinstance(pairing, Tensor)
        pullback = differentiate(pairing, self.block, index, create_graph=True)
        reached = [i for i, g in enumerate(pullback) if g is not None]
        gradients = torch.autograd.grad(
            live,
            [self.block.tensors[i] for i in reached],
            [torch.zeros_like(item) if s is None else s.detach() for item, s in zip(live, slopes, strict=True)],
            retain_graph=True,
        )
        by_parameter: list[Tensor | None] = [None] * len(self.block.tensors)
        for i, gradient in zip(reached, gradients, strict=True):
            by_parameter[i] = gradient
        mean.add(evaluation, by_parameter)
        return _Graphs(reached, live, cotangents, [pullback[i] for i in reached], leaves, list(slopes))  # type: ignore[misc]

    def _matmat(self, V: Tensor) -> Tensor:
        products = self._zeros(V.shape[0])
        for fraction, graphs in zip(self._fractions, self._graphs, strict=True):
            for product, v in zip(products, V, strict=True):
                product.add_(self._batch_product(graphs, v), alpha=fraction)
        return products

    def _batch_product(self, graphs: _Graphs, v: Tensor) -> Tensor:
        """One batch's ``J' H_L J v``."""
        parts = self.block.split(v)
        pushed = torch.autograd.grad(
            graphs.pullback,
            graphs.cotangents,
            [parts[i] for i in graphs.places],
            retain_graph=True,
            allow_unused=True,
        )
        curved = [
            (slope, torch.zeros_like(slope) if jv is None else jv)
            for slope, jv in zip(graphs.loss_gradients, pushed, strict=True)
            if slope is not None and slope.requires_grad  # a constant slope: the loss is linear in that output
        ]
        columns: list[Tensor | None] = [None] * len(self.block.tensors)
        if curved:
            bent = torch.autograd.grad(
                [slope for slope, _ in curved],
                graphs.leaves,
                [jv for _, jv in curved],
                retain_graph=True,
                allow_unused=True,
            )
            reached = [(out, u) for out, u in zip(graphs.outputs, bent, strict=True) if u is not None]
            if not reached:  # the loss is linear in every output
                return self.block.flatten(columns)
            found = torch.autograd.grad(
                [out for out, _ in reached],
                [self.block.tensors[i] for i in graphs.places],
                [u for _, u in reached],
                retain_graph=True,
                allow_unused=True,
            )
            for i, column in zip(graphs.places, found, strict=True):
                columns[i] = column
        return self.block.flatten(columns)

    def release(self) -> None:
        """Drops the graphs and the activations that they hold; no product is possible afterwards."""
        super().release()
        self._graphs = []


def _like(produced: Any, items: list[Tensor]) -> Any:
    """The items in the container that ``outputs(batch)`` returned."""
    if isinstance(produced, Tensor):
        return items[0]
    return type(produced)(*items) if hasattr(produced, "_fields") else type(produced)(items)
