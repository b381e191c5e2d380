"""Which parameters' exact Hessian is taken for level statistics: what the user named, or the layers nearest to the loss."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_rmt.curvature.double_precision import Slice
from lightning_rmt.curvature.exact_block import nearest_layer
from lightning_rmt.curvature.parameters import select_parameters
from lightning_rmt.live.namespaces import MisconfigurationException

#: Levels of a block that is chosen automatically. 500 tell the GOE from Poisson by more than ten standard errors.
FEWEST_AUTO, MOST_AUTO = 256, 1024
#: What it may take, as a share of the rest of the probe.
TIME_SHARE = 0.5
#: A block must have this many levels to say anything, and is decomposed densely up to this many.
FEWEST, MOST = 50, 4096


@dataclass(frozen=True)
class LevelBlock:
    """A block by name and shape, without a reference to the module.

    Attributes:
        name: for tags.
        pieces: name of each parameter, and the shape of the leading piece that is taken of it.
        keep: how many of their coordinates, the first ones, the budget pays; None: not known yet, or all.
    """

    name: str
    pieces: tuple[tuple[str, tuple[int, ...]], ...]
    keep: int | None = None

    def slices(self, module: nn.Module) -> list[Slice]:
        """The block in terms of the live parameters."""
        named = dict(module.named_parameters(remove_duplicate=False))
        return [Slice(name, named[name], shape) for name, shape in self.pieces]

    def describe(self, slices: Sequence[Slice], keep: int) -> str:
        """Which parameters, in words."""
        size = sum(part.size for part in slices)
        count = f"{size} parameters" if keep == size else f"first {keep} of the {size} parameters"
        labels = [part.label for part in slices]
        listed = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
        return f"the {count} in {listed}"


def refuse_unusable_levels(module: Any, levels: Sequence[str] | str | None, parameters: Sequence[str] | None) -> None:
    """Refuses blocks that can't be had, before the first step.

    Raises:
        MisconfigurationException: a pattern matches no trainable parameter, or too few or too many for level statistics.
    """
    if levels is None or levels == "auto":
        return
    asked, names = f"SpectrumMonitor(levels={list(levels)})", set()
    for pattern in levels:
        try:
            block = named_block(module, pattern, parameters)
        except ValueError as error:
            if _frozen(module, pattern):  # a callback may unfreeze it later
                continue
            raise MisconfigurationException(f"{asked}: {error}") from error
        size = sum(part.size for part in block.slices(module))
        if not FEWEST <= size <= MOST:
            raise MisconfigurationException(
                f"{asked}: {pattern!r} holds {size} parameters. Level statistics need the exact Hessian of {FEWEST} to "
                f"{MOST}: name {'more' if size < FEWEST else 'fewer'} of them, or leave the choice to levels='auto'"
            )
        if block.name in names:
            raise MisconfigurationException(f"{asked}: two of them would be logged under one tag, {block.name!r}")
        names.add(block.name)


def _frozen(module: nn.Module, pattern: str) -> bool:
    found = [p for name, p in module.named_parameters(remove_duplicate=False) if _matches(name, pattern)]
    return bool(found) and not any(p.requires_grad for p in found)


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter is named, or the layer that it belongs to, perhaps far above."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def refuse_unusable_blocks(module: Any, blocks: Sequence[str] | None, parameters: Sequence[str] | None) -> None:
    """Refuses groups with a slip in their names, and two that would be logged under one tag.

    Raises:
        MisconfigurationException: a pattern matches no trainable parameter, or two make the same tag.
    """
    tags: dict[str, str] = {}
    for pattern in blocks or ():
        try:
            tag = named_block(module, pattern, parameters).name
        except ValueError as error:
            if _frozen(module, pattern):  # a callback may unfreeze it later
                continue
            raise MisconfigurationException(f"SpectrumMonitor(blocks={list(blocks or ())}): {error}") from error
        if tag in tags:
            raise MisconfigurationException(
                f"SpectrumMonitor(blocks={list(blocks or ())}): {tags[tag]!r} and {pattern!r} would both be logged as "
                f"{tag!r}"
            )
        tags[tag] = pattern


def named_block(module: nn.Module, pattern: str, parameters: Sequence[str] | None) -> LevelBlock:
    """The trainable parameters that match a pattern, or that belong to the layer of that name.

    Args:
        module: the LightningModule.
        pattern: shell pattern for parameter names, or the name of a submodule.
        parameters: patterns of the parameters that are looked at at all; None: all.

    Raises:
        ValueError: none matches.
    """
    trainable = select_parameters(module.named_parameters(), parameters)
    known = {id(p) for _, p in trainable}
    every_name = module.named_parameters(remove_duplicate=False)  # a tied weight goes by any of its names
    found: dict[int, tuple[str, Tensor]] = {
        id(p): (n, p) for n, p in every_name if id(p) in known and _matches(n, pattern)
    }
    chosen = list(found.values())
    if not chosen and _frozen(module, pattern):
        raise ValueError(f"{pattern!r} matches only frozen parameters (requires_grad=False)")
    if not chosen and parameters is not None and any(_matches(n, pattern) for n, _ in module.named_parameters()):
        raise ValueError(f"{pattern!r} is none of what parameters={list(parameters)} leaves to look at")
    if not chosen:
        chosen = select_parameters(trainable, [pattern])  # its message names what comes close
    return LevelBlock(_tag(pattern), tuple((name, tuple(p.shape)) for name, p in chosen))


def nearest_block(trainable: dict[str, Tensor], distances: dict[int, int]) -> LevelBlock | None:
    """The block that ``levels="auto"`` takes, or None where there are too few parameters.

    Args:
        trainable: parameters by name.
        distances: see `steps_to_loss`.
    """
    slices = nearest_layer(trainable, distances, fewest=FEWEST_AUTO, most=MOST_AUTO)
    if sum(part.size for part in slices) < FEWEST:
        return None
    layers = dict.fromkeys(part.name.rpartition(".")[0] or part.name for part in slices)
    return LevelBlock(_tag("+".join(layers)), tuple((part.name, part.shape) for part in slices))


def _tag(words: str) -> str:
    """The words with nothing in them that TensorBoard's tags can't hold."""
    return re.sub(r"[^-\w.+]+", "_", words).strip("_.") or "all"
