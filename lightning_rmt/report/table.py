"""A run's readings as a table of text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rmt.reading import Reading
from lightning_rmt.report.wording import number, with_error
from lightning_rmt.spectra.spectrum import Spectrum


def summary_table(readings: Sequence[Reading]) -> str:
    """One line a reading, columns aligned, no trailing newline.

    Eigenvalues, trace and edges are in the operator's units. ``~`` before lambda_max or lambda_min: not converged.
    Outliers are above/below the bulk: ``9`` is a clear count, ``9?`` a likely one, ``>=9`` a lower bound, ``-`` none given.
    A light reading fills in what it certified.
    """
    header = ("step", "lambda_max", "lambda_min", "trace", "outliers", "bulk edges", "seconds", "products")
    rows = [header, *(_row(reading) for reading in readings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(reading: Reading) -> tuple[str, ...]:
    spectrum = reading.spectrum
    ends = (spectrum.lambda_max, spectrum.lambda_min)
    if reading.light:
        shown = [with_error(level.value, level.residual) if level.certified else "" for level in ends]
        whole = ["light", "", ""]
    else:
        shown = [("" if spectrum.converged(level) else "~") + with_error(level.value, level.residual) for level in ends]
        trace = with_error(spectrum.trace.mean, spectrum.trace.stderr)
        whole = [trace, f"{_count(spectrum, 'high')} / {_count(spectrum, 'low')}", _edges(spectrum)]
    return (
        str(reading.step),
        *shown,
        *whole,
        number(reading.seconds, 2),
        str(spectrum.products),
    )


def _count(spectrum: Spectrum, side: str) -> str:
    found = getattr(spectrum.outliers, side)
    if found.count is None:
        return "-"
    likely = found.count > 0 and found.kind == "gap" and found.confidence < 2
    return f"{'>=' if found.at_least else ''}{found.count}{'?' if likely else ''}"


def _edges(spectrum: Spectrum) -> str:
    edges = (spectrum.bulk_edges.low, spectrum.bulk_edges.high)
    return " .. ".join("-" if edge is None else number(edge) for edge in edges)
