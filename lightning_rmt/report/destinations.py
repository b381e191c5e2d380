"""Where a number or a sentence can go: loggers of either Lightning namespace, known by what they can do, and the console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only


def write(logger: Any, values: Mapping[str, float], texts: Mapping[str, str], step: int) -> None:
    """Scalars to any logger, texts to TensorBoard; each by its tag."""
    if values:
        logger.log_metrics({tag_for(tag, logger): value for tag, value in values.items()}, step=step)
    if is_tensorboard(logger):
        for tag, text in texts.items():
            logger.experiment.add_text(tag_for(tag, logger), text, step)


def is_tensorboard(logger: Any) -> bool:
    """Whether it writes TensorBoard's event files."""
    return callable(getattr(experiment(logger), "add_histogram_raw", None))


def experiment(logger: Any) -> Any:
    """What a logger writes with, None for one that has nothing."""
    return getattr(logger, "experiment", None)


def say(text: str) -> None:
    """On the console, once over all ranks."""
    if hasattr(rank_zero_only, "rank"):
        rank_zero_info(text)  # goes to the log that Lightning shows
    else:
        logging.getLogger(__name__).info(text)


def is_rank_zero() -> bool:
    """Whether this is the process that writes."""
    return getattr(rank_zero_only, "rank", None) in (None, 0)  # unset where no Lightning was imported: one process


def each(items: Iterable[Any], act: Callable[[Any], None]) -> None:
    """Acts on every item, and raises the first error only then: one failing logger doesn't silence the others."""
    first: Exception | None = None
    for item in items:
        try:
            act(item)
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def tag_for(tag: str, logger: Any) -> str:
    """The tag with the logger's own separator of groups."""
    return tag.replace("/", getattr(logger, "group_separator", "/"))
