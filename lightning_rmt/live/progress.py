"""A probe that takes long shows in the progress bar that the user already has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DELAY_SECONDS = 1.0  # shorter probes don't flash up


@contextmanager
def probe_progress(trainer: Any, name: str, products: int) -> Iterator[Callable[[int], None] | None]:
    """Opens a bar next to the Trainer's own one, gone when the probe is done.

    Args:
        trainer: the Trainer; without an enabled progress bar on this rank there is none for the probe.
        name: the monitor's name.
        products: how many products the probe takes at most.

    Yields:
        A function to call with the number of products done, or None.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or bar.is_disabled:
        yield None
        return
    description = f"{name}: measuring the curvature"
    rich = getattr(bar, "progress", None)
    if rich is not None:
        # Lightning finds its own tasks by their position, so one that was added may be hidden but never removed.
        known = [task.id for task in rich.tasks if task.description == description]
        task = known[0] if known else rich.add_task(description, total=products)
        rich.reset(task, total=products, visible=True)
        try:
            yield lambda done: rich.update(task, completed=done)
        finally:
            rich.update(task, visible=False)
        return
    from tqdm.auto import tqdm

    with tqdm(total=products, desc=description, unit="product", leave=False, delay=DELAY_SECONDS, position=1) as line:
        yield lambda done: line.update(done - line.n)
