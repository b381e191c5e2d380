"""Numbers and verdicts in few words, as titles, tables and notes show them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from lightning_rmt.levels.verdict import Z_LIMIT

if TYPE_CHECKING:
    from lightning_rmt.laws.fit import Fit
    from lightning_rmt.laws.ranking import Ranking
    from lightning_rmt.levels.statistics import LevelStatistics
    from lightning_rmt.spectra.spectrum import Spectrum


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, without padding: 1234.5 -> 1.23e3, 10.4 -> 10.4, 2.1e-07 -> 2.1e-7."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0.0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if -3 <= exponent < max(digits, 4):
        return f"{rounded:.{max(digits - 1 - exponent, 0)}f}"
    mantissa = f"{rounded / 10.0**exponent:.{digits - 1}f}"
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{exponent}"


def with_error(value: float, error: float) -> str:
    """``value ± error`` to the digits that the error leaves: (63.17, 1.62) -> 63.2 ± 1.6; (1.5, 2e-8) -> 1.500 ± 2e-8."""
    if not math.isfinite(error):
        return number(value, 4)
    if error <= 2e-4 * abs(value):  # writing out all the digits that are known would hide the number
        return f"{number(value, 4)} ± {number(error, 1)}"
    scale = max(abs(value), error)
    if scale == 0.0:
        return "0 ± 0"
    exponent = math.floor(math.log10(scale))
    power = 0 if -3 <= exponent < 5 else exponent
    value, error = value / 10.0**power, error / 10.0**power
    decimals = max(1 - math.floor(math.log10(error)), 0) if error else 3
    text = f"{value:.{decimals}f} ± {error:.{decimals}f}"
    return f"({text})e{power}" if power else text


def typeset(text: str) -> str:
    """Numbers in ``text`` as Matplotlib sets them: 1.04e-5 with a raised exponent, -2 with a minus sign."""
    text = re.sub(r"(?<![\d.])1e(-?\d+)", r"$10^{\1}$", text)
    text = re.sub(r"(?<=[\d)])e(-?\d+)", r"$\\times10^{\1}$", text)
    return re.sub(r"(?<![\w{^])-(?=\d)", "−", text)


def outlier_words(spectrum: Spectrum) -> str:
    """The outlier verdict in a title's length: ``9 outliers (gap ×5.3) above, none below``."""
    parts = []
    for side, found in (("above", spectrum.outliers.high), ("below", spectrum.outliers.low)):
        if found.count is None:
            continue
        if found.count == 0:
            parts.append(f"none {side}")
            continue
        likely = "probably " if found.kind == "gap" and found.confidence < 2 else ""
        least = ">= " if found.at_least else ""
        gap = f" (gap ×{number(found.gap_ratio, 2)})" if found.kind == "gap" and found.gap_ratio else ""
        plural = "s" if found.count > 1 else ""
        parts.append(f"{likely}{least}{found.count} outlier{plural} {side}{gap}")
    if not parts:
        return f"no outlier count{_widest_gap(spectrum)}"
    if parts == ["none above", "none below"]:
        return "no outliers"
    return ", ".join(parts)


def _widest_gap(spectrum: Spectrum) -> str:
    high = spectrum.outliers.high
    if high.gap_ratio is None or high.gap_index is None or high.gap_spacings is None:
        return ""
    return (
        f": widest gap ×{number(high.gap_ratio)} after {high.gap_index}, {number(high.gap_spacings, 2)} local spacings"
    )


def law_tag(name: str) -> str:
    """A law's name as a tag has it: ``MarchenkoPastur`` -> ``marchenko_pastur``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def law_name(fit: Fit) -> str:
    """A law's name as people write it: ``MarchenkoPastur`` -> ``Marchenko-Pastur``."""
    name = type(fit.law).__name__
    known = {"MarchenkoPastur": "Marchenko-Pastur", "WishartPlusWigner": "Wishart + Wigner"}
    return known.get(name, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def law_words(laws: Ranking) -> str:
    """The laws in a line: ``every law is rejected; nearest Marchenko-Pastur (12 floors) ...``."""
    if not laws.fits:
        return "no law could be fitted to the bulk"
    simplest = laws.simplest
    if simplest is not None:
        others = [law_name(fit) for fit in laws.fits if fit is not simplest and fit.word == "indistinguishable"]
        also = f"; nor can it be told from {', '.join(others)}" if others else ""
        return f"bulk can't be told from {law_name(simplest)} at resolution 1/{simplest.steps}{also}"
    nearest = laws.fits[0]
    if nearest.word == "weak misfit":
        return f"weak misfit at best: {law_name(nearest)}, {number(nearest.relative, 2)} floors away"
    return f"every law is rejected; the nearest is {law_name(nearest)}, {number(nearest.relative, 2)} floors away"


def level_words(scope: str, found: LevelStatistics) -> str:
    """Level statistics in a title's length: ``head: levels repel, ratio 0.526 ± 0.013 (GOE 0.531, Poisson 0.386)``."""
    if found.spacing_ratio is None or found.stderr is None or found.verdict_kind == "insufficient":
        return f"{shortened(scope)}: too few levels for statistics ({found.levels})"
    said = {
        "repel": "levels repel",
        "no_repulsion": "no level repulsion",
        "intermediate": "levels between GOE and Poisson",
        "regular": "levels more regular than GOE",
        "degenerate": "degenerate levels",
    }[found.verdict_kind]
    if found.verdict_kind == "intermediate" and found.z_goe is not None and found.z_goe > -Z_LIMIT:
        said = "ratio as GOE's, but not the spacings"
    ratio = with_error(found.spacing_ratio, found.stderr)
    return f"{shortened(scope)}: {said}, ratio {ratio} (GOE 0.531, Poisson 0.386)"


def shortened(name: str, most: int = 24) -> str:
    """The name with its middle left out where it is longer than a title has room for."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def operator_words(curvature: str, preconditioned: str | None = None) -> str:
    """What the eigenvalues belong to, for axis labels: ``"ggn"`` -> ``"Gauss-Newton matrix"``; and in whose metric."""
    known = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "gradient_covariance": "gradient covariance"}
    metric = "" if preconditioned is None else f" in {preconditioned}'s metric"
    return f"{known.get(curvature, curvature)}{metric}"
