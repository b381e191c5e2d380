"""The figures of `universal_characteristics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_rmt.report.style import ATOM, BULK, FAINT, INK, OUTLIER, dress, new_figure


def spike_figure(curve: Any) -> Figure:
    """Location and overlap of an outlier against its spike, in units of sigma."""
    figure = new_figure(7.2, 2.9)
    theta = np.linspace(curve.theta[0], curve.theta[-1], 400)
    outside = theta > 1
    laws = (np.where(outside, theta + 1 / theta, 2.0), np.where(outside, 1 - 1 / theta**2, 0.0))
    labels = ("largest eigenvalue / sigma", "squared overlap with the spike")
    for place, (law, draws, label) in enumerate(zip(laws, (curve.location, curve.overlap), labels, strict=True)):
        axes = figure.add_subplot(1, 2, 1 + place)
        axes.plot(theta, law, color=INK, lw=1.2, label="law (4)")
        x = np.repeat(curve.theta, draws.shape[1])
        axes.plot(x, draws.ravel(), "o", ms=3, color=BULK, alpha=0.6, label="simulated", ls="none")
        axes.axvline(1, color=FAINT, lw=0.8, ls=":")
        axes.set(xlabel="spike theta / sigma", ylabel=label)
        axes.legend(fontsize=8, frameon=False)
        dress(axes)
    figure.tight_layout()
    return figure


def outlier_figure(stages: Mapping[str, Any], sizes: Sequence[int]) -> Figure:
    """Top outlier against 1/b - 1/N, with the predictions."""
    figure = new_figure(3.6 * len(stages) + 0.2, 3.2)
    for place, (name, found) in enumerate(stages.items()):
        axes = figure.add_subplot(1, len(stages), 1 + place)
        x = 1 / np.array(sizes) - 1 / found.fit.dataset_size
        axes.errorbar(
            x, found.means[:, 0], 2 * found.errors[:, 0], fmt="o", ms=4, capsize=2, color=BULK, label="measured"
        )
        axes.plot(
            x, found.fit.predict(sizes)[:, 0], color=BULK, lw=1.2, label=f"(3) fitted, R² {found.fit.r_squared:.2f}"
        )
        axes.plot(x, found.predicted(found.along), color=ATOM, lw=1.2, ls="-.", label="(4), noise along the outlier")
        axes.plot(x, found.predicted(found.isotropic), color=OUTLIER, lw=1.2, ls="--", label="(4), isotropic noise")
        axes.plot(0, found.theta[0], "D", ms=4, color=INK, label="all data", clip_on=False)
        top = axes.secondary_xaxis("top")
        top.set_xticks(x[:-1], sizes[:-1], fontsize=7)  # the largest one's label has no room
        top.tick_params(color=FAINT, labelsize=7)
        top.set_xlabel("batch size b", fontsize=8)
        axes.set(xlabel="1/b - 1/N", ylabel="top eigenvalue of the Hessian" if place == 0 else "", xlim=(0, None))
        axes.set_title(name, fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.35 * (high - low))
        dress(axes)
    figure.tight_layout()
    return figure


def damping_figure(stages: Mapping[str, Any]) -> Figure:
    """Damping eaten by noise, against the damping."""
    figure = new_figure(3.6 * len(stages) + 0.2, 2.9)
    for place, (name, found) in enumerate(stages.items()):
        axes = figure.add_subplot(1, len(stages), 1 + place)
        axes.loglog(found.dampings, found.outlier, "o-", ms=4, color=OUTLIER, label="along the top outlier")
        axes.loglog(found.dampings, found.law, color=INK, lw=1.2, label="local law (5), one sigma")
        axes.loglog(found.dampings, found.bulk, "s-", ms=4, color=BULK, label="in the bulk (trace)")
        ticks = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="damping d", ylabel="eaten by noise, d - d_eff" if place == 0 else "")
        axes.set_xlim(found.dampings[0] / 1.1, found.dampings[-1] * 1.1)
        axes.set_title(name, fontsize=9)
        if place == 0:
            axes.legend(fontsize=7.5, frameon=False)
        dress(axes)
    figure.tight_layout()
    return figure
