"""A reading of Kronecker factors to whatever loggers the Trainer has: scalars by layer, and a verdict in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_rmt.local_law.kronecker import GAIN, KroneckerReading, MatrixReading
from lightning_rmt.report.destinations import each, is_rank_zero, say, write
from lightning_rmt.report.wording import number, with_error

MOST_NAMES = 8
_SIDES = ("left", "right")


def kronecker_scalars(reading: KroneckerReading) -> dict[str, float]:
    """Every number of the reading by tag, ``<name>/kronecker/<layer>/rotation_gain`` and so on.

    ``_stderr`` is one standard error; ``eigenvalue_bias_*`` is by what factor the smaller half of a factor's
    eigenvalues is too small by the local law, ``..._held_out`` as measured.
    """
    prefix = f"{reading.name}/kronecker"
    found: dict[str, float] = {f"{prefix}/not_finite_steps": float(reading.not_finite)}
    if (total := reading.rotation_gain) is not None:
        found |= {f"{prefix}/rotation_gain": total.mean, f"{prefix}/rotation_gain_stderr": total.stderr}
    for layer, matrix in reading.layers.items():
        found |= {f"{prefix}/{layer}/{tag}": value for tag, value in _matrix_scalars(matrix).items()}
    return found


def _matrix_scalars(matrix: MatrixReading) -> dict[str, float]:
    found = {"rotation_gain": matrix.rotation_gain.mean, "rotation_gain_stderr": matrix.rotation_gain.stderr}
    for name, side in zip(_SIDES, (matrix.left, matrix.right), strict=True):
        found[f"q_{name}"] = side.q
        found[f"effective_samples_{name}"] = side.effective_samples.mean
        found[f"effective_samples_{name}_stderr"] = side.effective_samples.stderr
        if side.bias is not None:
            found[f"eigenvalue_bias_{name}"] = side.bias
        if side.bias_held_out is not None:
            found[f"eigenvalue_bias_{name}_held_out"] = side.bias_held_out.mean
            found[f"eigenvalue_bias_{name}_held_out_stderr"] = side.bias_held_out.stderr
    return found


def kronecker_verdict(reading: KroneckerReading) -> str:
    """What the rotation gains mean for the choice of an optimizer, in a few sentences."""
    if not reading.layers:
        return "no weight matrix could be measured, so nothing is said about rotating optimizers"
    words = {"gains": [], "undecided": [], "gains nothing": []}  # type: dict[str, list[str]]
    by_gain = sorted(reading.layers, key=lambda layer: -reading.layers[layer].rotation_gain.mean)
    for layer in by_gain:
        words[reading.layers[layer].word].append(layer)
    total = reading.rotation_gain
    overall = "" if total is None else f" Over all of them the gain is {with_error(total.mean, total.stderr)}."
    limit = f"{GAIN:g}"
    if words["gains"]:
        head = (
            f"{len(words['gains'])} of {len(reading.layers)} weight matrices would gain from an optimizer that rotates to a "
            f"Kronecker eigenbasis, such as SOAP or Shampoo from a library: {_named(reading, words['gains'])}"
        )
    elif words["undecided"]:
        head = f"no weight matrix is sure to gain {limit} or more in a Kronecker eigenbasis, as SOAP and Shampoo use it"
    else:
        head = (
            f"no weight matrix gains {limit} or more in a Kronecker eigenbasis, as SOAP and Shampoo use it: Adam's "
            f"coordinates do; the largest gain is {_named(reading, by_gain[:1])}"
        )
    unsure = f"; undecided: {_named(reading, words['undecided'])}" if words["undecided"] else ""
    others = words["gains nothing"] if words["gains"] or words["undecided"] else []
    rest = f"; less than {limit}: {_named(reading, others)}" if others else ""
    tail = (
        " A gain is by how much smaller the constant in the regret bound is than Adam's, no speed-up of as much: at equal "
        "CPU time SOAP clearly beat AdamW on two of five small tasks, and on a third in test loss only; Muon is cheaper, "
        "and beat SOAP on one of the two."
    )
    return f"{head}{unsure}{rest}.{overall}{tail if words['gains'] else ''}"


def _named(reading: KroneckerReading, layers: list[str]) -> str:
    gains = {layer: reading.layers[layer].rotation_gain for layer in layers[:MOST_NAMES]}
    more = f" and {len(layers) - MOST_NAMES} more" if len(layers) > MOST_NAMES else ""
    return ", ".join(f"{layer} {with_error(gain.mean, gain.stderr)}" for layer, gain in gains.items()) + more


def kronecker_notes(reading: KroneckerReading) -> list[str]:
    """What wasn't measured and why, and what to know about the rest: a sentence each."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reading.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    notes = [f"{_listed(names)}: {reason}" for reason, names in by_reason.items()]
    for layer, matrix in reading.layers.items():
        for name, side in zip(_SIDES, (matrix.left, matrix.right), strict=True):
            if side.refusal:
                notes.append(f"{layer}/eigenvalue_bias_{name}: {side.refusal}")
    if reading.not_finite:
        notes.append(f"{reading.not_finite} steps with NaN or infinite gradients are left out")
    return [*notes, *reading.notes]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


class KroneckerReport:
    """Feeds readings to loggers of either Lightning namespace; one per callback.

    Every logger gets the scalars, TensorBoard the verdict and the notes as text, and the console a verdict that has
    other words for the layers than any before. A note is written once.

    Args:
        said: notes and words of before, as `said` gave them.
    """

    def __init__(self, said: Iterable[str] = ()) -> None:
        self._said = set(said)

    @property
    def said(self) -> list[str]:
        """What needn't be said again; plain strings, for a checkpoint."""
        return sorted(self._said)

    def log(self, loggers: Iterable[Any], reading: KroneckerReading) -> None:
        """Writes one reading; only rank 0 does anything.

        Raises:
            Exception: what the first failing logger raised, after the others have had theirs.
        """
        if not is_rank_zero():
            return
        verdict = kronecker_verdict(reading)
        notes = [note for note in kronecker_notes(reading) if self._is_new(note)]
        if self._is_new("; ".join(f"{layer} {matrix.word}" for layer, matrix in reading.layers.items())):
            lines = (verdict, *notes)
            say("\n".join(f"{reading.name}/kronecker, step {reading.step}: {line}" for line in lines))
        texts = {"verdict": verdict, **({"notes": "\n".join(f"- {note}" for note in notes)} if notes else {})}
        tagged = {f"{reading.name}/kronecker/{tag}": text for tag, text in texts.items()}
        each(loggers, lambda logger: write(logger, kronecker_scalars(reading), tagged, reading.step))

    def log_learning_rate(
        self, loggers: Iterable[Any], name: str, rate: float | None, sentence: str, step: int
    ) -> None:
        """Writes a suggestion for the learning rate, or why there is none; only rank 0 does anything.

        Raises:
            Exception: as `log`.
        """
        if not is_rank_zero():
            return
        text = f"suggested learning rate {number(rate)}: {sentence}" if rate is not None else sentence
        say(f"{name}/suggested_lr, step {step}: {text}")
        values = {} if rate is None else {f"{name}/suggested_lr": rate}
        each(loggers, lambda logger: write(logger, values, {f"{name}/suggested_lr_note": text}, step))

    def _is_new(self, sentence: str) -> bool:
        new = sentence not in self._said
        self._said.add(sentence)
        return new
