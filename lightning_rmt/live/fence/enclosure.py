"""What a fence encloses: every module that a training step can reach, and one copy of each tensor it may write to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# nn.Module's own bookkeeping: what else is in a module's `__dict__` is the user's
TORCH_OWN = frozenset(nn.Module().__dict__)


@dataclass(frozen=True)
class Enclosure:
    """The Trainer, the modules and the device of one fence.

    Attributes:
        trainer: the Trainer, or None.
        module: the LightningModule.
        modules: the module, its submodules, and modules that it hides from `modules()` in plain attributes.
        device: where it trains.
        seed: of the generators inside.
        autocast: whether to compute as the Trainer's precision plugin does.
        first_order: whether one derivative is all that is wanted.
        copies: by `id` of a tensor, the tensor and the copy that stands in for it inside, so that a tensor that two
            modules share is shared inside as well.
    """

    trainer: Any
    module: nn.Module
    modules: tuple[nn.Module, ...]
    device: torch.device
    seed: int
    autocast: bool
    first_order: bool = False
    copies: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The one tensor that stands in for this one inside the fence."""
        known = self.copies.get(id(tensor))
        if known is None:
            known = self.copies[id(tensor)] = (tensor, tensor.detach().clone())
        return known[1]

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter once, those of hidden modules included."""
        found = {id(p): p for m in self.modules for p in m._parameters.values() if p is not None}
        return list(found.values())


def enclose(trainer: Any, module: nn.Module, *, seed: int, autocast: bool, first_order: bool = False) -> Enclosure:
    """Find out what there is to guard."""
    modules: dict[int, nn.Module] = {}
    waiting: list[nn.Module] = [module]
    while waiting:
        for found in waiting.pop().modules():
            if id(found) not in modules:
                modules[id(found)] = found
                waiting.extend(_hidden_modules(found))
    return Enclosure(trainer, module, tuple(modules.values()), _device(trainer, module), seed, autocast, first_order)


def _hidden_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in plain attributes: `self.teacher = [network]` keeps a teacher out of `parameters()`."""
    for name, value in module.__dict__.items():
        if name in TORCH_OWN:
            continue
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if isinstance(item, nn.Module))


def _device(trainer: Any, module: nn.Module) -> torch.device:
    root = getattr(getattr(trainer, "strategy", None), "root_device", None)
    if isinstance(root, torch.device):
        return root
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device
