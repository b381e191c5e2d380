"""A reading to whatever loggers the Trainer has, found by what they can do: no logger class is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_rmt.reading import Reading
from lightning_rmt.report import tensorboard
from lightning_rmt.report.destinations import each, experiment, is_rank_zero, is_tensorboard, say, tag_for
from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.once import Once, OnChange
from lightning_rmt.report.scalars import caveats, split, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LoggerReport:
    """Feeds readings to loggers of either Lightning namespace; one per monitor.

    Every logger gets the scalars. TensorBoard also gets the density as a histogram, the figures and the notes;
    a logger with ``log_image`` (Weights & Biases) or with ``experiment.log_figure`` (MLflow) gets the figures. Sentences
    (refusals, caveats, the reading's own notes) are written once each, however their numbers change; verdicts whenever they
    change.

    State: the histogram's grid, the sentences already written, and how many full readings have been seen. It is kept over a
    resume by `state_dict` and `load_state_dict`.

    Args:
        figures_every: figures are drawn for the first full reading and every so many after it; 0 draws none.
        custom_scalars: write a layout for TensorBoard's custom scalars tab. Off by default because TensorBoard uses
            one layout per log directory, and it would displace the user's.
    """

    def __init__(self, *, figures_every: int = 10, custom_scalars: bool = False) -> None:
        if figures_every < 0:
            raise ValueError(f"figures_every must be 0 (no figures) or positive, got {figures_every}")
        self.figures_every = figures_every
        self.custom_scalars = custom_scalars
        self._grid: list[float] = []
        self._once = Once()
        self._verdicts = OnChange()
        self._seen = 0
        self._drawn_step: int | None = None
        self._layout_written = False

    def log(self, loggers: Iterable[Any], reading: Reading, history: Sequence[HistoryEntry]) -> None:
        """Writes one reading to all loggers; only rank 0 does anything.

        Args:
            loggers: ``trainer.loggers``.
            reading: the reading, logged at its own step.
            history: the entries so far, this reading's included.

        Raises:
            Exception: what the first failing logger raised, after the others have had theirs.
        """
        if not is_rank_zero():
            return
        due = False
        if not reading.light:  # which has no density to draw
            if not self._grid:
                self._grid = tensorboard.histogram_grid(reading.spectrum)
            due = bool(self.figures_every) and self._seen % self.figures_every == 0
            self._seen += 1
        loggers = list(loggers)
        values, reasons = split(reading)
        sentences = self._new_sentences(reading, reasons)
        if sentences and not (loggers and all(map(is_tensorboard, loggers))):
            say("\n".join(f"{reading.name}, step {reading.step}: {sentence}" for sentence in sentences))
        try:
            each(loggers, lambda logger: self._log_data(logger, reading, values, sentences))
        finally:
            self._layout_written = True
            if due:
                self.log_figures(loggers, reading, history)

    def log_scalars(self, loggers: Iterable[Any], values: Mapping[str, float], step: int) -> None:
        """Writes numbers that belong to no reading, by tag; only rank 0 does anything."""
        if is_rank_zero():
            each(
                list(loggers),
                lambda logger: logger.log_metrics({tag_for(tag, logger): v for tag, v in values.items()}, step=step),
            )

    def log_figures(self, loggers: Iterable[Any], reading: Reading, history: Sequence[HistoryEntry]) -> None:
        """Draws the figures and gives them to the loggers that take any, unless this step's were already drawn.

        `log` calls it when figures are due; call it once more at the end of the training to have the last reading's.
        """
        takers = [(logger, take) for logger in loggers if (take := _figure_taker(logger)) is not None]
        if not takers or not is_rank_zero() or self._drawn_step == reading.step:
            return
        from lightning_rmt.report.cumulant_figure import free_cumulant_figure
        from lightning_rmt.report.figures import heat_map_figure, spectrum_figure

        self._drawn_step = reading.step
        past = history or [HistoryEntry.from_reading(reading)]
        figures = {
            f"{reading.name}/spectrum": _Drawn(spectrum_figure(reading)),
            f"{reading.name}/spectrum_over_time": _Drawn(heat_map_figure(past)),
            f"{reading.name}/free_cumulants": _Drawn(free_cumulant_figure(past)),
        }
        if reading.batch_law is not None:
            from lightning_rmt.report.batch_law_figure import batch_law_figure

            figures[f"{reading.name}/batch_law"] = _Drawn(batch_law_figure(reading))
        gifts = [(take, tag_for(tag, logger), drawn) for tag, drawn in figures.items() for logger, take in takers]
        each(gifts, lambda gift: gift[0](gift[1], gift[2], reading.step))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, fit for a checkpoint."""
        said = {"said": self._once.said, "verdicts": dict(self._verdicts.last)}
        return {"grid": list(self._grid), "seen": self._seen, **said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`: the same grid, nothing said twice."""
        self._grid = [float(edge) for edge in state["grid"]]
        self._once = Once(state["said"])
        self._verdicts = OnChange(state.get("verdicts"))
        self._seen = int(state["seen"])

    def _log_data(self, logger: Any, reading: Reading, values: Mapping[str, float], sentences: Sequence[str]) -> None:
        board = is_tensorboard(logger)
        if board and self.custom_scalars:
            values = {**values, **_margins(values, reading.name)}
        logger.log_metrics({tag_for(tag, logger): value for tag, value in values.items()}, step=reading.step)
        if not board:
            return
        experiment, name = logger.experiment, reading.name
        if not reading.light:
            density = tag_for(f"{name}/density", logger)
            tensorboard.add_density(experiment, density, reading.spectrum, self._grid, reading.step)
        if sentences:
            text = "\n".join(f"- {sentence}" for sentence in sentences)
            experiment.add_text(tag_for(f"{name}/notes", logger), text, reading.step)
        if self.custom_scalars and not self._layout_written:
            experiment.add_custom_scalars(tensorboard.layout(name, reading.preconditioned is not None))

    def _new_sentences(self, reading: Reading, reasons: Mapping[str, str]) -> list[str]:
        """What hasn't been said yet, each sentence with the tags that it is about."""
        judged = verdicts(reading)
        told = [f"{tag}: {verdict}" for tag, verdict in judged.items() if self._verdicts.is_new(verdict, tag)]
        # a statistic that is missing because of the verdict needn't say it again
        reasons = {tag: reason for tag, reason in reasons.items() if reason not in judged.values()}
        said: list[tuple[str, str]] = [*reasons.items(), *caveats(reading).items()]
        said += [("", note) for note in reading.notes]
        about: dict[str, list[str]] = {}
        for tag, sentence in said:
            if self._once.is_new(sentence, tag):
                about.setdefault(sentence, []).extend([tag] if tag else [])
        return told + [f"{', '.join(tags)}: {sentence}" if tags else sentence for sentence, tags in about.items()]


class _Drawn:
    """A figure, and its pixels once somebody asks for them: rendering is the expensive part, and loggers share it."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self._pixels: Any = None

    @property
    def pixels(self) -> Any:
        """RGB, shape (height, width, 3), uint8."""
        if self._pixels is None:
            from lightning_rmt.report.figures import pixels

            self._pixels = pixels(self.figure)
        return self._pixels


_Taker = Callable[[str, _Drawn, int], None]


def _figure_taker(logger: Any) -> _Taker | None:
    if is_tensorboard(logger):
        # add_image writes what add_figure does, without importing pyplot and with pixels that are drawn once for all.
        return lambda tag, drawn, step: logger.experiment.add_image(tag, drawn.pixels, step, dataformats="HWC")
    if callable(getattr(logger, "log_image", None)):
        return lambda tag, drawn, step: logger.log_image(tag, [drawn.pixels], step=step)
    if callable(getattr(experiment(logger), "log_figure", None)) and getattr(logger, "run_id", None) is not None:
        return lambda tag, drawn, step: logger.experiment.log_figure(
            logger.run_id, drawn.figure, f"{tag}/step_{step:08d}.png"
        )
    return None


def _margins(values: Mapping[str, float], name: str) -> dict[str, float]:
    """The trace with one standard error taken off and put on, for the margin chart."""
    trace, error = values.get(f"{name}/trace"), values.get(f"{name}/trace_stderr", 0.0)
    return {} if trace is None else {f"{name}/trace_low": trace - error, f"{name}/trace_high": trace + error}
