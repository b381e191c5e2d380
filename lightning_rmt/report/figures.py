"""The picture of one reading, and what turns any figure into pixels or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.reading import Reading
from lightning_rmt.report import style
from lightning_rmt.report.history import HistoryEntry, LogMasses
from lightning_rmt.report.time_figures import heat_map_figure, outliers_over_time_figure
from lightning_rmt.report.wording import (
    law_name,
    law_words,
    level_words,
    number,
    operator_words,
    outlier_words,
    typeset,
    with_error,
)
from lightning_rmt.spectra.density import Atom
from lightning_rmt.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heat_map_figure", "outliers_over_time_figure", "pixels", "spectrum_figure"]

_HEIGHT = 4.6
"""Of the spectrum's figure, in inches."""
_SAMPLES = 900
_Y_DECADES = 9  # at most; below that lie densities of far less than one eigenvalue


def spectrum_figure(reading: Reading) -> Figure:
    """The spectrum of one reading: the density with its error band, and what stands apart from it.

    The density is per unit eigenvalue, also where the axis is logarithmic: areas under the curve are not masses there.
    Outliers are eigenvalues of mass 1/n each, so they are stems; their height means nothing. Atoms (an eigenvalue
    with a share of the whole mass) are labelled stems. Ticks along the bottom are certified eigenvalues.

    Raises:
        ValueError: a light reading.
    """
    spectrum = reading.spectrum
    if reading.light:
        raise ValueError(f"the reading of step {reading.step} is a light one, which has no density to draw")
    figure = style.new_figure(6.4, _HEIGHT)
    axes = figure.add_axes((0.105, 0.51 / _HEIGHT, 0.865, 2.6 / _HEIGHT))
    style.dress(axes)
    entry = HistoryEntry.from_reading(reading)
    axis = style.EigenvalueAxis.spanning(*_ends(spectrum, entry.limit), LogMasses.of(spectrum).scale())
    axis.apply(axes)
    axes.grid(axis="x", color=style.GRID, linewidth=0.7)

    _draw_density(axes, spectrum, axis)
    _draw_law(axes, reading, axis)
    _draw_atoms(axes, spectrum)
    _draw_levels(axes, spectrum)
    _draw_edges(axes, spectrum)
    _draw_limit(axes, entry, axis)

    axes.set_xlabel(
        f"eigenvalue of the {operator_words(reading.curvature, reading.preconditioned)}", size=style.LABEL_SIZE
    )
    axes.set_ylabel("density per unit eigenvalue", size=style.LABEL_SIZE)
    _write_title(figure, reading)
    _write_legend(figure, axes, len(spectrum.runs))
    return figure


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure drawn: RGB, shape (height, width, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _ends(spectrum: Spectrum, limit: float | None) -> tuple[float, float]:
    """What the axis must show: all eigenvalues, and the stability limit where that is near."""
    low, high = spectrum.lambda_min.value, spectrum.lambda_max.value
    return low, limit if limit is not None and high < limit <= 2.0 * high else high


def _draw_density(axes: Axes, spectrum: Spectrum, axis: style.EigenvalueAxis) -> None:
    from matplotlib.ticker import NullLocator

    x = axis.samples(_SAMPLES)
    density = spectrum.density(x)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    peak = float(density.max())
    if peak <= 0.0:
        axes.set_ylim(1e-3, 1.0)  # nothing but atoms
        return
    faintest = _faintest(spectrum, peak)
    bottom = max(min(faintest * 0.2, peak * 1e-2), peak * 10.0**-_Y_DECADES)
    # Stems of atoms need room above the curve.
    axes.set_ylim(bottom, peak * (3.0 if not _degenerate(spectrum) else 2.0 * (peak / bottom) ** 0.25))
    hidden = bottom * 1e-3  # a logarithmic axis has no zero
    low, high = (np.maximum(limit, hidden) for limit in spectrum.density_band(x))
    axes.fill_between(x, low, high, color=style.BULK, alpha=0.2, linewidth=0)
    axes.plot(x, np.maximum(density, hidden), color=style.BULK, linewidth=1.6)


def _faintest(spectrum: Spectrum, peak: float) -> float:
    """The lowest density at a node of the continuous part: what is lower lies between nodes, and means nothing."""
    nodes, weights = spectrum.nodes.ravel(), spectrum.weights.ravel()
    apart = np.array([np.inf, *(atom.location for atom in spectrum.atoms)])
    far = np.abs(nodes[:, None] - apart).min(axis=1) > 1e-6 * np.abs(nodes).max()
    meant = weights * spectrum.size > 1e-3  # not rounding, as beside a heavy atom: an eigenvalue weighs about 1/n
    at_nodes = spectrum.density(nodes[far & meant])
    return float(at_nodes[at_nodes > 0.0].min(initial=peak))


def _degenerate(spectrum: Spectrum) -> list[Atom]:
    """The atoms that aren't outliers."""
    outliers = {*spectrum.outliers.high.values, *spectrum.outliers.low.values}
    return [atom for atom in spectrum.atoms if atom.location not in outliers]


def _draw_law(axes: Axes, reading: Reading, axis: style.EigenvalueAxis) -> None:
    """The law that the bulk can't be told from, scaled to the mass that it was fitted to; a rejected one is not drawn."""
    fit = reading.laws.simplest
    if fit is None:
        return
    x = axis.samples(_SAMPLES)
    share = (1 - fit.removed_outlier_mass) * (1 - fit.removed_zero_mass)
    density = share * fit.law.density(x)
    shown = np.where(density > 0, density, np.nan)
    axes.plot(x, shown, color=style.INK, linewidth=1.1, linestyle=(0, (4, 1.5)), label=law_name(fit))


def _draw_atoms(axes: Axes, spectrum: Spectrum) -> None:
    blended = axes.get_xaxis_transform()
    for i, atom in enumerate(_degenerate(spectrum)):
        axes.plot([atom.location] * 2, [0, 0.9], color=style.ATOM, linewidth=1.6, transform=blended)
        axes.plot(
            [atom.location],
            [0.9],
            marker="^",
            markersize=6,
            linestyle="none",
            color=style.ATOM,
            transform=blended,
            label="atom" if i == 0 else None,
        )
        axes.annotate(
            _mass_words(atom, spectrum),
            (atom.location, 0.9),
            xycoords=blended,
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=style.LEGEND_SIZE,
            color=style.ATOM,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _mass_words(atom: Atom, spectrum: Spectrum) -> str:
    """``70 % within ±0.03`` at zero: the quadrature can't tell a small eigenvalue from none below its resolution."""
    at_zero = abs(atom.location) <= spectrum.zero_width
    return f"{number(100 * atom.mass, 2)} %" + (f" within ±{number(spectrum.zero_width, 1)}" if at_zero else "")


def _draw_levels(axes: Axes, spectrum: Spectrum) -> None:
    blended = axes.get_xaxis_transform()
    outliers = [*spectrum.outliers.high.values, *spectrum.outliers.low.values]
    others = [level.value for level in (*spectrum.top, *spectrum.bottom) if level.value not in set(outliers)]
    if others:
        axes.vlines(others, 0, 0.035, color=style.FAINT, linewidth=0.9, transform=blended, label="_levels")
        axes.plot([], [], color=style.FAINT, marker="|", markersize=6, linestyle="none", label="certified eigenvalue")
    if outliers:
        axes.vlines(outliers, 0, 0.2, color=style.OUTLIER, linewidth=1.3, transform=blended)
        axes.plot(
            outliers,
            [0.2] * len(outliers),
            marker="o",
            markersize=4.5,
            linestyle="none",
            color=style.OUTLIER,
            transform=blended,
            label="outlier",
        )


def _draw_edges(axes: Axes, spectrum: Spectrum) -> None:
    edges = [edge for edge in (spectrum.bulk_edges.low, spectrum.bulk_edges.high) if edge is not None]
    label = "bulk edge" + ("s " if len(edges) > 1 else " ") + ", ".join(typeset(number(edge)) for edge in edges)
    for i, edge in enumerate(edges):
        axes.axvline(edge, color=style.INK, linewidth=1.1, linestyle=(0, (1, 1.6)), label=label if i == 0 else None)


def _draw_limit(axes: Axes, entry: HistoryEntry, axis: style.EigenvalueAxis) -> None:
    limit = entry.limit
    if limit is not None and 1e-3 * axis.high < limit < axis.high:
        axes.axvline(
            limit,
            color=style.LIMIT,
            linewidth=1.2,
            linestyle=(0, (5, 2.5)),
            label=f"{entry.limit_name} = {typeset(number(limit))}",
        )


def _write_legend(figure: Figure, axes: Axes, probes: int) -> None:
    """Between the title and the axes, where it can't cover data."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    density = (Patch(color=style.BULK, alpha=0.2, linewidth=0), Line2D([], [], color=style.BULK, linewidth=1.6))
    handles, labels = axes.get_legend_handles_labels()
    handles = [density, *handles]  # type: ignore[list-item]
    labels = [f"density ± error ({probes} probe{'s' if probes > 1 else ''})", *labels]
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.008, 3.14 / _HEIGHT),
        ncols=3,
        frameon=False,
        fontsize=style.LEGEND_SIZE,
        borderaxespad=0.0,
        borderpad=0.2,
        handlelength=1.6,
        columnspacing=1.3,
        labelspacing=0.3,
    )


def _write_title(figure: Figure, reading: Reading) -> None:
    spectrum = reading.spectrum
    level = spectrum.lambda_max
    exact = level.residual <= 1e-4 * abs(level.value)  # then all the digits shown are certain
    largest = number(level.value, 4) if exact else with_error(level.value, level.residual)
    uncertain = "" if spectrum.converged(level) or exact else " (not converged)"
    trace = with_error(spectrum.trace.mean, spectrum.trace.stderr)
    figure.text(
        0.012,
        1 - 0.1 / _HEIGHT,
        typeset(rf"step {reading.step}    $\lambda_{{\max}}$ = {largest}{uncertain}    trace {trace}"),
        size=style.TITLE_SIZE,
        color=style.INK,
        va="top",
    )
    lines = [outlier_words(spectrum), law_words(reading.laws)]
    scopes = list(reading.level_statistics.items())
    lines += [level_words(scope, found) for scope, found in scopes[:1]]
    if len(scopes) > 1:
        lines[-1] += f"; {len(scopes) - 1} more"
    for i, line in enumerate(lines):
        height = 1 - (0.35 + 0.2 * i) / _HEIGHT
        figure.text(0.012, height, typeset(line), size=style.LEGEND_SIZE + 0.5, color=style.FAINT, va="top")
