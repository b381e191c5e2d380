"""One step of an optimizer: the direction that it took, what the curvature along it is, and how to undo it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.errors import CurvatureError, is_out_of_memory
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.curvature.randomness import RandomState
from lightning_rmt.optim.errors import NoCalibrationError
from lightning_rmt.optim.snapshot import Snapshot, optimizer_parameters
from lightning_rmt.optim.targets import Target

#: Returns a mean loss as a scalar tensor with its graph; runs no backward pass.
LossFunction: TypeAlias = Callable[[], Tensor]


class Direction(NamedTuple):
    """Where a step went.

    Attributes:
        unit: flat unit vector.
        length: of the step as it was applied.
        rate_one: length of the step with the learning rates divided out.
        slope: gradient along the unit vector; negative downhill.
    """

    unit: Tensor
    length: float
    rate_one: float
    slope: float


class TakenStep:
    """Made before a step, asked after it.

    Args:
        optimizer: that takes the step.
        target: says which parameter groups the damping is for; the direction is theirs.
        undo: also remember the optimizer's state, so that `undo` is possible.
        buffers: tensors that the loss functions change, such as running statistics; they are put back after each call.
    """

    def __init__(self, optimizer: Optimizer, target: Target, *, undo: bool, buffers: Iterable[Tensor] = ()) -> None:
        self._optimizer = optimizer
        self._places = _places(optimizer, target)
        self.before = Snapshot(optimizer, state=undo)
        self.buffers = list(buffers)
        self._gradients: list[Tensor | None] | None = None

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return optimizer_parameters(self._optimizer)[0].device

    def keep_gradients(self) -> None:
        """Remembers the gradients as they are now. Later calls change nothing."""
        if self._gradients is None:
            parameters = optimizer_parameters(self._optimizer)
            self._gradients = [None if p.grad is None else p.grad.detach().clone() for p in parameters]

    def direction(self) -> Direction:
        """The direction from before to where the weights are now.

        Raises:
            NoCalibrationError: the gradients are missing, sparse or not finite, a learning rate is 0, or nothing moved.
        """
        self.keep_gradients()
        assert self._gradients is not None
        parameters = optimizer_parameters(self._optimizer)
        block = self._block(parameters)
        gradients = [self._gradients[i] for i in self._places]
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise NoCalibrationError("a gradient is sparse: the damping is left as it is (sparse=False makes it dense)")
        if all(g is None for g in gradients):
            raise NoCalibrationError(
                "no parameter that the damping is for has a gradient: call this after backward() and before zero_grad()"
            )
        steps: list[Tensor | None] = []
        scaled: list[Tensor | None] = []
        for i, rate in self._places.items():
            if rate == 0:
                raise NoCalibrationError("a learning rate is 0: there is no step to judge")
            step = parameters[i].detach() - self.before.weights[i]
            steps.append(step)
            scaled.append(step / rate)
        applied, flat = block.flatten(steps), block.flatten(scaled)
        gradient = block.flatten(gradients)
        rate_one = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if not bool(torch.isfinite(gradient).all()):
            raise NoCalibrationError("the gradient isn't finite")
        if rate_one == 0:
            raise NoCalibrationError("the step changed no weight")
        if not math.isfinite(rate_one):
            return Direction(flat, rate_one, rate_one, math.nan)
        unit = flat / rate_one
        length = float(torch.linalg.vector_norm(applied, dtype=torch.float64))
        return Direction(unit, length, rate_one, float(gradient.double() @ unit.double()))

    def curvature(self, loss: LossFunction, unit: Tensor) -> float:
        """``u'H u`` of this loss at the weights before the step: one product.

        Raises:
            NoCalibrationError: there is no such number; the reason is that of the curvature operator.
        """
        parameters = optimizer_parameters(self._optimizer)
        block = self._block(parameters)
        with self.at_start(), self.aside():
            try:
                with Hessian(lambda _: loss(), block.tensors, [None]) as hessian:
                    return float(unit.double() @ hessian.matvec(unit).double())
            except (CurvatureError, ValueError, torch.OutOfMemoryError, MemoryError) as error:
                what = "memory ran out" if is_out_of_memory(error) else str(error)
                raise NoCalibrationError(f"the curvature along the step can't be had: {what}") from error

    def value(self, loss: LossFunction) -> float:
        """The loss at the weights as they are now."""
        # gradients on: a loss may take some itself, as a physics-informed one does
        with self.aside(), torch.inference_mode(False), torch.enable_grad():
            return float(loss().detach())

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the weights are those before the step."""
        parameters = optimizer_parameters(self._optimizer)
        after = [p.detach().clone() for p in parameters]
        _fill(parameters, self.before.weights)
        try:
            yield
        finally:
            _fill(parameters, after)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, random numbers and the buffers may change; on leaving they are what they were."""
        kept = [buffer.detach().clone() for buffer in self.buffers]
        devices = {p.device for p in optimizer_parameters(self._optimizer)}
        try:
            with RandomState(devices).replay():
                yield
        finally:
            _fill(self.buffers, kept)

    def undo(self) -> None:
        """Puts weights, optimizer state and, where they were kept, gradients back to before the step."""
        self.before.restore()
        if self._gradients is None:
            return
        for p, gradient in zip(optimizer_parameters(self._optimizer), self._gradients, strict=True):
            if gradient is None or p.grad is None or p.grad.layout != torch.strided:
                p.grad = None if gradient is None else gradient.clone()
            else:
                _fill([p.grad], [gradient])

    def _block(self, parameters: list[Tensor]) -> ParameterBlock:
        return ParameterBlock([parameters[i] for i in self._places])


def check_parameters(optimizer: Optimizer, target: Target) -> None:
    """Whether there is something to train in the groups that the damping is for.

    Raises:
        ValueError: there isn't.
    """
    if not _places(optimizer, target):
        raise ValueError(
            "every parameter in the groups that this damping is for is frozen (requires_grad=False): unfreeze one, or "
            "attach the controller to another optimizer"
        )


def _places(optimizer: Optimizer, target: Target) -> dict[int, float]:
    """Positions of the trainable parameters that the damping is for, with their learning rates."""
    rates = {id(p): float(group.get("lr", 1.0)) for group in target.groups(optimizer) for p in group["params"]}
    parameters = enumerate(optimizer_parameters(optimizer))
    return {i: rates[id(p)] for i, p in parameters if id(p) in rates and p.requires_grad}


@torch.no_grad()
def _fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
