"""What an optimizer keeps outside ``param_groups`` and ``state``: in attributes, in a preconditioner beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rmt.optim.kept import keep
from lightning_rmt.optim.owner import BaseOwner

#: Part of every optimizer's ``state_dict``.
USUAL = ("state", "param_groups")
#: How deep attributes are searched for tensors that can't be put back.
DEPTH = 4


class OutsideState:
    """State that a snapshot of the optimizer doesn't see.

    What the optimizer's own ``state_dict`` has besides ``state`` and ``param_groups`` is found by itself, as in singd. Some
    libraries change such state in hooks of the model, and so with every loss that is evaluated.

    Args:
        optimizer: whose.
        sources: more of it: objects with ``state_dict`` and ``load_state_dict``, or pairs of functions ``(get, set)``.

    Raises:
        TypeError: a source is neither.
    """

    def __init__(self, optimizer: Optimizer, sources: Iterable[Any] = ()) -> None:
        self._optimizer = optimizer.base if isinstance(optimizer, BaseOwner) else optimizer
        self._sources = [_pair(source) for source in sources]
        if _own_part(self._optimizer):
            self._sources.append((lambda: _own_part(self._optimizer), self._load_own_part))
        self._looks = 2  # at what is there from the beginning, and at what the first step makes

    def keep(self) -> Callable[[], None]:
        """Copies it.

        Returns:
            A function that puts it back, as often as it is called.
        """
        saved = [(put, keep(get())) for get, put in self._sources]

        def restore() -> None:
            for put, value in saved:
                put(value())

        return restore

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, it may change; on leaving it is what it was."""
        restore = self.keep()
        try:
            yield
        finally:
            restore()

    def warn_of_hidden(self) -> None:
        """Warns where the optimizer's attributes hold tensors which nobody told us of: they can't be put back.

        To be called before and after the first step; says it once, and later calls do nothing.
        """
        if self._looks == 0:
            return
        self._looks -= 1
        known = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        known |= {id(tensor) for get, _ in self._sources for tensor in _tensors(get(), DEPTH)}
        usual = vars(Optimizer([nn.Parameter(torch.zeros(1))], {}))
        hidden = [
            name
            for name, value in vars(self._optimizer).items()
            if name not in usual and any(id(tensor) not in known for tensor in _tensors(value, DEPTH))
        ]
        if hidden:
            self._looks = 0
            warnings.warn(
                f"{type(self._optimizer).__name__} keeps tensors in {', '.join(hidden)} and not in its state_dict: a step "
                "that is undone, or taken again with another damping, leaves them changed. Unless each step makes them "
                "anew, pass attach(optimizer, state=[(get, set)]) with functions that read and set them, or an object that "
                "has a state_dict",
                RuntimeWarning,
                stacklevel=3,
            )

    def _load_own_part(self, part: dict[str, Any]) -> None:
        optimizer = self._optimizer
        groups, state = optimizer.param_groups, optimizer.state
        optimizer.load_state_dict({**optimizer.state_dict(), **part})
        # loading replaces these with copies; schedulers and owners hold on to the old ones
        optimizer.param_groups, optimizer.state = groups, state


def _own_part(optimizer: Optimizer) -> dict[str, Any]:
    if type(optimizer).state_dict is Optimizer.state_dict:
        return {}
    try:
        return {name: value for name, value in optimizer.state_dict().items() if name not in USUAL}
    except RuntimeError:  # a sharded one, whose state has to be collected first
        return {}


def _pair(source: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return source.state_dict, source.load_state_dict
    if isinstance(source, tuple) and len(source) == 2 and all(callable(function) for function in source):
        return source
    raise TypeError(
        "state is a list of objects with state_dict and load_state_dict, or of pairs of functions (get, set); "
        f"one of them is {source!r}"
    )


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth == 0 or isinstance(value, (nn.Module, Optimizer, type)) or callable(value):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors(item, depth - 1)
