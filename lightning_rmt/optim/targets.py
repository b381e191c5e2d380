"""Where an optimizer keeps its damping: a key of its parameter groups, a pair of functions, or nowhere (it calls us)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

#: The names that optimizers have for it, in the order in which they are looked for. ``eps`` isn't among them: in most
#: optimizers it guards a division and is no damping.
KEYS = ("damping", "delta", "rho", "mu")
#: What a library that calls its damping gets before anything was measured: the usual default of K-FAC.
UNKNOWN = 1e-3

#: A key, ``(get, set)``, ``"call"`` where a library calls the controller, None for the first of `KEYS` that is found.
TargetArgument: TypeAlias = "str | tuple[Callable[[], float], Callable[[float], Any]] | None"


class Target(ABC):
    """A damping that can be read and set.

    Attributes:
        ratios: factor of each place where the damping is kept to the largest; a write keeps them.
    """

    ratios: tuple[float, ...] = (1.0,)

    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """What is there now, place by place."""

    @abstractmethod
    def write(self, damping: float) -> None:
        """Sets the largest to ``damping`` and the others in proportion."""

    def expected(self, damping: float) -> tuple[float, ...]:
        """What `values` gives after ``write(damping)``."""
        return tuple(damping * ratio for ratio in self.ratios)

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The parameter groups that the damping is for."""
        return optimizer.param_groups


class GroupTarget(Target):
    """A key of the parameter groups.

    Args:
        optimizer: its groups are read anew each time: ``load_state_dict`` replaces them.
        key: groups without it are left alone.
    """

    def __init__(self, optimizer: Optimizer, key: str) -> None:
        self._optimizer = optimizer
        self.key = key
        values = self.values()
        if not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"param_groups[...][{key!r}] must be a finite number of at least 0, got {values}")
        largest = max(values)
        self.ratios = tuple(value / largest for value in values) if largest > 0 else (1.0,) * len(values)

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The groups that have the key."""
        return [group for group in optimizer.param_groups if self.key in group]

    def values(self) -> tuple[float, ...]:
        """One value per group that has the key."""
        return tuple(_number(group[self.key], self.key) for group in self.groups(self._optimizer))

    def write(self, damping: float) -> None:
        """See `Target.write`; a tensor is filled, not replaced, since compiled steps hold on to it."""
        for group, value in zip(self.groups(self._optimizer), self.expected(damping), strict=True):
            if isinstance(group[self.key], Tensor):
                group[self.key].fill_(value)
            else:
                group[self.key] = value


class FunctionTarget(Target):
    """A pair of functions.

    Args:
        get: returns the damping.
        put: sets it.
    """

    def __init__(self, get: Callable[[], float], put: Callable[[float], Any]) -> None:
        self._get, self._put = get, put

    def values(self) -> tuple[float, ...]:
        """What ``get`` returns."""
        return (_number(self._get(), "the damping that get() returned"),)

    def write(self, damping: float) -> None:
        """Calls ``put``."""
        self._put(damping)


class CalledTarget(Target):
    """A damping that is kept nowhere else: a library calls the controller for it."""

    def __init__(self) -> None:
        self._damping = UNKNOWN

    def values(self) -> tuple[float, ...]:
        """What was written last."""
        return (self._damping,)

    def write(self, damping: float) -> None:
        """Remembers it."""
        self._damping = damping


def find_target(optimizer: Optimizer, target: TargetArgument) -> Target:
    """The target that the argument means for this optimizer.

    Raises:
        TypeError: it is neither a key nor a pair of functions.
        ValueError: the optimizer has no such key; or it is None, and none of the known names is there.
    """
    present = {key for group in optimizer.param_groups for key in group}
    name = type(optimizer).__name__
    numbers = ", ".join(sorted(present - {"params"}))
    if target is None:
        for key in KEYS:
            if key in present:
                return GroupTarget(optimizer, key)
        raise ValueError(
            f"{name} has no damping under a name that is known ({', '.join(KEYS)}); its parameter groups have {numbers}. "
            "Pass target= with one of these, with (get, set) functions, or 'call' where a library takes damping=controller"
        )
    if target == "call":
        return CalledTarget()
    if isinstance(target, str):
        if target not in present:
            raise ValueError(f"no parameter group of {name} has a {target!r}; they have {numbers}")
        return GroupTarget(optimizer, target)
    if isinstance(target, tuple) and len(target) == 2 and all(callable(function) for function in target):
        return FunctionTarget(*target)
    raise TypeError(f"target is a key of param_groups, a pair of functions (get, set), 'call' or None, got {target!r}")


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number to be controlled, got {value!r}") from error
