"""What ranks do to each other: one that fails alone makes all of them stop, one that is gone ends the training."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class OtherRankFailedError(RuntimeError):
    """This rank was fine, but another one was not, so all of them skip the probe."""


class LostRankError(RuntimeError):
    """Another rank of the process group is gone or hangs: the training can't go on either."""


def clear_frames(error: BaseException | None) -> None:
    """Empties the frames that an exception and its causes keep: they hold graphs and activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def all_or_nobody(agree: Callable[[bool], bool], stage: Callable[[], T], what: str) -> T:
    """Runs what may fail on one process alone, before collectives that the others must not begin without it.

    Args:
        agree: whether a flag is set on every rank; a collective. ``bool`` for a single process.
        stage: what to run.
        what: what another rank lacks if it fails there.

    Raises:
        OtherRankFailedError: it worked here, but not everywhere.
        Exception: whatever the stage raised here.
    """
    try:
        result = stage()
    except LostRankError:  # nobody to agree with
        raise
    except Exception:
        agree(False)
        raise
    if not agree(True):
        raise OtherRankFailedError(f"another rank has no {what}. All ranks skip this probe")
    return result


@contextmanager
def collective() -> Iterator[None]:
    """Around a collective: its failure is said in words.

    Raises:
        LostRankError: the process group failed. It is no failure of the probe's, and skipping the probe would help nobody.
    """
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            "another rank is gone or doesn't answer (it was killed, ran out of memory, or is at another step), so this "
            "training can't go on: look for the first error in the other ranks' logs, and resume from the last checkpoint. "
            f"The process group says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
