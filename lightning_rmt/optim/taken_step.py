"""One step of an optimizer: the direction that it took, what the curvature along it is, and how to undo it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.errors import CurvatureError, is_out_of_memory
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.curvature.randomness import RandomState
from lightning_rmt.optim.errors import NoCalibrationError
from lightning_rmt.optim.snapshot import Snapshot, momentum_buffers, optimizer_parameters
from lightning_rmt.optim.targets import Target

#: Relative difference up to which a step and a momentum buffer are the same.
SAME_STEP = 0.02
#: Returns a mean loss as a scalar tensor with its graph; runs no backward pass.
LossFunction: TypeAlias = Callable[[], Tensor]
#: Makes a context.
Surroundings: TypeAlias = Callable[[], AbstractContextManager[None]]


class Direction(NamedTuple):
    """Where a step went.

    Attributes:
        unit: flat unit vector.
        length: of what it is the direction of.
        slope: gradient along the unit vector; negative downhill.
        pure: whether momentum of earlier steps is out of it, or there was none.
    """

    unit: Tensor
    length: float
    slope: float
    pure: bool


class TakenStep:
    """Made before a step, asked after it.

    Args:
        optimizer: that takes the step.
        target: says which parameter groups the damping is for; the direction is theirs.
        undo: also remember the optimizer's state, so that `undo` is possible.
        buffers: tensors that the loss functions change, such as running statistics; they are put back after each call.
        surroundings: makes a context in which the loss functions are called and differentiated.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target: Target,
        *,
        undo: bool,
        buffers: Iterable[Tensor] = (),
        surroundings: Surroundings = nullcontext,
    ) -> None:
        self._optimizer = optimizer
        self._rates = _per_parameter(optimizer, target, "lr", 1.0)
        self._decay = _per_parameter(optimizer, target, "momentum", 0.0)
        self.before = Snapshot(optimizer, state=undo)
        self.buffers = list(buffers)
        self._surroundings = surroundings
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

    def applied(self) -> Direction:
        """From the weights before to the weights now.

        Raises:
            NoCalibrationError: the gradients are missing, sparse or not finite, or nothing moved.
        """
        return self._direction(self._moves(), pure=False)

    def proposed(self) -> Direction:
        """What the damped curvature made of this gradient: the step for a learning rate of one, without earlier momentum.

        A step with momentum is mostly earlier ones, with other gradients on other batches; how long it is says little about
        the damping. Heavy-ball momentum is taken out where the weights show that the step is minus the learning rate times
        the buffer: what remains is ``buffer - momentum * earlier buffer``. Of any other the applied step is taken.

        Raises:
            NoCalibrationError: as `applied`, or a learning rate is 0.
        """
        if any(rate == 0 for rate in self._rates.values()):
            raise NoCalibrationError("a learning rate is 0: there is no step to judge")
        after = momentum_buffers(self._optimizer)
        moves, pure = self._moves(), True
        for i, rate in self._rates.items():
            move, now, earlier = moves[i] / rate, after[i], self.before.momenta[i]
            if earlier is not None and now is not None:
                if _near(-now, move):
                    move = self._decay[i] * earlier - now
                else:
                    pure = False
            moves[i] = move
        return self._direction(moves, pure)

    def _moves(self) -> dict[int, Tensor]:
        parameters = optimizer_parameters(self._optimizer)
        return {i: parameters[i].detach() - self.before.weights[i] for i in self._rates}

    def _direction(self, moves: dict[int, Tensor], pure: bool) -> Direction:
        self.keep_gradients()
        assert self._gradients is not None
        gradients = [self._gradients[i] for i in self._rates]
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise NoCalibrationError("a gradient is sparse: the damping is left as it is (sparse=False makes it dense)")
        if all(g is None for g in gradients):
            raise NoCalibrationError(
                "no parameter that the damping is for has a gradient: call this after backward() and before zero_grad()"
            )
        block = self._block()
        flat, gradient = block.flatten(list(moves.values())), block.flatten(gradients)
        if not bool(torch.isfinite(gradient).all()):
            raise NoCalibrationError("the gradient isn't finite")
        length = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if length == 0:
            raise NoCalibrationError("the step changed no weight")
        if not math.isfinite(length):
            return Direction(flat, length, math.nan, pure)
        unit = flat / length
        return Direction(unit, length, float(gradient.double() @ unit.double()), pure)

    def curvature(self, loss: LossFunction, unit: Tensor) -> float:
        """``u'H u`` of this loss at the weights before the step: one product.

        Raises:
            NoCalibrationError: there is no such number; the reason is that of the curvature operator.
        """
        block = self._block()
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
            with RandomState(devices).replay(), self._surroundings():
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

    def _block(self) -> ParameterBlock:
        parameters = optimizer_parameters(self._optimizer)
        return ParameterBlock([parameters[i] for i in self._rates])


def check_parameters(optimizer: Optimizer, target: Target) -> None:
    """Whether there is something to train in the groups that the damping is for.

    Raises:
        ValueError: there isn't.
    """
    if not _per_parameter(optimizer, target, "lr", 1.0):
        raise ValueError(
            "every parameter in the groups that this damping is for is frozen (requires_grad=False): unfreeze one, or "
            "attach the controller to another optimizer"
        )


def _per_parameter(optimizer: Optimizer, target: Target, key: str, default: float) -> dict[int, float]:
    """A number of its group for every trainable parameter that the damping is for, by position."""
    numbers = {id(p): float(group.get(key, default)) for group in target.groups(optimizer) for p in group["params"]}
    parameters = enumerate(optimizer_parameters(optimizer))
    return {i: numbers[id(p)] for i, p in parameters if id(p) in numbers and p.requires_grad}


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether they agree as far as a step can be read off rounded weights."""
    return bool((one - other).norm() <= SAME_STEP * other.norm())


@torch.no_grad()
def _fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
