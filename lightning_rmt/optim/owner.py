"""An optimizer that owns another one and lets it take the steps."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch.optim import Optimizer

#: Hooks that are about the base's state: those registered on the owner are the base's.
_STATE_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class BaseOwner(Optimizer):
    """Shares the groups, the state and the checkpoints of its base, so that schedulers and trainers see one optimizer.

    Hooks on steps are each one's own; those on ``state_dict`` and ``load_state_dict`` are the base's, and called with it.

    Args:
        base_optimizer: the base; nothing of it is changed.

    Attributes:
        base: the base optimizer.

    Raises:
        TypeError: the base is no optimizer.
    """

    #: What a pickle holds besides what torch saves.
    pickled: ClassVar[tuple[str, ...]] = ("base",)

    base: Optimizer

    def __init__(self, base_optimizer: Optimizer) -> None:
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"the base must be a torch.optim.Optimizer, got {type(base_optimizer).__name__}")
        # torch's constructor would add the base's groups a second time: it gets an empty one, and they are shared below
        super().__init__([{"params": []}], {})
        self.base = base_optimizer
        self._share()

    def _share(self) -> None:
        def take_over(base: Optimizer) -> None:
            self.param_groups, self.state = base.param_groups, base.state

        self.defaults = self.base.defaults
        for name in _STATE_HOOKS:
            setattr(self, name, getattr(self.base, name))
        take_over(self.base)
        self.base.register_load_state_dict_post_hook(take_over)  # which replaces both

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base."""
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.pickled}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()


def requires_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` can't do without a closure, as LBFGS's."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
