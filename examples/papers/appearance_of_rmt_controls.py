"""`appearance_of_rmt` where the answer is known: random matrices, and the ways to find repulsion in anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from claims import Claims
from misfit import measured
from scipy.interpolate import PchipInterpolator
from scipy.stats import kstest

from lightning_rmt import level_statistics
from lightning_rmt.laws import Semicircle
from lightning_rmt.levels.spacings import GOE_RATIO, POISSON_RATIO, TWO_BLOCK_RATIO, spacing_ratios
from lightning_rmt.levels.unfolding import pooled_unfold

#: Levels nearer to zero are zeros; in float64 (3) of the authors' code.
AUTHORS_ZERO = 1e-10


def wigner(s):
    """Distribution function of (2)."""
    return -np.expm1(-np.pi / 4 * np.square(s))


def poisson(s):
    return -np.expm1(-np.asarray(s))


class Distances(NamedTuple):
    """Kolmogorov-Smirnov distances of unfolded spacings (1) from (2), and their mean."""

    wigner: float
    poisson: float
    mean: float
    spacings: np.ndarray


def unfolded(spectra: Sequence[np.ndarray]) -> Distances:
    kept = [levels[np.abs(levels) > AUTHORS_ZERO] for levels in spectra]
    s = np.concatenate(pooled_unfold(kept))
    return Distances(kstest(s, wigner).statistic, kstest(s, poisson).statistic, s.mean(), s)


def goe(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues of a GOE matrix, from -2 to 2."""
    return Semicircle(2.0).rvs(n, rng)


def calibrate(claims: Claims) -> None:
    """What the procedures say where the answer is known."""
    rng = np.random.default_rng(0)
    known = {
        "GOE": ([goe(300, rng) for _ in range(40)], GOE_RATIO),
        "independent levels": ([np.sort(rng.uniform(-1, 1, 300)) for _ in range(40)], POISSON_RATIO),
        "two GOE blocks": ([np.sort(np.append(goe(150, rng), goe(150, rng))) for _ in range(40)], TWO_BLOCK_RATIO),
    }
    for name, (spectra, expected) in known.items():
        found = level_statistics(spectra, keep_outliers=True)
        claims.near(
            "(4)", f"ratio, {name}, 40 spectra of 300", found.spacing_ratio, expected, within=0.01, stderr=found.stderr
        )
    at_goe, at_poisson = unfolded(known["GOE"][0]), unfolded(known["independent levels"][0])
    claims.between("(1), (2)", "GOE: distance from Wigner", at_goe.wigner, high=0.05)
    claims.between("(1), (2)", "GOE: distance from Poisson", at_goe.poisson, low=0.15)
    claims.between("(1), (2)", "independent levels: distance from Poisson", at_poisson.poisson, high=0.05)
    claims.near("(1)", "GOE: mean unfolded spacing", at_goe.mean, 1.0, within=0.02)

    spectra = [goe(100, rng) for _ in range(150 if claims.quick else 600)]
    found = [level_statistics(levels, keep_outliers=True) for levels in spectra]
    rejected = np.mean([one.p_value < 0.05 for one in found])
    error = np.sqrt(0.05 * 0.95 / len(found))
    claims.near("(2)", "GOE spectra of 100 rejected at p < .05", rejected, 0.05, within=0.03, stderr=error)
    local = [np.diff(levels[10:-10]) for levels in spectra]
    naive = np.mean([kstest(s / s.mean(), wigner).pvalue < 0.05 for s in local])
    claims.between("(2)", "the same by scipy's kstest, made for independent draws", naive, high=0.02)


def goe_of_density(spectra: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """As many spectra of GOE levels, spread like these: what the unfolding makes of this density.

    Either side of zero has the density of the logarithms of all spectra's levels, smooth over some five levels of one (it
    isn't known better: every spectrum's own spacings would come through). The zeros between stay zeros.
    """
    zeros = round(float(np.mean([(np.abs(levels) <= AUTHORS_ZERO).sum() for levels in spectra])))
    low, high = (_by_rank([np.sort(way * s[way * s > AUTHORS_ZERO]) for s in spectra]) for way in (-1, 1))
    count = low.count + high.count
    made = []
    for _ in spectra:
        ranks = Semicircle(2.0).cdf(goe(count, rng)) * count - 0.5
        below, above = ranks[ranks < low.count - 0.5], ranks[ranks >= low.count - 0.5]
        parts = -low.level(low.count - 1 - below), np.zeros(zeros), high.level(above - low.count)
        made.append(np.concatenate(parts))
    return made


class _Ranked(NamedTuple):
    """How many levels a side has, and the level of a rank."""

    count: int
    level: Callable[[np.ndarray], np.ndarray]


def _by_rank(sides: Sequence[np.ndarray]) -> _Ranked:
    pool = np.sort(np.concatenate(sides))
    count = pool.size // len(sides)
    if count < 12:
        return _Ranked(0, lambda ranks: ranks)
    logs = np.log(pool[: count * len(sides)]).reshape(count, len(sides)).mean(axis=1)
    knots = np.linspace(0, count - 1, 2 + count // 5).round().astype(int)
    ends = 2 * logs[0] - logs[1], 2 * logs[-1] - logs[-2]
    smooth = PchipInterpolator([-1, *knots, count], [ends[0], *logs[knots], ends[1]])
    return _Ranked(count, lambda ranks: np.exp(smooth(ranks)))


def ritz_trap(claims: Claims, levels: np.ndarray) -> dict[str, tuple[np.ndarray, list[float], float]]:
    """What a look at Ritz values or at a random projection would have said, and that it is refused."""
    n, rng = 800 if claims.quick else 2000, np.random.default_rng(1)
    shares = np.array([0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
    known = {"GOE": goe(n, rng), "independent levels": np.sort(rng.uniform(-1, 1, n)), "softmax regression": levels[0]}
    curves = {}
    for name, exact in known.items():
        ratios = []
        for share in shares:
            spectrum = measured(exact, steps=round(share * exact.size))
            ritz = spectrum.runs[0].nodes
            ratios.append(float(spacing_ratios(ritz[ritz.size // 10 : ritz.size - ritz.size // 10]).mean()))
        curves[name] = shares, ratios, level_statistics(exact).spacing_ratio
    for name, expected in (("GOE", (0.877, 0.618)), ("independent levels", (0.849, 0.548))):
        for place, number in zip((0, 4), expected, strict=True):
            claims.near(
                "Ritz values",
                f"their ratio, {name}, m/n = {shares[place]:g}",
                curves[name][1][place],
                number,
                within=0.06,  # four standard deviations: .015 for 100 Ritz values
            )
    k = round(0.3 * n)
    basis = np.linalg.qr(rng.standard_normal((n, k)))[0]
    projected = np.linalg.eigvalsh((basis.T * known["independent levels"]) @ basis)
    claims.near(
        "projections",
        f"ratio of independent levels seen through {k} of {n} random directions",
        spacing_ratios(projected).mean(),
        0.53,
        within=0.03,
        stderr=0.308 / k**0.5,
    )
    try:
        level_statistics(spectrum)
        refusal = "accepted"
    except TypeError as error:
        refusal = str(error)
    claims.true("Ritz values", "level_statistics(Spectrum)", "refused", refusal[:60] + "...", "Ritz" in refusal)
    return curves
