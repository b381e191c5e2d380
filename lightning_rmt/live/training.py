"""What the monitor asks of the Trainer: where it is, how long it goes on, where it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import SubsetRandomSampler

from lightning_rmt.live.namespaces import timer_classes
from lightning_rmt.optim.diagonal_metric import plain_limit


def current_step(trainer: Any) -> int:
    """The loggers' step axis, as LearningRateMonitor uses it: batches after which an optimizer stepped."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def on_last_batch_of_fast_dev_run(trainer: Any) -> bool:
    """A fast_dev_run may be too short for several batches; it probes with those that it has."""
    return bool(trainer.fast_dev_run) and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def total_steps(trainer: Any) -> float:
    """Steps of the whole training; infinity where neither max_epochs nor max_steps says so."""
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        return math.inf
    return float(trainer.estimated_stepping_batches)


def dataset_size(trainer: Any) -> float:
    """Samples that the training draws from; infinity where nobody knows (a stream, several loaders)."""
    try:
        loader = trainer.train_dataloader
        if loader.batch_size is None:  # it counts whole batches
            return math.inf
        sampler = getattr(loader, "sampler", None)
        if getattr(sampler, "replacement", False):  # whatever was drawn may come again
            return math.inf
        size = float(len(sampler if isinstance(sampler, SubsetRandomSampler) else loader.dataset))
        if trainer.overfit_batches:  # the same few batches in every epoch
            size = min(size, float(trainer.num_training_batches * loader.batch_size * trainer.world_size))
        return size
    except (AttributeError, TypeError, NotImplementedError):
        return math.inf


def takes_all_data(trainer: Any) -> bool:
    """Whether every step sees all of the training data, as far as anybody knows."""
    batches = trainer.num_training_batches
    if batches > trainer.accumulate_grad_batches or math.isinf(size := dataset_size(trainer)):
        return False
    return bool(batches * trainer.train_dataloader.batch_size * trainer.world_size >= size)


def seconds_left(trainer: Any) -> float:
    """Until the training is stopped by ``max_time``; infinity without one. Lightning keeps that limit in a callback."""
    left = [callback.time_remaining() for callback in trainer.callbacks if isinstance(callback, timer_classes())]
    return min((float(seconds) for seconds in left if seconds is not None), default=math.inf)


def log_directory(trainer: Any) -> str:
    """The run's own directory. Several runs share a logger's ``save_dir``, so there the one that ModelCheckpoint takes."""
    for logger in trainer.loggers:
        if (directory := getattr(logger, "log_dir", None)) is not None:
            return str(directory)
        if (directory := getattr(logger, "save_dir", None)) is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return str(Path(directory, str(logger.name), version))
    return str(trainer.default_root_dir)


def learning_rate(trainer: Any) -> float | None:
    """The largest one over all parameter groups of all optimizers; None where no group has one."""
    rates = [float(g["lr"]) for optimizer in trainer.optimizers for g in optimizer.param_groups if "lr" in g]
    return max(rates, default=None)


def sharpness_limit(trainer: Any, module: Any, names: Sequence[str]) -> float | None:
    """Of the learning rate times lambda_max of these parameters, for their optimizers; see `plain_limit`."""
    wanted = set(names)
    return plain_limit(trainer.optimizers, (p for name, p in module.named_parameters() if name in wanted))
