"""The Hessian of a mean loss, by double backward on the live parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.evaluation import Loss, as_batches, differentiable, evaluate, require_finite
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters


class _GradientGraph(NamedTuple):
    """One batch's gradient with its graph, as far as it has one."""

    outputs: list[Tensor]  # gradients that depend on the parameters
    output_index: list[int]  # whose they are
    inputs: list[Tensor]  # parameters that the loss depends on
    input_index: list[int]
    weight: float


class Hessian(CurvatureOperator):
    """Hessian of the weighted mean of ``loss`` over ``batches``.

    Reverse-over-reverse (Pearlmutter 1994) with ``torch.autograd.grad`` on the live leaves: the gradient's graph is
    built once per batch, here, and kept, so that a product costs about two gradients and every product sees the same
    dropout masks and batch statistics. ``p.grad``, the parameters and their version counters are never touched. The
    loss runs once per batch and may change buffers or draw random numbers as it would in training.

    Args:
        loss: ``loss(batch)`` returns the mean over the batch as a scalar, or ``(mean, weight)``.
        parameters: tensors, (name, tensor) pairs or a mapping; frozen and unused ones give zero rows and columns.
        batches: any iterable of batches; each weighs as much as it has samples.

    Raises:
        TypeError: the loss is not a tensor, or the parameters aren't.
        ValueError: no batches, no parameters, or a loss that is not a finite scalar that depends on them.
        CurvatureError: a gradient is sparse, or autograd can't build its graph.
        SecondDerivativeError: from a product, where an operation has no second derivative.

    Example:
        A quadratic ``x'Ax/2`` has the Hessian A.

        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> x = torch.ones(2, requires_grad=True)
        >>> H = Hessian(lambda batch: 0.5 * x @ A @ x, [x], [None])
        >>> H.matmat(torch.eye(2))
        tensor([[2., 1.],
                [1., 3.]])
    """

    def __init__(self, loss: Loss, parameters: Parameters, batches: Iterable[Any]) -> None:
        super().__init__(ParameterBlock(parameters))
        listed = as_batches(batches)
        graphs: list[_GradientGraph] = []
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        with differentiable():
            for index, batch in enumerate(listed):
                value, weight = evaluate(loss, batch, index)
                gradient, graph = self._gradient(value, weight, index)
                losses.append(value.detach())
                gradients.append(gradient)
                graphs.append(graph)
        values = require_finite(losses)
        self.samples = sum(graph.weight for graph in graphs)
        self._graphs = [graph._replace(weight=graph.weight / self.samples) for graph in graphs]
        self.loss_value = sum(g.weight * value for g, value in zip(self._graphs, values, strict=True))
        self.gradient = torch.zeros_like(gradients[0])
        for graph, gradient in zip(self._graphs, gradients, strict=True):
            self.gradient.add_(gradient, alpha=graph.weight)
        used = {index for graph in self._graphs for index in graph.input_index}
        self.unused = tuple(
            name
            for index, (name, p) in enumerate(zip(self.block.names, self.block.tensors, strict=True))
            if p.requires_grad and index not in used
        )

    def _gradient(self, value: Tensor, weight: float, batch: int) -> tuple[Tensor, _GradientGraph]:
        """The flat detached gradient of one batch, and its graph."""
        trainable = [index for index, p in enumerate(self.block.tensors) if p.requires_grad]
        if not trainable:
            raise ValueError(
                "every parameter is frozen (requires_grad=False): there is nothing to differentiate by"
            )
        tensors = [self.block.tensors[index] for index in trainable]
        found = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
        gradients: list[Tensor | None] = [None] * len(self.block.tensors)
        for index, gradient in zip(trainable, found, strict=True):
            if gradient is not None and gradient.layout != torch.strided:
                raise CurvatureError(
                    f"parameter {self.block.names[index]!r} has a sparse gradient, which can't be differentiated again: "
                    "set `sparse = False` on its embedding while curvature is taken, or use FiniteDifferenceHessian"
                )
            gradients[index] = gradient
        inputs = [index for index, gradient in enumerate(gradients) if gradient is not None]
        if not inputs:
            raise ValueError(f"the loss of batch {batch} depends on none of the parameters that were given")
        outputs = [index for index in inputs if gradients[index].requires_grad]  # type: ignore[union-attr]
        graph = _GradientGraph(
            [gradients[index] for index in outputs],  # type: ignore[misc]
            outputs,
            [self.block.tensors[index] for index in inputs],
            inputs,
            weight,
        )
        return self.block.flatten([None if g is None else g.detach() for g in gradients]), graph

    def _matmat(self, V: Tensor) -> Tensor:
        products = self.zeros(V.shape[0])
        for row, v in zip(products, V, strict=True):
            parts = self.block.split(v)
            for graph in self._graphs:
                if not graph.outputs:
                    continue  # linear in the parameters: no second derivative
                found = torch.autograd.grad(
                    graph.outputs,
                    graph.inputs,
                    [parts[index] for index in graph.output_index],
                    retain_graph=True,
                    allow_unused=True,
                )
                columns: list[Tensor | None] = [None] * len(self.block.tensors)
                for index, column in zip(graph.input_index, found, strict=True):
                    columns[index] = column
                row.add_(self.block.flatten(columns), alpha=graph.weight)
        return products

    def release(self) -> None:
        """Drops the gradient graphs and the activations that they keep; products are no longer possible."""
        super().release()
        self._graphs = []
