"""Which parameters an operator acts on, and how they lie in one flat vector."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor

Parameters: TypeAlias = "Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]"


class ParameterBlock:
    """The parameters of an operator as one flat vector of ``size`` entries.

    Every distinct tensor appears once, at its first place, so tied weights count once. A frozen parameter
    (``requires_grad=False``) keeps its place; its rows and columns of any curvature matrix are zero.

    Args:
        parameters: tensors, or (name, tensor) pairs as ``module.named_parameters()`` yields them, or a
            mapping.

    Attributes:
        names: one name per tensor; ``"0"``, ``"1"``, ... where none was given.
        tensors: the live tensors themselves.
        size: total number of entries.
        dtype: of flat vectors: float64 if any parameter is float64, else float32. Half precision parameters
            are cast at the border, since Lanczos vectors need more than their 8 to 11 bits.
        device: of flat vectors: that of the first parameter.

    Raises:
        TypeError: something in ``parameters`` is not a tensor.
        ValueError: there are no parameters, or one is complex or sharded (a DTensor).
    """

    def __init__(self, parameters: Parameters) -> None:
        distinct: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in _named(parameters):
            distinct.setdefault(id(tensor), (name, tensor))
        if not distinct:
            raise ValueError(
                "no parameters were given; pass for example model.parameters() (a generator is used up once)"
            )
        self.names: tuple[str, ...] = tuple(name for name, _ in distinct.values())
        self.tensors: tuple[Tensor, ...] = tuple(tensor for _, tensor in distinct.values())
        for name, tensor in zip(self.names, self.tensors, strict=True):
            if tensor.is_complex():
                raise ValueError(f"parameter {name!r} is complex; only real parameters are supported")
            if hasattr(tensor, "_local_tensor"):
                # autograd.grad calls a sharded parameter unused, which would read as a zero row
                raise ValueError(f"parameter {name!r} is sharded (DTensor); unshard the module first")
        self.sizes: tuple[int, ...] = tuple(tensor.numel() for tensor in self.tensors)
        self.size: int = sum(self.sizes)
        if self.size == 0:
            raise ValueError("the parameters have no entries")
        self.dtype: torch.dtype = (
            torch.float64 if any(t.dtype == torch.float64 for t in self.tensors) else torch.float32
        )
        self.device: torch.device = self.tensors[0].device

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cuts a flat vector of shape (size,) into a tensor per parameter, in its shape, dtype and device."""
        return [part.view(p.shape).to(p) for part, p in zip(flat.split(self.sizes), self.tensors, strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Joins a tensor (or None, for zeros) per parameter into a vector of shape (size,): a new one, or ``out``."""
        parts = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if tensor is None
            else tensor.reshape(-1).to(device=self.device, dtype=self.dtype)
            for size, tensor in zip(self.sizes, tensors, strict=True)
        ]
        return torch.cat(parts, out=out)


def select_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], globs: Sequence[str] | None = None
) -> list[tuple[str, Tensor]]:
    """Trainable parameters whose names match any of ``globs``, in their own order, each tensor once.

    Args:
        named_parameters: what ``module.named_parameters()`` yields.
        globs: shell patterns as in `fnmatch` (``"encoder.*"``, ``"*.weight"``; ``*`` also matches dots).
            None: all.

    Returns:
        (name, tensor) pairs; frozen parameters are left out.

    Raises:
        TypeError: ``globs`` is a single string.
        ValueError: a pattern matches no parameter or only frozen ones, or nothing is trainable.
    """
    if isinstance(globs, str):
        raise TypeError(f"parameter patterns must be a list of strings; write [{globs!r}]")
    named = list(named_parameters)
    names = [name for name, _ in named]
    for glob in () if globs is None else globs:
        matches = [p for name, p in named if fnmatchcase(name, glob)]
        if not matches:
            raise ValueError(f"the pattern {glob!r} matches no parameter; {_suggest(glob, names)}")
        if not any(p.requires_grad for p in matches):
            raise ValueError(f"the pattern {glob!r} matches only frozen parameters (requires_grad=False)")
    selected: dict[int, tuple[str, Tensor]] = {}
    for name, p in named:
        if p.requires_grad and (globs is None or any(fnmatchcase(name, glob) for glob in globs)):
            selected.setdefault(id(p), (name, p))
    if not selected:
        raise ValueError("no trainable parameters: all have requires_grad=False, or the list of patterns is empty")
    return list(selected.values())


def hooked_parameters(named_parameters: Parameters) -> tuple[str, ...]:
    """Names of the parameters with tensor hooks (``p.register_hook``).

    Such a hook fires in both passes of a double backward: one that halves the gradient makes the product a
    quarter of what it should be, and no error says so. Callers warn about them.
    """
    return tuple(name for name, p in _named(named_parameters) if getattr(p, "_backward_hooks", None))


def _named(parameters: Parameters) -> list[tuple[str, Tensor]]:
    if isinstance(parameters, Tensor):  # iterating a tensor would take its rows
        parameters = [parameters]
    items: Any = parameters.items() if isinstance(parameters, Mapping) else parameters
    if not isinstance(items, Iterable):
        raise TypeError(
            "parameters must be tensors, (name, tensor) pairs or a mapping, got "
            f"{type(parameters).__name__}; for a module pass module.named_parameters()"
        )
    named: list[tuple[str, Tensor]] = []
    for index, item in enumerate(items):
        pair = isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
        name, tensor = item if pair else (str(index), item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"parameter {name!r} is a {type(tensor).__name__}, not a tensor")
        named.append((name, tensor))
    return named


def _suggest(glob: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob, names, n=3, cutoff=0.5)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (f"close to it: {', '.join(close)}; " if close else "") + f"there are {len(names)}: {shown}"
