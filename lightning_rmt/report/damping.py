"""What a damping controller saw, to whatever loggers the Trainer has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning_rmt.optim.report import DampingReport
from lightning_rmt.report.destinations import each, is_rank_zero, is_tensorboard, say, write
from lightning_rmt.report.once import Once


def damping_scalars(report: DampingReport, name: str, clipped: bool | None = None) -> dict[str, float]:
    """Every number of a report by its tag; what wasn't measured is left out.

    Args:
        report: what was seen in one step.
        name: prefix of the tags.
        clipped: whether the gradient was clipped in that step.
    """
    parts = f"{name}/damping_control"
    found = {
        f"{name}/damping": report.damping,
        f"{name}/effective_damping": report.effective,
        f"{parts}/suggested": report.suggested,
        f"{parts}/heldout_ratio": report.ratio,
        f"{parts}/own_ratio": report.own_ratio,
        f"{parts}/reach": report.reach,
        f"{parts}/reduction": report.reduction,
        f"{parts}/rejections": float(report.rejections),
        f"{parts}/products": float(report.products),
        f"{parts}/clipped": None if clipped is None else float(clipped),
    }
    return {tag: float(value) for tag, value in found.items() if value is not None and math.isfinite(value)}


class DampingReports:
    """Feeds reports to loggers of either Lightning namespace; one per callback. A refusal is said once.

    Args:
        name: prefix of the tags.
        said: what was said before, as `said` gave it.
    """

    def __init__(self, name: str, said: Iterable[str] = ()) -> None:
        self._name = name
        self._once = Once(said)

    @property
    def said(self) -> list[str]:
        """What needn't be said again; plain strings, for a checkpoint."""
        return self._once.said

    def log(self, loggers: Iterable[Any], report: DampingReport, step: int, clipped: bool | None = None) -> None:
        """Writes one report; only rank 0 does anything.

        Raises:
            Exception: what the first failing logger raised, after the others have had theirs.
        """
        if is_rank_zero():
            self._write(loggers, damping_scalars(report, self._name, clipped), _sentence(report), step)

    def note(self, loggers: Iterable[Any], sentence: str, step: int) -> None:
        """Writes a sentence, once; only rank 0 does anything."""
        if is_rank_zero():
            self._write(loggers, {}, sentence, step)

    def _write(self, loggers: Iterable[Any], values: dict[str, float], sentence: str | None, step: int) -> None:
        tag = f"{self._name}/damping_control/notes"
        loggers = list(loggers)
        new = sentence is not None and self._once.is_new(sentence, tag)
        texts = {tag: sentence} if new and sentence is not None else {}
        if texts and not (loggers and all(map(is_tensorboard, loggers))):
            say(f"{tag}, step {step}: {sentence}")
        each(loggers, lambda logger: write(logger, values, texts, step))


def _sentence(report: DampingReport) -> str | None:
    """What there is to say about a step, in words; None where the numbers say all."""
    if report.undone > 1:
        return (
            "the losses of successive batches rose, each time by too little for the guard: training went back to where they "
            "were lowest and the damping was raised"
        )
    if report.rejected:
        return "the step raised its own batch's loss too far: it was undone and the damping raised"
    return report.refused
