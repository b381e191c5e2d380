"""What only TensorBoard shows: the density as a histogram over time, and charts that put tags together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.report.scalars import TOP
from lightning_rmt.spectra.spectrum import Spectrum

BINS = 128
_COUNTS = 1e6  # TensorBoard shows counts; parts per million of the mass read better than fractions


def histogram_grid(spectrum: Spectrum) -> list[float]:
    """Edges of 128 equal bins around the spectrum, with its own width to spare on either side; plain floats.

    TensorBoard overlays the histograms of a tag, and stretches the outer bins to the data: only one grid for the whole
    run lets the shapes be compared. Bins are equal because it draws counts, not densities. Zero is the middle of a bin.
    """
    low, high = spectrum.lambda_min.value, spectrum.lambda_max.value
    width = (high - low) or abs(high) or 1.0
    bin_width = 3.0 * width / BINS
    first = np.round((low - width) / bin_width) - 0.5
    return [float(edge) for edge in (first + np.arange(BINS + 1)) * bin_width]


def histogram_counts(spectrum: Spectrum, grid: Sequence[float]) -> NDArray[np.float64]:
    """Mass per bin of ``grid``, in parts per million; shape (len(grid) - 1,). Mass outside goes to the outer bins."""
    cdf = spectrum.cdf(np.asarray(grid, dtype=np.float64))
    cdf[0], cdf[-1] = 0.0, 1.0
    return np.diff(cdf) * _COUNTS


def add_density(experiment: Any, tag: str, spectrum: Spectrum, grid: Sequence[float], step: int) -> None:
    """Writes the density to a ``SummaryWriter`` as a histogram on ``grid``."""
    counts = histogram_counts(spectrum, grid)
    edges = np.asarray(grid)
    middles = (edges[1:] + edges[:-1]) / 2
    experiment.add_histogram_raw(
        tag,
        min=grid[0],
        max=grid[-1],
        num=float(counts.sum()),
        sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2),
        bucket_limits=list(grid[1:]),
        bucket_counts=counts.tolist(),
        global_step=step,
    )


def layout(name: str, preconditioned: bool = False) -> dict[str, dict[str, list[Any]]]:
    """Charts for TensorBoard's custom scalars tab: what is to be compared in one picture, by what it answers.

    Titles say what to hold against what. The edges get a line chart, since they have holes where there is no outlier count,
    and TensorBoard refuses a margin chart whose three tags aren't there at the same steps. The trace always has its error,
    hence its margins.
    """

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(name)}/{tag}$" for tag in tags]]  # matched from the start of the tag only

    rate = {
        "lambda_max lr, SGD limit 2(1+momentum)": lines("sharpness_times_lr"),
        "lambda_max against 2/lr": lines("lambda_max", "two_over_lr"),
    }
    if preconditioned:
        rate = {
            "lambda_max over its limit: 1 is the edge": lines("preconditioned/sharpness_over_limit"),
            "lambda_max against its limit": lines("lambda_max", "preconditioned/limit"),
        }
    return {
        f"{name}: learning rate, batch, damping": {
            **rate,
            "bulk against noise_edge": lines("noise_edge", "q99", "bulk_edge_high"),
            "damping: in use, left, suggested": lines("damping", "effective_damping", "local_law_damping"),
        },
        f"{name}: spectrum": {
            "largest eigenvalues": lines(*(f"top/{i}" for i in range(1, TOP + 1))),
            "smallest eigenvalues": lines(*(f"bottom/{i}" for i in range(1, TOP + 1))),
            "bulk": lines("bulk_edge_low", "q01", "q99", "bulk_edge_high"),
            "trace, one standard error": ["Margin", [f"{name}/trace", f"{name}/trace_low", f"{name}/trace_high"]],
            "outliers (empty: see Text)": lines("outliers/count_high", "outliers/count_low"),
            "gap in local spacings": lines("outliers/gap_spacings_high", "outliers/gap_spacings_low"),
        },
        f"{name}: cost": {
            "share of the training time": lines("overhead"),
            "seconds per probe": lines("probe_seconds"),
        },
    }
