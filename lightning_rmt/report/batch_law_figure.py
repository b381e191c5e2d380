"""How the outliers grow as batches shrink: what was measured, the outlier map, and what isotropic noise would do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.local_law.batch_law import BatchLaw
from lightning_rmt.reading import Reading
from lightning_rmt.report import style
from lightning_rmt.report.wording import number, operator_words, typeset, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A colour for each outlier, largest first.
COLOURS = (style.BULK, style.OUTLIER, style.ATOM, style.LIMIT, "#8C6D00")


def batch_law_figure(reading: Reading) -> Figure:
    """Outliers against batch size, both logarithmic, with the fitted map and the isotropic prediction from the same theta.

    Small dots are single batches, large ones their means with the standard errors over groups of samples. The open square
    is the eigenvalue on all of the samples, which no fit has seen.

    Raises:
        ValueError: the reading has no fit.
    """
    law = reading.batch_law
    if law is None:
        raise ValueError(f"the reading of step {reading.step} has no fit of the outlier map")
    figure = style.new_figure(6.4, 4.4)
    axes = figure.add_axes((0.115, 0.12, 0.855, 0.685))
    style.dress(axes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes, means, errors = law.means()
    ends = float(sizes[0]) / 1.25, max(float(reading.samples), float(sizes[-1])) * 1.35
    largest = min(ends[1], law.dataset_size)  # no batch is larger than the data set
    x = np.geomspace(ends[0], max(largest, float(sizes[-1])), 200)
    for i, colour in enumerate(COLOURS[: len(law.fits)]):
        _draw_outlier(axes, law, i, x, colour)
        axes.errorbar(sizes, means[:, i], yerr=errors[:, i], color=colour, marker="o", markersize=5, linestyle="none")
        if i < len(reading.spectrum.top):
            whole = reading.spectrum.top[i].value
            axes.plot(
                reading.samples, whole, marker="s", markersize=6, color="white", markeredgecolor=colour, ls="none"
            )
    axes.set_xlim(*ends)
    _ticks(axes, np.append(sizes, reading.samples))
    axes.set_xlabel("samples in a batch, over all ranks", size=style.LABEL_SIZE)
    axes.set_ylabel(f"eigenvalue of the {operator_words(reading.curvature)}", size=style.LABEL_SIZE)
    _write(figure, axes, reading, law)
    return figure


def _draw_outlier(axes: Axes, law: BatchLaw, index: int, x: NDArray[np.float64], colour: str) -> None:
    jitter = np.random.default_rng(0).uniform(0.97, 1.03, law.batch_sizes.size)  # or the dots hide each other
    shown = law.eigenvalues[:, index]
    axes.plot(law.batch_sizes * jitter, shown, marker=".", markersize=3.5, color=colour, alpha=0.35, linestyle="none")
    axes.plot(x, _positive(law.fits[index].predict(x)[:, 0]), color=colour, linewidth=1.3)
    if (isotropic := law.isotropic(index, x)) is not None:
        axes.plot(x, _positive(isotropic), color=colour, linewidth=1.1, linestyle=(0, (4, 1.5)))


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values > 0, values, np.nan)


def _ticks(axes: Axes, sizes: NDArray[np.float64]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(FixedLocator(sorted(set(sizes.tolist()))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else typeset(number(value)))
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def _write(figure: Figure, axes: Axes, reading: Reading, law: BatchLaw) -> None:
    from matplotlib.lines import Line2D

    first = law.fits[0]
    words = [f"theta {with_error(first.theta[0].mean, first.theta[0].stderr)}", f"$R^2$ {first.r_squared:.2f}"]
    if first.anisotropy is not None:
        words.append(f"anisotropy {with_error(first.anisotropy.mean, first.anisotropy.stderr)}")
    title = f"{reading.name}, step {reading.step}: outliers on growing batches"
    figure.text(0.115, 0.95, title, size=style.TITLE_SIZE, color=style.INK)
    figure.text(0.115, 0.9, typeset(f"largest: {', '.join(words)}"), size=style.LEGEND_SIZE, color=style.INK)
    ink = style.INK
    handles = [
        Line2D([], [], marker="o", markersize=5, linestyle="none", label="mean of batches", color=ink),
        Line2D([], [], linewidth=1.3, label="outlier map, fitted", color=ink),
        Line2D([], [], linewidth=1.1, linestyle=(0, (4, 1.5)), label="isotropic noise", color=ink),
        Line2D([], [], marker="s", color="white", markeredgecolor=ink, linestyle="none", label="all samples"),
    ]
    if law.sample_noise is None:
        del handles[2]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.005),
        ncols=4,
        frameon=False,
        fontsize=style.LEGEND_SIZE,
        borderaxespad=0.0,
        handletextpad=0.5,
        columnspacing=1.4,
    )
