"""The figures of `appearance_of_rmt`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lightning_rmt import LevelStatistics
from lightning_rmt.levels.spacings import FOUR_BLOCK_RATIO, GOE_RATIO, POISSON_RATIO, TWO_BLOCK_RATIO
from lightning_rmt.report.style import ATOM, BULK, FAINT, INK, LIMIT, OUTLIER, dress, new_figure

COLOURS = (BULK, OUTLIER, ATOM, LIMIT)


def spacing_figure(spacings: Mapping[str, tuple[np.ndarray, int]]) -> Figure:
    """One panel each: histogram of the spacings, unfolded by so many other batches, with Wigner and Poisson."""
    columns = max(1, len(spacings) // 2)
    figure = new_figure(2.4 * columns + 0.4, 4.4)
    s = np.linspace(0, 4, 300)
    for place, (name, (found, others)) in enumerate(spacings.items()):
        axes = figure.add_subplot(2, columns, 1 + place // 2 + columns * (place % 2))
        width = (
            max(1, round(0.2 * others)) / others
        )  # spacings come in multiples of 1 / p: as many of them to every bin
        bins = np.arange(-0.5 / others, 4.2, width)
        axes.hist(found, bins, weights=np.full(found.size, 1 / found.size / width), color=BULK, alpha=0.35)
        axes.plot(s, np.pi / 2 * s * np.exp(-np.pi / 4 * s**2), color=INK, lw=1.4, label="Wigner (GOE)")
        axes.plot(s, np.exp(-s), color=OUTLIER, lw=1.2, ls="--", label="Poisson")
        model, state = name.rsplit(", ", 1)
        axes.set_title(f"{model},\n{state}", fontsize=9)
        axes.set(xlim=(0, 4), ylim=(0, 1.05))
        if place % 2:
            axes.set_xlabel("unfolded spacing s", fontsize=9)
        if place < 2:
            axes.set_ylabel("density", fontsize=9)
        if place == 0:
            axes.legend(fontsize=7.5, frameon=False)
        dress(axes)
    figure.tight_layout()
    return figure


def ratio_figure(sets: Mapping[str, tuple[np.ndarray, LevelStatistics]], zero: float) -> Figure:
    """Distribution of the ratios for the first model, and means of all."""
    figure = new_figure(7.4, 3.0)
    axes = figure.add_subplot(121)
    r = np.linspace(0, 4, 300)
    bins = np.arange(0, 4.01, 0.2)
    for (name, (levels, _)), colour in zip(list(sets.items())[:2], (OUTLIER, BULK), strict=False):
        found = []
        for one in levels:
            spacings = np.diff(one[np.abs(one) > zero])
            found.append(spacings[1:] / spacings[:-1])
        found = np.concatenate(found)
        density = np.histogram(found, bins)[0] / found.size / 0.2
        axes.stairs(density, bins, color=colour, lw=1.3, label=name.removeprefix("softmax regression, "))
    axes.plot(r, 27 / 8 * (r + r**2) / (1 + r + r**2) ** 2.5, color=INK, lw=1.2, label="GOE surmise (3)")
    axes.plot(r, 1 / (1 + r) ** 2, color=FAINT, lw=1.2, ls="--", label="Poisson")
    axes.set(xlim=(0, 4), ylim=(0, 1.0), xlabel="spacing ratio r", ylabel="density", title="softmax regression")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=7.5, frameon=False)
    dress(axes)
    axes = figure.add_subplot(122)
    names = list(sets)
    for row, name in enumerate(names):
        found = sets[name][1]
        colour = BULK if name.endswith(", trained") else OUTLIER
        axes.errorbar(found.spacing_ratio, -row, xerr=2 * found.stderr, fmt="o", ms=4, color=colour, capsize=2)
    references = ((GOE_RATIO, "GOE"), (TWO_BLOCK_RATIO, "2 blocks"), (FOUR_BLOCK_RATIO, ""), (POISSON_RATIO, "Poisson"))
    for value, words in references:
        if words:
            axes.axvline(
                value, color=INK if words == "GOE" else FAINT, lw=1, ls="-" if words == "GOE" else "--", zorder=0
            )
            side = "right" if words == "Poisson" else "left" if words == "2 blocks" else "center"
            axes.text(value, 0.62, f" {words} ", fontsize=7.5, ha=side, color=INK)
    axes.set_yticks([-row for row in range(len(names))], names, fontsize=8)
    axes.set(xlim=(0.35, 0.56), ylim=(0.5 - len(names), 1.0), xlabel="mean ratio (4)")
    dress(axes)
    figure.tight_layout()
    return figure


def ritz_figure(curves: Mapping[str, tuple[np.ndarray, list[float], float]]) -> Figure:
    """Mean ratio of Ritz values against m/n."""
    figure = new_figure(4.6, 3.2)
    axes = figure.add_subplot()
    for (name, (shares, ratios, exact)), colour, marker in zip(
        curves.items(), (BULK, OUTLIER, ATOM), "osD", strict=True
    ):
        axes.plot(shares, ratios, marker + "-", ms=4, color=colour, label=name)
        axes.axhline(exact, color=colour, lw=1, ls="--")
    axes.set(xlabel="Lanczos steps m / dimension n", ylabel="mean spacing ratio", ylim=(0.35, 1.0), xlim=(0, 0.85))
    axes.legend(fontsize=8, frameon=False, title="Ritz values of", title_fontsize=8)
    dress(axes)
    figure.tight_layout()
    return figure
