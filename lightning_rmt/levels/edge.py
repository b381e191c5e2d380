"""Level statistics at one end of a measured spectrum, from the Ritz values that are eigenvalues."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from lightning_rmt.levels.statistics import LevelStatistics, level_statistics
from lightning_rmt.levels.verdict import FEWEST_LEVELS
from lightning_rmt.spectra.spectrum import Spectrum


def edge_statistics(spectrum: Spectrum, side: Literal["high", "low"], *, exact_products: bool) -> LevelStatistics:
    """Level statistics of the outermost consecutive eigenvalues at one end, without the outliers that can be counted.

    Every level is known to 0.02 of the mean spacing beside it (`Spectrum.spacing_run`). That takes many steps: at the edge
    of a GOE matrix of n = 2000, 100 steps give one such level, 400 give about 33 and 800 about 110. With fewer than 50 the
    verdict is "insufficient levels", with the number found.

    Args:
        spectrum: with at least one reorthogonalised run.
        side: ``"high"`` or ``"low"``.
        exact_products: whether the operator's products were exact up to rounding. Those of finite differences aren't, and
            their error isn't part of the residuals.

    Raises:
        ValueError: another side.
    """
    run = spectrum.spacing_run(side)
    found = spectrum.outliers.high if side == "high" else spectrum.outliers.low
    beyond = min(found.count or 0, run.size)
    levels = np.sort(run[beyond:]) if exact_products else np.empty(0)
    scale = max(abs(spectrum.lambda_max.value), abs(spectrum.lambda_min.value))
    result = level_statistics(
        levels,
        noise=spectrum.noise * scale,
        size=spectrum.size,
        norm=scale,
        keep_outliers=True,
        source=f"edge_{side}",
    )
    result = replace(result, outliers=beyond)
    end = "upper" if side == "high" else "lower"
    if not exact_products:
        return replace(result, verdict="insufficient levels: products were not exact, so that no level is certified")
    notes = result.notes
    if beyond:
        notes += (f"{beyond} outliers at the {end} end left out",)
    elif found.count is None:
        notes += (f"outliers at the {end} end could not be counted and are among the levels: {found.verdict}",)
    if result.levels < FEWEST_LEVELS:
        words = (
            f"insufficient levels (k<{FEWEST_LEVELS}): {levels.size} consecutive eigenvalues certified at the {end} end "
            f"besides {beyond} outliers, {result.levels} kept, {FEWEST_LEVELS} needed; raise the number of steps"
        )
        return replace(result, verdict=words, notes=notes)
    return replace(result, notes=notes)
