"""The Hessian of a mean loss, by double backward on the live parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rmt.curvature.errors import GraphTooLargeError
from lightning_rmt.curvature.evaluation import (
    Evaluation,
    Loss,
    Mean,
    as_batches,
    differentiable,
    differentiate,
    evaluate,
    own_functions,
)
from lightning_rmt.curvature.graph_memory import SECOND_ORDER_GROWTH, WORKING_GROWTH, graph_bytes
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import ParameterBlock, Parameters
from lightning_rmt.curvature.randomness import RandomState


class _GradientGraph(NamedTuple):
    """One batch's gradient with its graph: a pair per parameter that the loss depends on."""

    places: list[int]  # whose they are in the block
    gradients: list[Tensor]


class Hessian(CurvatureOperator):
    """Hessian of the weighted mean of ``loss`` over ``batches``.

    Reverse over reverse (Pearlmutter 1994) with ``torch.autograd.grad`` on the live leaves. The gradient's
    graph is built once per batch, in the constructor, and kept: a product then costs about two gradients, and
    every product sees the same dropout masks and batch statistics. ``p.grad``, the parameters and their
    version counters are never touched. The loss runs once per batch, and may change buffers and draw random
    numbers as it would in training.

    An ``autograd.Function`` whose backward leaves autograd (a kernel of its own, NumPy) is refused. One that multiplies
    the gradient with something it saved detached is taken as autograd takes it, for a constant, so that a term is missing
    and no error says so: `check_second_derivatives` sees it, by finite differences.

    Args:
        loss: ``loss(batch)`` returns the mean over the batch as a scalar, or ``(mean, weight)``.
        parameters: tensors, (name, tensor) pairs or a mapping. Each distinct tensor counts once; frozen and
            unused ones give zero rows and columns.
        batches: any iterable of batches; each weighs as much as it has samples.
        keep_graphs: False keeps no graph between products and runs the loss anew in each, batch by batch, from
            the same state of the random number generators: the memory of one batch in place of all, for about
            twice the time. Buffers that the loss changes go on changing.

        memory_limit: bytes that the graphs may take together, forecast from each batch's own graph before the second-order
            one is built (`graph_memory`), with what a product takes on top. None: no limit.
        resident: tensors that are there anyway and may be in the graphs, such as frozen parameters and buffers: they don't
            count. The operator's own parameters never do.

    Raises:
        TypeError: the loss is not a tensor, or the parameters aren't.
        ValueError: no batches, no parameters, or a loss that is not a finite scalar that depends on them.
        GraphTooLargeError: the graphs would exceed ``memory_limit``.
        CurvatureError: a gradient is sparse, or autograd can't build its graph.
        SecondDerivativeError: from the constructor or from a product, where an operation has no second
            derivative.

    Attributes:
        functions: names of the classes of `torch.autograd.Function` in the loss's graph, without PyTorch's own.

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

    functions: tuple[str, ...]

    def __init__(
        self,
        loss: Loss,
        parameters: Parameters,
        batches: Iterable[Any],
        *,
        keep_graphs: bool = True,
        memory_limit: int | None = None,
        resident: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(ParameterBlock(parameters))
        self._memory_limit = memory_limit
        self._resident = [*self.block.tensors, *resident]
        listed = as_batches(batches)
        self._random = RandomState(p.device for p in self.block.tensors)
        self._graphs: list[_GradientGraph] = []
        self._rerun = None if keep_graphs else (loss, listed)
        with differentiable():
            mean, functions = Mean(self.block), set[str]()
            for index, batch in enumerate(listed):
                evaluation, gradients = self._evaluate(loss, batch, index)
                mean.add(evaluation, gradients)
                functions.update(own_functions(evaluation.loss))
                if keep_graphs:
                    self._graphs.append(_graph(gradients))
                del evaluation, gradients  # before the next batch needs the memory
            self._describe(mean)
        self.functions = tuple(sorted(functions))
        self._memory_limit = None  # what fitted once isn't weighed again in every product
        self._fractions = mean.fractions
        self._within: frozenset[int] | None = None

    def _evaluate(self, loss: Loss, batch: Any, index: int) -> tuple[Evaluation, list[Tensor | None]]:
        evaluation = evaluate(loss, (batch,), index)
        if self._memory_limit is not None:
            graph = graph_bytes([evaluation.loss], self._resident)
            needed = self.graph_bytes() + int((SECOND_ORDER_GROWTH + WORKING_GROWTH) * graph)
            if needed > self._memory_limit:
                raise GraphTooLargeError(needed, self._memory_limit)
        return evaluation, differentiate(evaluation.loss, self.block, index, create_graph=True)

    def replay(self) -> AbstractContextManager[None]:
        """Inside, the random number generators start where they did for this operator's graphs."""
        return self._random.replay()

    def graph_bytes(self) -> int:
        """Memory of the graphs that are kept now."""
        return graph_bytes([g for graph in self._graphs for g in graph.gradients], self._resident)

    def compare_routes(self, rows: int) -> bool:
        """Times products with ``rows`` vectors at once against one after the other, for `at_once`.

        At once means one backward pass that is vectorised over the rows (`torch.vmap`): fewer and larger kernels, but not
        of every operation. On one CPU thread two rows took 0.98, 1.17, 1.17 and 1.37 times as long at once (an MLP, a
        ResNet-20, a GPT and an LSTM), eight rows 1.01, 1.86, 1.18 and 1.31 times; where launching kernels is what costs it
        is another matter. So it is measured and never assumed. Takes three products of either kind and waits for the device.

        Returns:
            Whether products at once were faster, and the same to rounding.
        """
        V = torch.randn(rows, self.size, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        before = self.at_once, self.products
        try:
            self.at_once = False
            apart, reference = _timed(lambda: self.matmat(V), self.device)
            self.at_once = True
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of operations that vmap takes row by row: the clock tells that
                together, found = _timed(lambda: self.matmat(V), self.device)
        except (RuntimeError, NotImplementedError):  # vmap knows no random operations, and not every other one
            return False
        finally:
            self.at_once, self.products = before
        error = float((found - reference).norm() / reference.norm().clamp_min(torch.finfo(self.dtype).tiny))
        return together < apart and error <= 10 * self.noise

    def _matmat(self, V: Tensor) -> Tensor:
        products: Tensor | None = None
        with nullcontext() if self._rerun is None else self._random.replay():
            for index, fraction in enumerate(self._fractions):
                share = self._batch_products(index, V)
                if len(self._fractions) == 1:
                    return share
                products = share.mul_(fraction) if products is None else products.add_(share, alpha=fraction)
        assert products is not None  # there is at least one batch
        return products

    def _batch_products(self, index: int, V: Tensor) -> Tensor:
        """One batch's share; a graph that is built anew is gone when this returns."""
        if self._rerun is None:
            graph = self._graphs[index]
        else:
            loss, batches = self._rerun
            graph = _graph(self._evaluate(loss, batches[index], index)[1])
        if self.at_once and V.shape[0] > 1:
            columns = self._differentiate(graph, [part.unflatten(1, p.shape).to(p) for part, p in self._parts(V)], True)
            filled = [
                V.new_zeros(V.shape[0], p.numel()) if column is None else column.reshape(V.shape[0], -1).to(V)
                for column, p in zip(columns, self.block.tensors, strict=True)
            ]
            return torch.cat(filled, dim=1)
        rows = [self.block.flatten(self._differentiate(graph, self.block.split(v), False)) for v in V]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

    def _parts(self, V: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(V.split(self.block.sizes, dim=1), self.block.tensors, strict=True)

    def _differentiate(self, graph: _GradientGraph, parts: list[Tensor], at_once: bool) -> list[Tensor | None]:
        """The gradient of <gradient, v> for the v in ``parts``, or for a stack of them."""
        # a gradient without a graph is constant: the loss is linear in that parameter
        pairs = [pair for pair in zip(graph.places, graph.gradients, strict=True) if self._covers(pair[0])]
        places = [i for i, _ in pairs]
        curved = [(g, parts[i]) for i, g in pairs if g.requires_grad]
        columns: list[Tensor | None] = [None] * len(self.block.tensors)
        if curved:
            found = torch.autograd.grad(
                [g for g, _ in curved],
                [self.block.tensors[i] for i in places],
                [part for _, part in curved],
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=at_once,
            )
            for i, column in zip(places, found, strict=True):
                columns[i] = column
        return columns

    def _covers(self, place: int) -> bool:
        return self._within is None or place in self._within

    @contextmanager
    def within(self, places: Iterable[int]) -> Iterator[None]:
        """See `CurvatureOperator.within`: nothing is differentiated by the other parameters, nor back to them."""
        before, self._within = self._within, frozenset(places)
        try:
            yield
        finally:
            self._within = before

    def release(self) -> None:
        """Drops the gradient graphs and the activations that they hold; no product is possible afterwards."""
        super().release()
        self._graphs = []
        self._rerun = None
        self._resident = []


def _graph(gradients: list[Tensor | None]) -> _GradientGraph:
    pairs = [(i, g) for i, g in enumerate(gradients) if g is not None]
    return _GradientGraph([i for i, _ in pairs], [g for _, g in pairs])


def _timed(take: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of the faster of two products after one that isn't timed, and the last product."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        product = take()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]), product
