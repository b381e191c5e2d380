"""The figures of `beyond_rmt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from beyond_rmt_ensembles import FAMILIES
from matplotlib.figure import Figure
from misfit import Misfit, without_largest

from lightning_rmt import Reading
from lightning_rmt.laws import PercolatedWigner, ProductWigner, ProductWishart, SparseWigner
from lightning_rmt.report.style import ATOM, BULK, FAINT, INK, LIMIT, OUTLIER, dress, new_figure

STYLES: dict[str, dict[str, Any]] = {
    "semicircle": {"color": FAINT, "ls": ":"},
    "Marchenko-Pastur": {"color": FAINT, "ls": "--"},
    "product Wishart": {"color": OUTLIER, "ls": "--"},
    "product Wigner": {"color": OUTLIER, "ls": "-"},
    "percolated Wishart": {"color": ATOM, "ls": "--"},
    "percolated Wigner": {"color": ATOM, "ls": "-"},
}


def ensemble_figure() -> Figure:
    """Density and simulated eigenvalues of four ensembles."""
    figure = new_figure(7.2, 4.0)
    cases = (
        ("product Wishart, N₁/N₀ = 1/2, N₂/N₀ = 2", ProductWishart((1000, 500, 2000)), 0.99),
        ("product Wigner, c = 0.4", ProductWigner(0.4), 1.0),
        ("percolated Wigner (sites), p = 0.4", PercolatedWigner(0.4), 1.0),
        ("sparse Wigner (bonds), c = 2", SparseWigner(2.0), 1.0),
    )
    for place, (name, law, upto) in enumerate(cases):
        axes = figure.add_subplot(2, 2, 1 + place)
        levels = law.rvs(1000, np.random.default_rng(0))
        low, high = law.edges
        high = float(law.quantile(upto)) if upto < 1 else high
        rest = levels[np.abs(levels) > 1e-9]
        counts, edges = np.histogram(rest[(rest >= low) & (rest <= high)], bins=50, range=(low, high))
        axes.stairs(counts / len(levels) / np.diff(edges), edges, fill=True, color=BULK, alpha=0.35, label="simulated")
        x = np.linspace(low, high, 801)
        density = law.density(x)
        axes.plot(x, density, color=INK, lw=1.2, label="law")
        axes.set_ylim(0, 1.25 * float(np.quantile(density, 0.985)))
        axes.set_title(name, fontsize=9)
        axes.text(
            0.98,
            0.93,
            f"zeros {np.mean(np.abs(levels) < 1e-9):.3f}\nlaw {law.atom:.3f}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=8,
        )
        if place % 2 == 0:
            axes.set_ylabel("density")
        if place >= 2:
            axes.set_xlabel("eigenvalue")
        if place == 0:
            axes.legend(fontsize=8, frameon=False, loc="center right")
        dress(axes)
    figure.tight_layout()
    return figure


def bulk_figure(networks: Mapping[str, tuple[Reading, Mapping[str, Misfit]]], outliers: int) -> Figure:
    """Survival functions of the positive part."""
    figure = new_figure(7.2, 4.0)
    for place, (name, (reading, fits)) in enumerate(networks.items()):
        axes = figure.add_subplot(1, len(networks), 1 + place)
        nodes, weights = without_largest(reading.spectrum, outliers).pooled()
        x = np.geomspace(1e-6 * nodes[-1], 1.5 * nodes[-1], 500)
        beyond = 1 - np.append(0.0, np.cumsum(weights))[np.searchsorted(nodes, x, side="right")]
        axes.plot(x, beyond, color=INK, lw=2.0, label=f"{name}, step {reading.step}", drawstyle="steps-post")
        for family, fit in fits.items():
            axes.plot(x, 1 - fit.law.cdf(x), lw=1.2, label=f"{family} ({fit.relative:.1f})", **STYLES[family])
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue", ylim=(0.5 / reading.spectrum.size, 1))
        if place == 0:
            axes.set_ylabel("share beyond")
        axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2))
        dress(axes)
    figure.tight_layout()
    return figure


def misfit_figure(networks: Mapping[str, tuple[Sequence[Reading], Sequence[Mapping[str, Misfit]]]]) -> Figure:
    """Distances over the training."""
    figure = new_figure(7.2, 2.8)
    for place, (name, (readings, fits)) in enumerate(networks.items()):
        axes = figure.add_subplot(1, len(networks), 1 + place)
        axes.axhspan(0.5, 1.5, color=BULK, alpha=0.12, lw=0)
        for family in FAMILIES:
            values = [one[family.name].relative for one in fits]
            axes.plot(
                [r.step for r in readings], values, marker="o", ms=3, lw=1.3, label=family.name, **STYLES[family.name]
            )
        axes.set(yscale="log", xlabel="optimizer steps", ylim=(0.5, 40))
        axes.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
        axes.minorticks_off()
        axes.set_title(name, fontsize=9)
        if place == 0:
            axes.set_ylabel("W1 / floor")
            axes.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
        dress(axes)
    figure.tight_layout()
    return figure


def zero_figure(widths: Sequence[int], predicted: np.ndarray, spectra: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Exact zeros against the width, and how the smallest eigenvalues are spread."""
    figure = new_figure(7.2, 3.0)
    styles = {"linear, first step": (BULK, "o", "-"), "linear, trained": (BULK, "s", "--")}
    styles |= {"tanh, first step": (OUTLIER, "o", "-"), "tanh, trained": (OUTLIER, "s", "--")}
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    left.plot(widths, predicted, color=LIMIT, lw=4, alpha=0.3, label="product: ranks")
    x = np.geomspace(1e-16, 1, 300)
    for name, (colour, marker, line) in styles.items():
        zeros = [float(np.mean(sizes <= 1e-12 * sizes[-1])) for sizes in spectra[name]]
        left.plot(
            widths,
            zeros,
            marker=marker,
            ms=4,
            lw=1.0,
            ls=line,
            color=colour,
            label=name,
            mfc="white" if marker == "s" else colour,
        )
        sizes = spectra[name][-1]
        right.plot(x, np.searchsorted(sizes / sizes[-1], x) / len(sizes), color=colour, ls=line, lw=1.3, label=name)
    left.set(xlabel="hidden width h", ylabel="share of exact zeros", ylim=(-0.02, 1))
    right.set(xscale="log", xlabel="size / largest", ylabel="share of smaller ones", ylim=(-0.02, 1))
    right.axvline(1e-12, color=FAINT, lw=0.8, ls=":")
    left.legend(fontsize=7.5, frameon=False, loc="upper left")
    for axes in (left, right):
        dress(axes)
    figure.tight_layout()
    return figure
