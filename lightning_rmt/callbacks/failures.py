"""What becomes of a monitor whose probes fail: a warning for each reason, and an end after several in a row."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_rmt.krylov.collectives import OtherRankFailedError
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.training import current_step
from lightning_rmt.report.once import Once

#: Failures in a row after which a monitor turns itself off.
MOST_IN_A_ROW = 3


class Failures:
    """Counts a monitor's failures, and warns of each reason once.

    Args:
        name: of the monitor.
        on_error: ``"raise"``: a failure to write is raised, as is a training that can't be watched.
        off: no probe is to be taken from the outset.

    Attributes:
        in_a_row: probes that failed since the last that didn't.
        off: whether no further probe is to be taken.
    """

    def __init__(self, name: str, on_error: str, *, off: bool = False) -> None:
        self._name, self._raises = name, on_error == "raise"
        self._once = Once()
        self.in_a_row = 0
        self.off = off

    def probe_failed(self, trainer: Any, error: Exception, remedy: str | None) -> None:
        """Warns; turns the monitor off after repeated failures, and says so.

        Args:
            trainer: the Trainer.
            error: why.
            remedy: what the next probe will do about it.
        """
        self.in_a_row += 1
        self.off = self.in_a_row >= MOST_IN_A_ROW
        ending = f". That was failure {self.in_a_row} in a row: the monitor is off now" if self.off else ""
        reason = f"{type(error).__name__}: {error}"
        if remedy:
            reason = f"{reason}; {remedy}"
        new = self._once.is_new(reason)
        whose = trainer.is_global_zero or not isinstance(error, OtherRankFailedError)  # the other rank's log says why
        if whose and (new or self.off):
            warnings.warn(
                f"SpectrumMonitor {self._name!r} could not take its probe after step {current_step(trainer)}, the training "
                f"is unaffected: {reason}{ending}",
                stacklevel=4,
            )

    def too_early(self, trainer: Any, reason: str) -> None:
        """Says that a probe was passed over: no failure."""
        if self._once.is_new(reason) and trainer.is_global_zero:
            warnings.warn(
                f"SpectrumMonitor {self._name!r} skips its probe after step {current_step(trainer)}: {reason} (said once)",
                stacklevel=4,
            )

    def write_failed(self, step: int, error: Exception) -> None:
        """A failure to write is this rank's alone, and never turns the probes off.

        Raises:
            Exception: that very error, with ``on_error="raise"``.
        """
        if self._raises:
            raise error
        reason = f"{type(error).__name__}: {error}"
        if self._once.is_new(f"writing: {reason}"):
            warnings.warn(
                f"SpectrumMonitor {self._name!r} could not write its reading of step {step}, the training is unaffected: "
                f"{reason} (said once)",
                stacklevel=5,
            )

    def under_join(self, trainer: Any) -> None:
        """Turns the monitor off, without a word to other ranks: some may have run out of batches.

        Raises:
            MisconfigurationException: with ``on_error="raise"``.
        """
        self.off = True
        words = (
            f"SpectrumMonitor {self._name!r} is off: this training is in torch's Join context, where a rank that has run "
            "out of batches answers DDP's collectives only, not those of a probe. Give every rank as many batches "
            "(a DistributedSampler does) to watch it"
        )
        if self._raises:
            raise MisconfigurationException(words)
        if trainer.is_global_zero:
            warnings.warn(words, stacklevel=4)
