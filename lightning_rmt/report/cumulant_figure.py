"""Which ensemble the bulk is like, over the training: its free skewness and free kurtosis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_rmt.report import style
from lightning_rmt.report.history import HistoryEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def free_cumulant_figure(history: Sequence[HistoryEntry]) -> Figure:
    """The bulk's way through the plane of free skewness and free kurtosis, with standard errors, outliers removed.

    Families of laws have their place there, whatever their scale and their mean: the semicircle at the origin, the
    Marchenko-Pastur laws on the parabola ``kurtosis = skewness^2``, sums of a covariance and a Wigner matrix above it (their
    kurtosis is ``skewness^2 / u``, u the covariance part's share of the variance), sparse Wigner matrices on the axis above
    the origin. What lies below the parabola, or to the left, is none of these.

    Args:
        history: readings; those without free cumulants are left out.
    """
    entries = sorted({entry.step: entry for entry in history if entry.free_skew and entry.free_kurtosis}.items())
    figure = style.new_figure(6.4, 4.1)
    axes = figure.add_axes((0.115, 0.125, 0.715, 0.785))
    style.dress(axes)
    axes.set_xlabel(r"free skewness  $\kappa_3 / \kappa_2^{3/2}$", size=style.LABEL_SIZE)
    axes.set_ylabel(r"free kurtosis  $\kappa_4 / \kappa_2^2$", size=style.LABEL_SIZE)
    if not entries:
        axes.text(0.5, 0.5, "no bulk with a width yet", transform=axes.transAxes, ha="center", size=style.LABEL_SIZE)
        return figure
    steps = np.array([step for step, _ in entries], dtype=np.float64)
    skew = np.array([entry.free_skew for _, entry in entries])
    kurtosis = np.array([entry.free_kurtosis for _, entry in entries])
    _draw_laws(axes, skew[:, 0], kurtosis[:, 0])
    axes.errorbar(
        skew[:, 0],
        kurtosis[:, 0],
        xerr=skew[:, 1],
        yerr=kurtosis[:, 1],
        linestyle="none",
        ecolor=style.FAINT,
        elinewidth=0.8,
        zorder=2,
    )
    axes.plot(skew[:, 0], kurtosis[:, 0], color=style.FAINT, linewidth=0.8, zorder=2)
    points = axes.scatter(skew[:, 0], kurtosis[:, 0], c=steps, cmap="viridis", s=22, zorder=3, linewidths=0)
    colours = figure.colorbar(points, cax=figure.add_axes((0.85, 0.125, 0.022, 0.74)))
    colours.ax.set_title("step", size=style.LABEL_SIZE, loc="left")
    colours.ax.tick_params(labelsize=style.TICK_SIZE)
    colours.outline.set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.005),
        ncols=3,
        frameon=False,
        fontsize=style.LEGEND_SIZE,
        borderaxespad=0.0,
    )
    return figure


def _draw_laws(axes: Axes, skew: np.ndarray, kurtosis: np.ndarray) -> None:
    """Where the families lie, over the range of the data and a little more; symlog axes where it spans decades."""
    right, left = max(float(skew.max()), 1.0) * 1.15, min(float(skew.min()), 0.0) * 1.15 - 0.3
    top, bottom = max(float(kurtosis.max()), 1.0) * 1.3, min(float(kurtosis.min()), 0.0) * 1.3 - 0.3
    if right > 20 or top > 20:
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_yscale("symlog", linthresh=1.0)
    x = np.sinh(np.linspace(np.arcsinh(left), np.arcsinh(right), 400))
    right_half = x[x >= 0]
    axes.fill_between(
        right_half, right_half**2, top, color=style.BULK, alpha=0.08, linewidth=0, label="Wishart + Wigner"
    )
    axes.plot(x, x**2, color=style.BULK, linewidth=1.2, label="Marchenko-Pastur")
    axes.plot([0, 0], [0, top], color=style.ATOM, linewidth=1.2, label="sparse Wigner")
    axes.plot([0], [0], marker="o", markersize=7, color="white", markeredgecolor=style.INK, linestyle="none", zorder=2)
    axes.annotate(
        "semicircle", (0, 0), xytext=(7, -10), textcoords="offset points", size=style.LEGEND_SIZE, color=style.INK
    )
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
