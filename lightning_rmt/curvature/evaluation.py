"""Evaluating a loss so that it can be differentiated twice, and reading what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_rmt.curvature.batches import sample_count
from lightning_rmt.curvature.errors import REENTRANT, CurvatureError, SecondDerivativeError, explain
from lightning_rmt.curvature.graph_memory import graph_nodes
from lightning_rmt.curvature.kernels import twice_differentiable_kernels
from lightning_rmt.curvature.parameters import ParameterBlock

# loss(batch) -> the mean over the batch, or (mean, weight) where the sample count is not the right weight
Loss: TypeAlias = Callable[[Any], "Tensor | tuple[Tensor, Any]"]


class Evaluation(NamedTuple):
    """A loss at one batch, and what decides the batch's weight in the mean over batches.

    Attributes:
        loss: scalar, with its graph.
        count: the weight as the loss returned it, perhaps a tensor on the device, or the batch's sample
            count.
        place: position of the batch.
    """

    loss: Tensor
    count: Any
    place: int

    def weight(self) -> float:
        """The weight as a number; waits for the device where the loss returned a tensor.

        Raises:
            ValueError: it is not positive and finite.
        """
        weight = float(self.count)
        if not 0.0 < weight < float("inf"):
            raise ValueError(f"batch {self.place} has weight {weight}; it must be positive and finite")
        return weight


@contextmanager
def differentiable(*, twice: bool = True) -> Iterator[None]:
    """Modes that make a loss differentiable, in its forward pass and in a checkpoint's recomputation.

    Gradients on and inference mode off. Errors of autograd leave translated by `explain`.

    Args:
        twice: also keep to `twice_differentiable_kernels`; False leaves the model its own.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if twice:
            stack.enter_context(twice_differentiable_kernels())
        try:
            yield
        except RuntimeError as error:  # NotImplementedError is one
            explained = explain(error)
            if explained is None:
                raise
            raise explained from error


def as_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
        TypeError: one batch was given in place of an iterable of batches.
        ValueError: there are none.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches must be an iterable of batches, got one {type(batches).__name__}; write [batch]")
    listed = list(batches)
    if not listed:
        raise ValueError("no batches were given; curvature needs at least one (a generator is used up once)")
    return listed


def evaluate(loss: Callable[..., Any], arguments: tuple[Any, ...], index: int) -> Evaluation:
    """Calls ``loss(*arguments)``, inside `differentiable`, and checks that a scalar with a graph came back.

    Args:
        loss: returns the mean over the batch, or ``(mean, weight)``.
        arguments: what the loss is called with; the last one is the batch.
        index: position of the batch, for messages.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: it is not a scalar, or no parameter is in its graph.
    """
    torch.clear_autocast_cache()  # an enclosing autocast region keeps casts, which may be stale
    result = loss(*arguments)
    value, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(value, Tensor):
        raise TypeError(f"the loss must be a tensor or (tensor, weight), got {type(value).__name__} in batch {index}")
    if value.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar, got shape {tuple(value.shape)} in batch {index}; take the mean over the batch"
        )
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {index} has no graph: no parameter with requires_grad=True is in it, or it "
            "was computed under no_grad, detached, or turned into a number"
        )
    return Evaluation(value.reshape(()), sample_count(arguments[-1]) if weight is None else weight, index)


def differentiate(
    value: Tensor,
    block: ParameterBlock,
    index: int,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Gradients of a scalar, one per parameter: None for frozen ones and those it does not depend on.

    Args:
        value: the loss of batch ``index``.
        block: parameters; their ``.grad`` is not touched.
        index: position of the batch, for messages.
        create_graph: build the gradients' own graph.
        retain_graph: keep the loss's graph; None: as ``create_graph``.

    Raises:
        ValueError: every parameter is frozen, or the loss depends on none of them.
        CurvatureError: ``create_graph`` with a sparse gradient, or all of them are in reentrant activation checkpoints.
        SecondDerivativeError: ``create_graph`` with an autograd.Function whose backward can't be differentiated.
    """
    trainable = [i for i, p in enumerate(block.tensors) if p.requires_grad]
    if not trainable:
        raise ValueError("every parameter is frozen (requires_grad=False): there is nothing to differentiate by")
    with watched_functions(value) if create_graph else nullcontext(value) as watched:
        found = torch.autograd.grad(
            watched,
            [block.tensors[i] for i in trainable],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    if all(gradient is None for gradient in found):
        if any(type(node).__name__ == "CheckpointFunctionBackward" for node in graph_nodes([value])):
            raise CurvatureError(REENTRANT)  # which autograd would say only where it goes into the checkpoint
        raise ValueError(
            f"the loss of batch {index} depends on none of the parameters that were given: they are unused in it, or what "
            "they go into is detached or computed under no_grad. Give a loss that keeps the graph (SpectrumMonitor: "
            "loss_fn=), or other parameters (parameters=)"
        )
    gradients: list[Tensor | None] = [None] * len(block.tensors)
    for i, gradient in zip(trainable, found, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            if create_graph:
                raise CurvatureError(
                    f"parameter {block.names[i]!r} has a sparse gradient, which can't be differentiated again: "
                    "set `sparse = False` on its embedding while curvature is taken, or use "
                    "FiniteDifferenceHessian"
                )
            gradient = gradient.to_dense()
        gradients[i] = gradient
    return gradients


@contextmanager
def watched_functions(value: Tensor) -> Iterator[Tensor]:
    """Gives ``value`` to differentiate, and refuses functions whose second derivative autograd takes for zero, silently.

    Those marked ``@once_differentiable``: PyTorch puts the error for them off to a node that ``autograd.grad`` with
    ``inputs`` never reaches. And those whose backward hands the gradient to something that autograd doesn't follow (a kernel
    of their own, NumPy, ``no_grad``): a backward is linear in the gradient that arrives, so what it returns depends on
    whatever that depends on, unless it is zero. Where only what it saved is detached, that isn't seen here but by
    `check_second_derivatives`.
    """
    one: Tensor | None = None
    with ExitStack() as hooks:
        for node in graph_nodes([value]):
            function: Any = getattr(type(node), "_forward_cls", None)  # an autograd.Function written in Python
            if function is None:
                continue
            if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE_DIFFERENTIABLE:
                raise SecondDerivativeError(f"{function.__name__} (an autograd.Function marked @once_differentiable)")
            hooks.callback(node.register_hook(partial(_refuse_lost, function.__name__)).remove)
            one = torch.ones_like(
                value, requires_grad=True
            )  # so that no arriving gradient is a constant, as at the loss
        yield value if one is None else value * one


def own_functions(value: Tensor) -> set[str]:
    """Names of the classes of `torch.autograd.Function` in a loss's graph that aren't PyTorch's."""
    found: set[Any] = {getattr(type(node), "_forward_cls", None) for node in graph_nodes([value])} - {None}
    return {function.__name__ for function in found if function.__module__.partition(".")[0] != "torch"}


def _refuse_lost(name: str, returned: Sequence[Tensor | None], arrived: Sequence[Tensor | None]) -> None:
    """Called by autograd with what a function's backward returned for what arrived."""
    followed = [gradient.requires_grad for gradient in arrived if gradient is not None]
    lost = [gradient for gradient in returned if gradient is not None and not gradient.requires_grad]
    if followed and all(followed) and any(bool(gradient.any()) for gradient in lost):
        raise SecondDerivativeError(f"{name} (an autograd.Function whose backward leaves autograd)")


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__  # all its wrappers share their code


class Mean:
    """Weighted means over batches of the loss and of its gradient.

    Args:
        block: the parameters.

    Attributes:
        weights: of the batches so far.
        weighted_gradient: sum of the gradients times their weights, shape (size,).
        used: for each parameter, whether some batch's loss depends on it.
    """

    def __init__(self, block: ParameterBlock) -> None:
        self._block = block
        self._losses: list[Tensor] = []
        self.weighted_gradient = torch.zeros(block.size, dtype=block.dtype, device=block.device)
        self.weights: list[float] = []
        self.used = [False] * len(block.tensors)

    def add(self, evaluation: Evaluation, gradients: list[Tensor | None]) -> Tensor:
        """Adds one batch and returns its flat detached gradient, shape (size,)."""
        flat = self._block.flatten([None if g is None else g.detach() for g in gradients])
        weight = evaluation.weight()
        self.weighted_gradient.add_(flat, alpha=weight)
        self._losses.append(evaluation.loss.detach())
        self.weights.append(weight)
        self.used = [used or g is not None for used, g in zip(self.used, gradients, strict=True)]
        return flat

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return sum(self.weights)

    @property
    def fractions(self) -> list[float]:
        """The weights, summing to 1."""
        return [weight / self.total for weight in self.weights]

    @property
    def gradient(self) -> Tensor:
        """Weighted mean gradient, shape (size,)."""
        return self.weighted_gradient / self.total

    def loss(self) -> float:
        """Weighted mean loss; all losses move to the host together.

        Raises:
            ValueError: one is NaN or infinite; the message says which batch.
        """
        values = torch.stack([loss.double().to(self._losses[0].device) for loss in self._losses]).tolist()
        for index, value in enumerate(values):
            if not abs(value) < float("inf"):
                raise ValueError(f"the loss of batch {index} is {value}; its curvature means nothing")
        return float(sum(f * value for f, value in zip(self.fractions, values, strict=True)))
