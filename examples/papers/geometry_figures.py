"""Figures of geometry_of_loss_surfaces.py."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_rmt.laws.law import Law

GREY, COLOURS = "0.75", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def _panels(count: int, height: float = 2.3) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _density(
    axis: Axes, law: Law, levels: Any, bins: int = 60, low: float | None = None, high: float | None = None
) -> None:
    low = min(law.edges[0], levels.min()) if low is None else low
    high = max(law.edges[1], levels.max()) if high is None else high
    x = np.linspace(low, high, 600)
    counts, edges = np.histogram(levels, bins=np.linspace(low, high, bins + 1))
    axis.stairs(counts / len(levels) / np.diff(edges), edges, fill=True, color=GREY, label="eigenvalues")
    axis.plot(x, law.density(x), color=COLOURS[0], lw=1.3, label="law")
    axis.axvline(0, color="k", lw=0.5, ls=":")
    axis.set_xlabel("eigenvalue")


def _name(phi: float) -> str:
    return rf"$\phi = {Fraction(phi).limit_denominator(20)}$"


def laws(shown: list[Any]) -> Figure:
    figure, axes = _panels(len(shown))
    for axis, (law, levels) in zip(axes, shown, strict=True):
        _density(axis, law, levels)
        axis.set_title(rf"{_name(law.phi)}, $\epsilon = {law.energy:g}$", fontsize=9)
        axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
    axes[0].set_ylabel("density")
    axes[0].legend(fontsize=7, frameon=False, loc="upper right")
    return figure


def spectra(rows: list[Any]) -> Figure:
    figure, axes = _panels(len(rows))
    for axis, (phi, _, levels, law, *_) in zip(axes, rows, strict=True):
        high = max(law.edges[1], float(np.quantile(levels, 0.99)))
        _density(axis, law, levels, low=min(law.edges[0], float(levels.min())), high=high)
        axis.set_title(rf"{_name(phi)}, $\epsilon = {law.energy:.3f}$", fontsize=9)
        axis.set_ylim(0, 2.5 * float(law.density(np.linspace(*law.edges, 300)).max()))
        axis.set_ylabel("density")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def index(rows: list[Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    for colour, (phi, search, _, _, *fitted) in zip(COLOURS, rows, strict=False):
        axis.plot(search.energies, search.index, "o", ms=3, color=colour, label=_name(phi))
        axis.plot((1 - phi) ** 2 / 2, 0, "x", ms=8, color=colour, clip_on=False, zorder=5)
        for fit in fitted:
            for style, critical, a, p in (
                ("-", fit.critical, fit.factors[0], 1.5),
                ("--", fit.free_critical, fit.factors[1], fit.exponent),
            ):
                x = np.linspace(max(critical, 0), critical + (0.15 / a) ** (1 / p), 100)
                axis.plot(x, a * (x - critical) ** p, style, lw=0.9, color=colour)
    axis.set(xlabel=r"energy $\epsilon = L / n_2$", ylabel=r"index $\alpha$", xlim=(0, None), ylim=(0, None))
    axis.legend(fontsize=7, frameon=False)
    return figure


def memorisation(points: list[Any]) -> Figure:
    figure, axis = plt.subplots(figsize=(3.6, 2.8), layout="constrained")
    phi = np.linspace(0, 1, 100)
    axis.plot(phi, (1 - phi) ** 2 / 2, color=COLOURS[0], label=r"$(1 - \phi)^2 / 2$")
    axis.plot(phi, (1 - phi / 2) / 2, color=COLOURS[1], ls="--", label=r"linear network, $(1 - \phi / 2) / 2$")
    x, y, error = zip(*points, strict=True)
    axis.errorbar(x, y, error, fmt="ko", ms=4, label="tanh networks, trained")
    axis.set(xlabel=r"$\phi$", ylabel=r"energy $\epsilon$", xlim=(0, 1), ylim=(0, None))
    axis.legend(fontsize=7, frameon=False)
    return figure


def residual(shown: list[Any]) -> Figure:
    figure, axes = _panels(len(shown), 2.6)
    for axis, (phi, law, levels) in zip(axes, shown, strict=True):
        _density(axis, law, levels, bins=80)
        axis.set_title(_name(phi), fontsize=9)
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
        axis.set_ylabel("density")
    axes[0].legend(fontsize=7, frameon=False, loc="upper right")
    return figure


def freeness(shown: list[Any]) -> Figure:
    figure, axes = _panels(len(shown), 2.8)
    for axis, (stage, energy, one) in zip(axes, shown, strict=True):
        x = np.linspace(*np.quantile(one.true, (0.0, 0.95)) * 1.05, 800)
        base = np.searchsorted(one.true, x, side="right") / len(one.true)
        for levels, name, colour, style in (
            (one.rotated, r"$H_0 + Q H_1 Q'$", COLOURS[0], "-"),
            (one.commuting, "commuting parts", COLOURS[1], "--"),
            (one.alone, "$H_0$ alone", COLOURS[2], ":"),
        ):
            difference = np.searchsorted(levels, x, side="right") / len(levels) - base
            axis.plot(x, difference, style, lw=1.0, color=colour, label=name)
        axis.axhline(0, color="k", lw=0.5)
        axis.set_title(rf"{stage}, $\epsilon = {energy:.2f}$", fontsize=9)
        axis.set_xlabel("eigenvalue")
    axes[0].set_ylabel("difference of\ndistribution functions")
    axes[0].legend(fontsize=7, frameon=False)
    return figure
