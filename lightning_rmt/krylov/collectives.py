"""What ranks do to each other: one that fails alone makes all of them stop, one that is gone ends the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class OtherRankFailedError(RuntimeError):
    """This rank was fine, but another one was not, so all of them skip the probe."""


class LostRankError(RuntimeError):
    """Another rank of the process group is gone or hangs: the training can't go on either."""


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
