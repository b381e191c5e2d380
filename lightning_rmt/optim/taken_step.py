"""One step of an optimizer: the direction that it took, what the curvature along it is, and how to undo it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rmt.curvature.errors import CurvatureError, is_out_of_memory
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.curvature.randomness import RandomState
from lightning_rmt.optim.base_step import decoupled_decay
from lightning_rmt.optim.errors import NoCalibrationError, NoMoveError
from lightning_rmt.optim.momentum import without_momentum
from lightning_rmt.optim.outside_state import OutsideState
from lightning_rmt.optim.owner import BaseOwner
from lightning_rmt.optim.snapshot import Snapshot, optimizer_parameters
from lightning_rmt.optim.targets import Target

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
        outside: what the optimizer keeps elsewhere.
        buffers: tensors that the loss functions change, such as running statistics; they are put back after each call.
        surroundings: makes a context in which the loss functions are called and differentiated.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target: Target,
        *,
        undo: bool,
        outside: OutsideState,
        buffers: Iterable[Tensor] = (),
        surroundings: Surroundings = nullcontext,
    ) -> None:
        self._optimizer = optimizer
        self._outside = outside
        # a step may change its own learning rate, or count in its group
        self._options = _per_parameter(optimizer, target)
        self.before = Snapshot(optimizer, state=undo)
        self._restore_outside = outside.keep() if undo else None
        self._random = RandomState(p.device for p in optimizer_parameters(optimizer)) if undo else None
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

    @property
    def reach(self) -> float:
        """The length ``lr / (1 - momentum)`` that heavy-ball momentum moves the weights by for one gradient, at least 1.

        A ratio is for a step of length one. With momentum 0.9 and a learning rate of 0.3 a gradient is taken three times
        over, and what one batch makes of noisy curvature with it. A learning rate that makes steps shorter isn't counted:
        where it was, it drove the damping to 0.
        """
        reaches = []
        for options in self._options.values():
            momentum = float(options.get("momentum") or 0.0)
            left = 1 - float(options.get("dampening") or 0.0) if momentum else 1.0
            reaches.append(_rate(options) * left / (1 - momentum) if 0 <= momentum < 1 else 1.0)
        return max(1.0, *reaches)

    @property
    def repeatable(self) -> bool:
        """Whether the gradients are without a graph: a step through theirs (``create_graph=True``) can be taken once."""
        return all(p.grad is None or p.grad.grad_fn is None for p in optimizer_parameters(self._optimizer))

    def applied(self) -> Direction:
        """From the weights before to the weights now.

        Raises:
            NoCalibrationError: the gradients are missing, sparse or not finite, or nothing moved.
        """
        return self._direction(self._moves(), pure=False)

    def proposed(self) -> Direction:
        """What the damped curvature made of this gradient: the step for a learning rate of one, without earlier momentum.

        A step with momentum is mostly earlier ones, with other gradients on other batches; how long it is says little about
        the damping. It is taken out where it can be, see `without_momentum`, and so is decoupled weight decay, which no
        damping has a say in.

        Raises:
            NoCalibrationError: as `applied`, or a learning rate is 0.
        """
        rates = {i: _rate(options) for i, options in self._options.items()}
        if any(rate == 0 for rate in rates.values()):
            raise NoCalibrationError("a learning rate is 0: there is no step to judge")
        self.keep_gradients()
        assert self._gradients is not None
        base = self._optimizer.base if isinstance(self._optimizer, BaseOwner) else self._optimizer
        parameters, moves, pure = optimizer_parameters(self._optimizer), self._moves(), True
        for i, options in self._options.items():
            # a decay of parameters without gradients is none
            decay = decoupled_decay(base, options) if self._gradients[i] is not None and "lr" in options else 0.0
            move = (moves[i] + decay * self.before.weights[i]) / rates[i]
            entry = self._optimizer.state.get(parameters[i], {})
            earlier = self.before.momenta[i]
            moves[i], alone = without_momentum(move, self._gradients[i], earlier, entry, options)
            pure = pure and alone
        return self._direction(moves, pure)

    def _moves(self) -> dict[int, Tensor]:
        parameters = optimizer_parameters(self._optimizer)
        return {i: parameters[i].detach() - self.before.weights[i] for i in self._options}

    def check_gradients(self) -> None:
        """Whether a step with these gradients can be judged.

        Raises:
            NoCalibrationError: they are missing, sparse or not finite.
        """
        self.keep_gradients()
        assert self._gradients is not None
        gradients = [self._gradients[i] for i in self._options]
        if any(g is not None and g.layout != torch.strided for g in gradients):
            raise NoCalibrationError("a gradient is sparse: the damping is left as it is (sparse=False makes it dense)")
        if all(g is None for g in gradients):
            raise NoCalibrationError(
                "no parameter that the damping is for has a gradient: call this after backward() and before zero_grad()"
            )
        if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            raise NoCalibrationError("the gradient isn't finite")

    def _direction(self, moves: dict[int, Tensor], pure: bool) -> Direction:
        self.check_gradients()
        assert self._gradients is not None
        try:
            block = self._block()
        except ValueError as error:
            raise NoCalibrationError(str(error)) from error
        flat, gradient = block.flatten(list(moves.values())), block.flatten([self._gradients[i] for i in self._options])
        length = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
        if length == 0:
            raise NoMoveError("the step changed no weight")
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
        """Inside, random numbers, the buffers and the outside state may change; on leaving they are what they were."""
        kept = [buffer.detach().clone() for buffer in self.buffers]
        devices = {p.device for p in optimizer_parameters(self._optimizer)}
        try:
            with self._outside.unchanged(), RandomState(devices).replay(), self._surroundings():
                yield
        finally:
            _fill(self.buffers, kept)

    def undo(self) -> None:
        """Puts back all that was before the step: weights, state, random numbers and, where they were kept, gradients."""
        self.before.restore()
        if self._restore_outside is not None:
            self._restore_outside()
        if self._random is not None:
            self._random.restore()
        if self._gradients is None:
            return
        for p, gradient in zip(optimizer_parameters(self._optimizer), self._gradients, strict=True):
            if gradient is None or p.grad is None or p.grad.layout != torch.strided:
                p.grad = None if gradient is None else gradient.clone()
            else:
                _fill([p.grad], [gradient])

    def rewind(self) -> None:
        """Puts back weights and state of a step that others have followed; random numbers, learning rates and data go on."""
        self.before.restore(options=False)
        if self._restore_outside is not None:
            self._restore_outside()

    def _block(self) -> ParameterBlock:
        parameters = optimizer_parameters(self._optimizer)
        return ParameterBlock([parameters[i] for i in self._options])


def check_parameters(optimizer: Optimizer, target: Target, *, whole: bool) -> None:
    """Whether there is something to train in the groups that the damping is for.

    Args:
        optimizer: whose.
        target: which groups.
        whole: whether sharded parameters are refused too.

    Raises:
        ValueError: there isn't, or a parameter is sharded.
    """
    if not _per_parameter(optimizer, target):
        raise ValueError(
            "every parameter in the groups that this damping is for is frozen (requires_grad=False): unfreeze one, or "
            "attach the controller to another optimizer"
        )
    # DTensors are FSDP2's, flat parameters FSDP1's
    if whole and any(
        hasattr(p, "_local_tensor") or getattr(p, "_is_flat_param", False) for p in optimizer_parameters(optimizer)
    ):
        raise ValueError(
            "the optimizer's parameters are sharded (FSDP): the controller needs whole weights and gradients, as under DDP "
            "or on one device. With mode='log' it only says that it can't measure"
        )


def _per_parameter(optimizer: Optimizer, target: Target) -> dict[int, dict[str, Any]]:
    """The options of its group for every trainable parameter that the damping is for, by position."""
    found = {
        id(p): {name: value for name, value in group.items() if name != "params"}
        for group in target.groups(optimizer)
        for p in group["params"]
    }
    parameters = enumerate(optimizer_parameters(optimizer))
    return {i: found[id(p)] for i, p in parameters if id(p) in found and p.requires_grad}


def _rate(options: dict[str, Any]) -> float:
    return float(options.get("lr", 1.0))


@torch.no_grad()
def _fill(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
