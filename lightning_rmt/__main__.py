"""``python -m lightning_rmt plot RUN_DIRECTORY``: a run's spectra from its saved readings, with no Trainer and no torch."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning_rmt.reading import Reading
from lightning_rmt.report.files import load_run
from lightning_rmt.report.table import summary_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 where there is nothing to draw."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = load_run(options.run_directory)
    except FileNotFoundError as error:
        return _refuse(str(error))
    for warning in caught:  # for whoever typed the command: without a source file and a line of code
        print(f"python -m lightning_rmt: warning: {warning.message}", file=sys.stderr)
    if not run:
        return _refuse(
            f"no readings below {options.run_directory}: expected files <name>/step_<step>.npz, which SpectrumMonitor "
            "writes into the log directory of its run"
        )
    if options.name is not None:
        names, run = list(run), {key: value for key, value in run.items() if options.name in (key, value[0].name)}
        if not run:
            return _refuse(f"no monitor named {options.name!r} here; there are: {', '.join(names)}")
    output = options.output if options.output is not None else options.run_directory / "rmt_figures"
    for key, readings in run.items():
        print(f"{key}: {len(readings)} reading{'s' if len(readings) > 1 else ''}")
        print(summary_table(readings))
        try:
            paths = draw_run(readings, output / key, options.format, options.every)
        except OSError as error:
            return _refuse(f"the figures can't be written: {error}; --output chooses another folder")
        print("\n".join(f"wrote {path}" for path in paths), end="\n\n")
    return 0


def draw_run(readings: Sequence[Reading], folder: Path, file_format: str, every: int | None) -> list[Path]:
    """Draws one monitor's run into ``folder`` and returns the files: spectra, the pictures over time, the last outlier map.

    Args:
        readings: sorted by step, at least one.
        folder: made if missing.
        file_format: ``"png"``, ``"pdf"`` or ``"svg"``.
        every: draw the spectrum of every so many full readings besides the first and the last; None: about six in all.
    """
    from lightning_rmt.report.batch_law_figure import batch_law_figure
    from lightning_rmt.report.cumulant_figure import free_cumulant_figure
    from lightning_rmt.report.figures import heat_map_figure, outliers_over_time_figure, spectrum_figure
    from lightning_rmt.report.history import HistoryEntry

    history = [HistoryEntry.from_reading(reading) for reading in readings]
    full = [reading for reading in readings if not reading.light]
    every = every or -(-len(full) // 5) or 1
    chosen = sorted({*range(0, len(full), every), len(full) - 1}) if full else []
    figures = {f"spectrum_step_{full[i].step:08d}": spectrum_figure(full[i]) for i in chosen}
    if full:
        figures["spectrum_over_time"] = heat_map_figure(history)
        figures["free_cumulants"] = free_cumulant_figure(history)
    with_law = [reading for reading in full if reading.batch_law is not None]
    if with_law:
        figures["batch_law"] = batch_law_figure(with_law[-1])
    figures["eigenvalues_over_time"] = outliers_over_time_figure(history)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.{file_format}")
        figure.savefig(paths[-1], dpi=200)  # for a page or a slide, not for TensorBoard's card
    return paths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_rmt", description="Curvature spectra of training runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plot = commands.add_parser(
        "plot",
        help="draw a run from its saved readings and print them as a table",
        description="Draws the spectra of a run from the readings that SpectrumMonitor saved, and prints a table: "
        "eigenvalues with residuals, the trace with its standard error, outliers above / below the bulk ('9' clear, "
        "'9?' likely, '>=9' a lower bound, '-' none given), bulk edges, and what each reading cost.",
        epilog="example: python -m lightning_rmt plot lightning_logs/version_0 --format pdf",
    )
    plot.add_argument(
        "run_directory", type=Path, metavar="RUN_DIRECTORY", help="searched for <name>/step_*.npz at any depth"
    )
    plot.add_argument("--output", type=Path, metavar="DIR", help="default: RUN_DIRECTORY/rmt_figures")
    plot.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="default: %(default)s")
    plot.add_argument("--name", help="only this monitor (its name= argument)")
    plot.add_argument(
        "--every",
        type=_positive,
        metavar="K",
        help="draw the spectrum of every K-th reading, besides the first and the last; default: about six in all",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _refuse(message: str) -> int:
    print(f"python -m lightning_rmt: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
