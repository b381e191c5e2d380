"""A value as it is now, to be put back later: tensors, dictionaries and lists stay the objects that they are."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: What nobody changes in place, or what is no state.
_LEFT_ALONE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    type,
    nn.Module,
    torch.optim.Optimizer,
)


def keep(value: Any) -> Callable[[], Any]:
    """Copies a value.

    Args:
        value: numbers, tensors, any object; dictionaries, lists and tuples of them.

    Returns:
        A function that gives back the value as it was, as often as it is called. Tensors, dictionaries and lists are filled,
        not replaced, since others may hold on to them; other objects are copied.
    """
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if isinstance(value, dict):
        items = {key: keep(item) for key, item in value.items()}

        def restore_items() -> dict[Any, Any]:
            restored = {key: item() for key, item in items.items()}
            value.clear()
            value.update(restored)
            return value

        return restore_items
    if isinstance(value, (list, tuple)):
        return _keep_sequence(value)
    if isinstance(value, torch.Generator):
        drawn = value.get_state()
        return lambda: value.set_state(drawn)
    if isinstance(value, _LEFT_ALONE) or inspect.isroutine(value):
        return lambda: value
    try:
        saved = copy.deepcopy(value)
        copy.deepcopy(saved)
    except Exception as error:
        warnings.warn(
            f"a {type(value).__name__} in the optimizer's state can't be copied ({error}): a step that is undone leaves it "
            "as the step made it",
            RuntimeWarning,
            stacklevel=2,
        )
        return lambda: value
    return lambda: copy.deepcopy(saved)


def _keep_tensor(value: Tensor) -> Callable[[], Tensor]:
    saved = value.detach().clone()
    # the tensor itself may be transposed or resized in place
    shape, dtype, device, layout = value.shape, value.dtype, value.device, value.layout

    @torch.no_grad()
    def restore() -> Tensor:
        if (value.shape, value.dtype, value.device, value.layout) != (shape, dtype, device, layout):
            return saved.clone()
        value.copy_(saved)
        return value

    return restore


def _keep_sequence(value: list[Any] | tuple[Any, ...]) -> Callable[[], Any]:
    parts = [keep(item) for item in value]

    def restore() -> Any:
        restored = [part() for part in parts]
        if isinstance(value, list):
            value[:] = restored
            return value
        return type(value)(*restored) if hasattr(value, "_fields") else tuple(restored)

    return restore
