"""State that lives in plain Python attributes: of the user's modules, of torchmetrics, of the Trainer.

An attribute is bound back to the object that it held; lists, dicts, sets and deques get their contents back; tensors and
arrays, which can be written to in place, are stood in for by copies inside; generators are set back.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_rmt.live.fence.enclosure import TORCH_OWN, Enclosure

_CONSTANT = (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type)

# How far to look: containers up to this size are searched for tensors and further containers (larger ones still get
# their own items back), to this depth; larger tensors than this stay where they are.
_SEARCHED_ITEMS = 1000
_DEPTH = 6
_COPIED_BYTES = 2**26


def metrics(enclosure: Enclosure, undo: ExitStack) -> None:
    """The states of torchmetrics: tensors that are updated in place, lists that are appended to, and their counters.

    Recognised by what they have, since torchmetrics may not be installed. Their lists hold whole epochs of predictions,
    which nobody changes in place: the lists get their contents back and no prediction is copied.
    """
    walk = _Walk(enclosure, undo, depth=0)
    for module in enclosure.modules:
        if _is_metric(module):
            walk.namespace(module.__dict__)


def _is_metric(module: nn.Module) -> bool:
    return {"_defaults", "_update_count", "_reductions"} <= module.__dict__.keys()


def attributes(enclosure: Enclosure, undo: ExitStack) -> None:
    """The attributes of every other module, and of plain objects in them whose class is the user's or the model's own."""
    of_model = {_package(m) for m in enclosure.modules} - _FRAMEWORKS
    walk = _Walk(enclosure, undo, depth=_DEPTH, own=lambda package: package in of_model or _is_users(package))
    for module in enclosure.modules:
        if not _is_metric(module):
            walk.namespace(module.__dict__)


_FRAMEWORKS = {"torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "lightning_fabric"}


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


@cache
def _is_users(package: str) -> bool:
    """Whether this is the user's code rather than a library's: not installed, not Python's, not ours.

    The objects of libraries (a connection to a tracking service, an environment) are no state of the model.
    """
    if (package in sys.stdlib_module_names and package != "__main__") or package == "lightning_rmt":
        return False
    origin = getattr(sys.modules.get(package), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(Path(origin).parts)


def trainer_state(enclosure: Enclosure, undo: ExitStack) -> None:
    """What a step can set from afar: `trainer.should_stop`, a learning rate, a scheduler; and what was last logged."""
    trainer = enclosure.trainer
    if trainer is None:
        return
    walk = _Walk(enclosure, undo, depth=1)
    walk.namespace(trainer.__dict__)
    connector = getattr(trainer, "_logger_connector", None)
    if connector is not None:
        walk.namespace(connector.__dict__)
    for optimizer in getattr(trainer, "optimizers", ()):
        for group in optimizer.param_groups:
            walk.namespace(group, skip=frozenset({"params"}))
    for config in getattr(trainer, "lr_scheduler_configs", ()):
        if hasattr(config.scheduler, "__dict__"):
            walk.namespace(config.scheduler.__dict__)


class _Walk:
    """Visits what hangs on a namespace, once each, and puts the means to restore it on the stack.

    Args:
        enclosure: where the copies of tensors are kept.
        undo: where the restorations go.
        depth: how many containers deep to look for tensors and containers; 0 looks at the attributes alone.
        own: whether the plain objects of a top-level package are looked into.
    """

    def __init__(
        self, enclosure: Enclosure, undo: ExitStack, depth: int, own: Callable[[str], bool] = lambda package: False
    ) -> None:
        self._enclosure = enclosure
        self._undo = undo
        self._depth = depth
        self._own = own
        self._seen: dict[int, tuple[Any, Any]] = {}  # by id: the object, kept alive, and what stands in for it

    def namespace(self, names: dict[str, Any], skip: frozenset[str] = TORCH_OWN, depth: int | None = None) -> None:
        """Guard the attributes in a `__dict__`: new ones are dropped, the others hold again what they held."""
        kept = {name: value for name, value in names.items() if name not in skip}
        self._undo.callback(_restore_namespace, names, kept, skip)
        depth = self._depth if depth is None else depth
        for name, value in kept.items():
            if not isinstance(value, _CONSTANT):
                inside = self._inside(value, depth)
                if inside is not value:
                    names[name] = inside

    def _inside(self, value: Any, depth: int) -> Any:
        """What stands in for the value inside the fence: itself, or for tensors and arrays a copy."""
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_make")):  # a named one
            items = [item if isinstance(item, _CONSTANT) else self._inside(item, depth - 1) for item in value]
            same = all(item is old for item, old in zip(items, value, strict=True))
            return value if same else getattr(value, "_make", tuple)(items)
        inside = value
        self._seen[id(value)] = (value, value)
        if isinstance(value, Tensor):
            inside = self._tensor(value)
        elif isinstance(value, np.ndarray):
            inside = value.copy() if value.nbytes <= _COPIED_BYTES else value
        elif isinstance(value, (list, deque)):
            self._sequence(value, depth)
        elif isinstance(value, dict):
            self._dict(value, depth)
        elif isinstance(value, set):
            self._undo.callback(_restore_set, value, set(value))
        elif (restore := _generator_restorer(value)) is not None:
            self._undo.callback(restore)
        elif depth > 0 and self._is_own(value):
            self.namespace(getattr(value, "__dict__", {}), skip=frozenset(), depth=depth - 1)
            self._slots(value, depth - 1)
        self._seen[id(value)] = (value, inside)
        return inside

    def _tensor(self, tensor: Tensor) -> Tensor:
        # A parameter, or anything that leads to one, has to stay what the loss is differentiated by.
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            return tensor
        known = id(tensor) in self._enclosure.copies
        if not known and tensor.numel() * tensor.element_size() > _COPIED_BYTES:
            return tensor
        return self._enclosure.copy_of(tensor)

    def _sequence(self, sequence: list[Any] | deque[Any], depth: int) -> None:
        kept = list(sequence)
        self._undo.callback(_restore_sequence, sequence, kept)
        for place, item in self._to_search(enumerate(kept), len(kept), depth):
            inside = self._inside(item, depth - 1)
            if inside is not item:
                sequence[place] = inside

    def _dict(self, mapping: dict[Any, Any], depth: int) -> None:
        kept = dict(mapping)
        self._undo.callback(_restore_dict, mapping, kept)
        for key, item in self._to_search(kept.items(), len(kept), depth):
            inside = self._inside(item, depth - 1)
            if inside is not item:
                mapping[key] = inside

    def _slots(self, value: Any, depth: int) -> None:
        names = _slot_names(value.__class__)
        kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
        self._undo.callback(_restore_slots, value, names, kept)
        for name, item in kept.items():
            inside = item if isinstance(item, _CONSTANT) else self._inside(item, depth)
            if inside is not item:
                object.__setattr__(value, name, inside)

    def _to_search(self, items: Iterable[tuple[Any, Any]], count: int, depth: int) -> Iterable[tuple[Any, Any]]:
        if depth <= 0 or count > _SEARCHED_ITEMS:
            return ()
        return ((place, item) for place, item in items if not isinstance(item, _CONSTANT))

    def _is_own(self, value: Any) -> bool:
        """Whether this is a plain object of the user's code, say a running average; a module is guarded by itself."""
        return bool(
            not isinstance(value, (nn.Module, torch.optim.Optimizer))
            and not isinstance(value, type)
            and (isinstance(getattr(value, "__dict__", None), dict) or _slot_names(value.__class__))
            and self._own(_package(value))
        )


def _generator_restorer(value: Any) -> Callable[[], Any] | None:
    """For a random generator that the user keeps: what sets it back to its present state."""
    if isinstance(value, torch.Generator):
        torch_state = value.get_state()
        return lambda: value.set_state(torch_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        bits_state = bits.state
        return lambda: setattr(bits, "state", bits_state)
    if isinstance(value, np.random.RandomState):
        legacy_state = value.get_state()
        return lambda: value.set_state(legacy_state)
    if isinstance(value, random.Random):
        python_state = value.getstate()
        return lambda: value.setstate(python_state)
    return None


@cache
def _slot_names(kind: Any) -> tuple[str, ...]:
    """The attributes that a class keeps in ``__slots__``, its bases' included, as they are looked up."""
    names = []
    for owner in kind.__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{owner.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _restore_slots(value: Any, names: tuple[str, ...], kept: dict[str, Any]) -> None:
    for name in names:
        if name in kept:
            object.__setattr__(value, name, kept[name])
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _restore_namespace(names: dict[str, Any], kept: dict[str, Any], skip: frozenset[str]) -> None:
    for name in [name for name in names if name not in kept and name not in skip]:
        del names[name]
    names.update(kept)


# Untouched containers are not written to: a user's subclass may do more than store.


def _restore_sequence(sequence: list[Any] | deque[Any], kept: list[Any]) -> None:
    if len(sequence) == len(kept) and all(now is then for now, then in zip(sequence, kept, strict=True)):
        return
    sequence.clear()
    sequence.extend(kept)


def _restore_dict(mapping: dict[Any, Any], kept: dict[Any, Any]) -> None:
    same_keys = len(mapping) == len(kept) and all(now is then for now, then in zip(mapping, kept, strict=True))
    if same_keys and all(mapping[key] is item for key, item in kept.items()):
        return
    mapping.clear()
    mapping.update(kept)


def _restore_set(members: set[Any], kept: set[Any]) -> None:
    if members != kept:
        members.clear()
        members.update(kept)
