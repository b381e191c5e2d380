"""Nothing that a step reports from inside the fence gets out: logs, prints, loggers, profiler."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning_rmt.live.fence.enclosure import Enclosure

# What a step may read from a logger without writing to it, for instance to build a path.
_READABLE = frozenset({"name", "version", "save_dir", "log_dir", "root_dir", "group_separator"})


def logging(enclosure: Enclosure, undo: ExitStack) -> None:
    """Silence `self.log`, `self.log_dict`, `self.print`, the Trainer's loggers and its profiler.

    A `self.log` in a step that runs within another hook would be filed under that hook, as a second result, and with
    `sync_dist` it would enter a collective.
    """
    for module in enclosure.modules:
        if hasattr(module, "_current_fx_name"):  # a LightningModule, of either namespace
            for name in ("log", "log_dict", "print"):
                _replace(module, name, _nothing, undo)
            _replace(module, "_current_fx_name", "training_step", undo)
    trainer = enclosure.trainer
    if isinstance(getattr(trainer, "_loggers", None), list):
        _replace(trainer, "_loggers", [SilentLogger(logger) for logger in trainer._loggers], undo)
    if getattr(trainer, "profiler", None) is not None:
        _replace(trainer, "profiler", Silent(), undo)


class Silent:
    """Whatever is asked of it, or called on it, it answers with itself and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols (pickling, copying, arrays) have to see that there is nothing here
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:  # noqa: D102
        return self

    def __getitem__(self, key: Any) -> Silent:
        return self

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: Any) -> None: ...


class SilentLogger(Silent):
    """A logger that can be asked for its name and its directories, and writes nothing.

    It passes for the class of the logger it stands in for: code such as `if isinstance(logger, TensorBoardLogger)` takes
    the same way as in training.
    """

    def __init__(self, logger: Any) -> None:
        self.__dict__["_logger"] = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.__dict__["_logger"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_logger"], name) if name in _READABLE else super().__getattr__(name)

    def __getitem__(self, key: Any) -> SilentLogger:
        return self  # `self.logger[0].experiment`

    def __setattr__(self, name: str, value: Any) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _replace(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute of the instance, and afterwards what was there, or nothing."""
    namespace = owner.__dict__  # not setattr: the class's own property or nn.Module's may stand in the way
    if name in namespace:
        undo.callback(namespace.__setitem__, name, namespace[name])
    else:
        undo.callback(namespace.pop, name, None)
    namespace[name] = value
