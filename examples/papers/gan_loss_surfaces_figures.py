"""The figures of `gan_loss_surfaces`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gan_loss_surfaces_law import read_blocks
from matplotlib.figure import Figure

from lightning_rmt import Reading, Spectrum
from lightning_rmt.laws import BlockSemicircle
from lightning_rmt.report.style import ATOM, BULK, FAINT, INK, OUTLIER, dress, new_figure

COLOURS = {"whole": INK, "discriminator": BULK, "generator": OUTLIER}
#: The whole lies below the lines that it may coincide with.
WIDE: dict[str, Any] = {"lw": 3.5, "alpha": 0.35}
NARROW: dict[str, Any] = {"lw": 1.3}


def law_figure(cases: Sequence[tuple[str, BlockSemicircle, np.ndarray]]) -> Figure:
    """Density and simulated eigenvalues, one panel a case."""
    figure = new_figure(7.2, 2.5)
    for place, (name, law, levels) in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), 1 + place)
        low, high = law.edges
        x = np.linspace(low - 0.2, high + 0.2, 3000)
        axes.hist(levels, bins=45, density=True, color=BULK, alpha=0.35, label="simulated")
        axes.plot(x, law.density(x), color=INK, lw=1.2, label="law")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("eigenvalue")
        if place == 0:
            axes.set_ylabel("density")
            axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.set_ylim(0, 1.3 * float(law.density(x).max()))
        dress(axes)
    figure.tight_layout()
    return figure


def spectrum_figure(spectra: Mapping[str, Spectrum], law: BlockSemicircle, shift: float) -> Figure:
    """Distribution of the eigenvalues' sizes: the only axis on which a peak at zero and outliers both show."""
    figure = new_figure(7.2, 3.0)
    whole = spectra["whole"]
    largest = max(abs(whole.lambda_min.value), whole.lambda_max.value)
    sizes = np.geomspace(1e-5 * largest, 1.2 * largest, 400)
    signs = (("negative eigenvalues", -1), ("positive eigenvalues", 1))
    for place, (title, sign) in enumerate(signs):
        axes = figure.add_subplot(1, 2, 1 + place)
        for name, spectrum in spectra.items():
            style = WIDE if name == "whole" else NARROW
            beyond = 1 - spectrum.cdf(sizes) if sign > 0 else spectrum.cdf(-sizes)
            axes.plot(sizes, beyond, color=COLOURS[name], label=name, drawstyle="steps-post", **style)
        of_law = 1 - law.cdf(sizes + shift) if sign > 0 else law.cdf(-sizes + shift)
        axes.plot(sizes, of_law, color=ATOM, lw=1.3, ls="--", label="law, from the blocks")
        axes.set(xscale="log", yscale="log", xlabel="size of the eigenvalue", ylim=(1 / whole.size, 1))
        axes.set_title(title, fontsize=9)
        if sign < 0:
            axes.set_ylabel("share beyond")
            axes.invert_xaxis()
        else:
            axes.legend(fontsize=8, frameon=False)
        dress(axes)
    figure.tight_layout()
    return figure


def over_time_figure(readings: Sequence[Reading]) -> Figure:
    """Extreme eigenvalues, and the misfit of the coupling."""
    figure = new_figure(7.2, 2.8)
    steps = [reading.step for reading in readings]
    parts = [{"whole": reading.spectrum, **reading.blocks} for reading in readings]
    axes = figure.add_subplot(1, 2, 1)
    for name, colour in COLOURS.items():
        style = WIDE if name == "whole" else NARROW
        axes.plot(steps, [one[name].lambda_max.value for one in parts], "o-", ms=3, color=colour, label=name, **style)
        axes.plot(steps, [-one[name].lambda_min.value for one in parts], "v--", ms=3, color=colour, **style)
    axes.plot([], [], "o-", ms=3, color=FAINT, label="largest")
    axes.plot([], [], "v--", ms=3, color=FAINT, label="minus the smallest")
    axes.set(yscale="log", xlabel="optimizer steps", ylabel="eigenvalue")
    axes.set_ylim(top=20 * axes.get_ylim()[1])
    axes.legend(fontsize=7, frameon=False, ncols=2)
    dress(axes)
    axes = figure.add_subplot(1, 2, 2)
    found = [read_blocks(one["whole"], one["discriminator"], one["generator"], outliers=True) for one in parts]
    errors = [2 * one.coupling_error for one in found]
    axes.errorbar(
        steps,
        [one.coupling for one in found],
        errors,
        fmt="o-",
        ms=3,
        capsize=2,
        lw=1.2,
        color=BULK,
        label="GAN (two s.e.)",
    )
    axes.axhline(1, color=ATOM, lw=1.2, ls="--", label="law")
    axes.set(yscale="log", xlabel="optimizer steps", ylabel="coupling norm² / law's")
    axes.legend(fontsize=8, frameon=False)
    dress(axes)
    figure.tight_layout()
    return figure
