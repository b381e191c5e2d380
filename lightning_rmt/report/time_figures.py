"""The pictures of a run: the spectrum over time, and its eigenvalues over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.report import style
from lightning_rmt.report.history import BINS_PER_DECADE, HistoryEntry, LogMasses, bin_edge
from lightning_rmt.report.scalars import TOP
from lightning_rmt.report.wording import number, operator_words, typeset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAINTEST = -8  # log10 of the mass at which the colour scale ends at the latest
_LINEAR_DECADES = 0.4
_CROWDED = 60  # readings from which lines go without markers


def heat_map_figure(history: Sequence[HistoryEntry]) -> Figure:
    """The density over time: log10 of the mass per bin, bins equally wide on the symlog axis; certified levels as dots.

    Full readings are drawn at their steps, each out to halfway to its neighbours; light ones have dots only.

    Raises:
        ValueError: ``history`` has no full reading.
    """
    entries = _in_order(history)
    full = [(entry.step, entry.masses) for entry in entries if entry.masses is not None]
    if not full:
        raise ValueError("there is no density to draw: the history has no full reading")
    figure = style.new_figure(6.4, 4.1)
    axes = figure.add_axes((0.125, 0.125, 0.725, 0.785))
    lowest, highest = _bins(entries, [masses for _, masses in full])
    linear_to = bin_edge(lowest)
    outer = [bin_edge(k) for k in range(lowest, highest + 1)]
    edges = np.array([-edge for edge in reversed(outer)] + outer)
    mass = np.array([masses.pooled(lowest, highest) for _, masses in full]).T
    faintest = max(min(math.floor(math.log10(mass[mass > 0.0].min())), -1), _FAINTEST)
    shade = np.ma.masked_invalid(np.log10(np.where(mass < 10.0**faintest, np.nan, mass)))

    low, high = _shown(entries, edges, linear_to)
    axis = style.EigenvalueAxis.symlog(low, high, linear_to, _LINEAR_DECADES)
    style.dress(axes)
    cells = _cell_edges(np.array([step for step, _ in full], dtype=np.float64))
    # rasterized: one image in a PDF or SVG instead of thousands of rectangles with hairlines between them.
    mesh = axes.pcolormesh(cells, edges, shade, cmap=style.mass_colours(), vmin=faintest, vmax=0.0, rasterized=True)
    axis.apply(axes, "y")
    room = 0.02 * (entries[-1].step - entries[0].step)  # for the dots of light readings beyond the last full one
    axes.set_xlim(min(cells[0], entries[0].step - room), max(cells[-1], entries[-1].step + room))
    _step_ticks(axes, entries)
    _draw_dots(axes, entries, linear_to)
    _draw_limit(axes, entries, linear_to, axis.high)

    axes.set_xlabel("step", size=style.LABEL_SIZE)
    operator = operator_words(entries[-1].curvature, entries[-1].preconditioned)
    axes.set_ylabel(f"eigenvalue of the {operator}", size=style.LABEL_SIZE)
    colours = figure.colorbar(mesh, cax=figure.add_axes((0.87, 0.125, 0.022, 0.785)), ticks=list(range(faintest, 1)))
    colours.set_label("log$_{10}$ of the mass per bin", size=style.LABEL_SIZE)
    colours.ax.tick_params(labelsize=style.TICK_SIZE)
    colours.outline.set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**_LEGEND_STRIP)
    return figure


def outliers_over_time_figure(history: Sequence[HistoryEntry]) -> Figure:
    """The largest eigenvalues against their stability limit, the outlier counts, and the trace, each over the steps.

    Raises:
        ValueError: ``history`` is empty.
    """
    entries = _in_order(history)
    figure = style.new_figure(6.4, 6.0)
    levels, counts, trace = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1.0, 1.6])
    figure.subplots_adjust(left=0.135, right=0.975, top=0.945, bottom=0.085, hspace=0.2)
    for axes in (levels, counts, trace):
        style.dress(axes)
        axes.grid(axis="y", color=style.GRID, linewidth=0.7)
    _draw_eigenvalues(levels, entries)
    full = [entry for entry in entries if entry.speed == "full"]
    _draw_counts(counts, full)
    _draw_trace(trace, full)
    _step_ticks(trace, entries)
    trace.set_xlabel("step", size=style.LABEL_SIZE)
    for axes in (levels, counts, trace):
        axes.yaxis.set_label_coords(-0.125, 0.5)
    return figure


_LEGEND_STRIP: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0.0, 1.005),
    "ncols": 4,
    "frameon": False,
    "fontsize": style.LEGEND_SIZE,
    "borderaxespad": 0.0,
    "borderpad": 0.2,
    "handlelength": 1.6,
    "columnspacing": 1.4,
}


def _in_order(history: Sequence[HistoryEntry]) -> list[HistoryEntry]:
    """By step; of several readings of a step (a resumed run repeats some) the last one counts."""
    if not history:
        raise ValueError("there is no reading to draw: the history is empty")
    return [entry for _, entry in sorted({entry.step: entry for entry in history}.items())]


def _bins(entries: Sequence[HistoryEntry], densities: Sequence[LogMasses]) -> tuple[int, int]:
    """First and last bin of the logarithmic part, for all entries together."""
    reach = max(abs(end) for end in _known_ends(entries))
    highest = math.floor(math.log10(reach) * BINS_PER_DECADE) + 1 if reach > 0 else 1
    finest = max(masses.lowest_bin for masses in densities)
    scale = math.log10(float(np.median([masses.scale() for masses in densities])))
    # Whole decades, so that the ticks at the ends of the linear part are powers of ten.
    decade = max(math.floor(scale + 1e-9), math.ceil(finest / BINS_PER_DECADE))
    return min(decade * BINS_PER_DECADE, highest - 1), highest


def _known_ends(entries: Sequence[HistoryEntry]) -> list[float]:
    ends = [end for entry in entries for end in (entry.lambda_max, entry.lambda_min)]
    return [end for end in ends if end is not None]


def _shown(entries: Sequence[HistoryEntry], edges: NDArray[np.float64], linear_to: float) -> tuple[float, float]:
    low, high = min(_known_ends(entries)), max(_known_ends(entries))
    limits = [entry.limit for entry in entries if entry.limit is not None]
    near = [limit for limit in limits if limit <= 4.0 * high]
    return min(low, -linear_to), max([high, linear_to, *near])


def _cell_edges(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borders halfway between the steps, shape (k + 1,); the outer cells stick out by a little."""
    if steps.size == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    out = 0.02 * (steps[-1] - steps[0])
    return np.concatenate(
        [
            [max(2 * steps[0] - middles[0], steps[0] - out)],
            middles,
            [min(2 * steps[-1] - middles[-1], steps[-1] + out)],
        ]
    )


def _step_ticks(axes: Axes, entries: Sequence[HistoryEntry]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    few = FixedLocator([entries[0].step]) if len(entries) == 1 else None
    axes.xaxis.set_major_locator(few or MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))


def _draw_dots(axes: Axes, entries: Sequence[HistoryEntry], linear_to: float) -> None:
    outliers, others = [], []
    for entry in entries:
        for levels, count in ((entry.top, entry.outliers_high or 0), (entry.bottom, entry.outliers_low or 0)):
            outliers += [(entry.step, value) for value in levels[:count]]
            others += [(entry.step, value) for value in levels[count : max(TOP, count + 1)] if abs(value) > linear_to]
    size = max(1.0, min(2.8, 80.0 / len(entries)))
    for points, colour, label in ((others, style.INK, "certified eigenvalue"), (outliers, style.OUTLIER, "outlier")):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker="o", markersize=size, linestyle="none", color=colour, label=label, markeredgewidth=0)


def _draw_limit(axes: Axes, entries: Sequence[HistoryEntry], lowest: float, highest: float) -> None:
    limits = [(entry.step, entry.limit) for entry in entries if entry.limit is not None]
    if not any(lowest <= limit <= highest for _, limit in limits):
        return
    x, y = zip(*limits, strict=True)
    marker = "_" if len(limits) == 1 else None
    names = {entry.limit_name for entry in entries if entry.limit is not None}  # several where the momentum changes
    label = names.pop() if len(names) == 1 else "stability limit"
    axes.plot(x, y, color=style.LIMIT, linewidth=1.3, linestyle=(0, (5, 2.5)), marker=marker, label=label)


def _draw_eigenvalues(axes: Axes, entries: Sequence[HistoryEntry]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    largest = [
        (entry.step, entry.lambda_max, entry.lambda_max_residual or 0.0)
        for entry in entries
        if entry.lambda_max is not None
    ]
    axes.errorbar(
        [step for step, _, _ in largest],
        [value for _, value, _ in largest],
        yerr=[residual for _, _, residual in largest],
        label=r"$\lambda_{\max}$",
        **_line(style.OUTLIER, len(entries)),
        zorder=3,
    )
    for i in range(1, TOP):
        points = [(entry.step, entry.top[i]) for entry in entries if len(entry.top) > i]
        if points:
            x, y = zip(*points, strict=True)
            look: dict[str, Any] = {**_line(style.FAINT, len(entries)), "linewidth": 0.7, "markersize": 1.8}
            axes.errorbar(x, y, label=f"2nd to {TOP}th" if i == 1 else None, **look)
    full = [entry for entry in entries if entry.speed == "full"]
    edges = [entry.bulk_edge_high for entry in full]
    if any(edge is not None for edge in edges):
        heights = [math.nan if edge is None else edge for edge in edges]  # a hole where there is no edge
        dotted = (0, (1, 1.6))
        axes.plot(
            [entry.step for entry in full],
            heights,
            color=style.INK,
            linestyle=dotted,
            marker="_",
            markersize=5,
            label="bulk edge",
        )
    values = [value for _, value, _ in largest] + [value for entry in entries for value in entry.top[:TOP]]
    axes.set_ylabel("largest eigenvalues", size=style.LABEL_SIZE)
    if not values:  # light readings only, none of which certified any
        return
    low, high = min(values), max(values)
    if 0.0 < 5.0 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 2.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: typeset(number(value, 1))))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _draw_limit(axes, entries, low, 2.0 * high)
    else:
        _draw_limit(axes, entries, low, 2.0 * high)
        if low > 0.0:
            axes.set_ylim(bottom=0.0)  # a wobble of some per cent is to look like one
    axes.legend(**_LEGEND_STRIP)


def _draw_counts(axes: Axes, entries: Sequence[HistoryEntry]) -> None:
    """Counts as dots; readings at which no count was given as crosses on a line of their own, below zero."""
    counts = {"above the bulk": [e.outliers_high for e in entries], "below": [e.outliers_low for e in entries]}
    top = max([4, *(count for side in counts.values() for count in side if count is not None)])
    none = -0.3 * top
    for (side, values), colour, size in zip(counts.items(), (style.OUTLIER, style.BULK), (4.5, 2.8), strict=True):
        found = [(entry.step, count) for entry, count in zip(entries, values, strict=True) if count is not None]
        refused = [entry.step for entry, count in zip(entries, values, strict=True) if count is None]
        look: dict[str, Any] = {"linestyle": "none", "color": colour, "markersize": size}
        axes.plot([step for step, _ in found], [count for _, count in found], marker="o", label=side, **look)
        axes.plot(refused, [none] * len(refused), marker="x", **look)
    ticks = list(range(0, top + 1, max(1, math.ceil(top / 3))))
    axes.set_yticks([none, *ticks], ["no count", *map(str, ticks)])
    axes.set_ylim(1.6 * none, 1.15 * top)
    axes.set_ylabel("outliers", size=style.LABEL_SIZE)
    axes.legend(**{**_LEGEND_STRIP, "loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "handlelength": 0.8})


def _draw_trace(axes: Axes, entries: Sequence[HistoryEntry]) -> None:
    traces = [(entry.step, entry.trace, entry.trace_stderr or 0.0) for entry in entries if entry.trace is not None]
    if traces:
        steps, values, errors = zip(*traces, strict=True)
        axes.errorbar(steps, values, yerr=errors, **_line(style.BULK, len(entries)))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(style.TICK_SIZE)
    axes.set_ylabel("trace ± s.e.", size=style.LABEL_SIZE)


def _line(colour: str, readings: int) -> dict[str, Any]:
    marker = "o" if readings <= _CROWDED else None
    return {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 3, "elinewidth": 0.9, "capsize": 0}
