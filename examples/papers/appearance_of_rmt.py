"""Appearance of random matrix theory in deep learning (Baskerville, Granziol and Keating 2021, arXiv:2102.06740).

Exact Hessians of single batches: do their eigenvalues repel as those of the GOE do? The paper's text beyond its opening
wasn't at hand: its procedures are those of the authors' code (npbaskerville/dnn-rmt-spacings), the numbers here are ours.

    (1) pooled unfolding    N(e) = #{eigenvalues of the other p batches < e} / p,    s_j = N(e_j+1) - N(e_j)
    (2) Wigner's surmise    P(s) = (pi s / 2) exp(-pi s^2 / 4);    without repulsion (Poisson) exp(-s)
    (3) spacing ratios      r_j = (e_j+2 - e_j+1) / (e_j+1 - e_j),    P(r) = 27/8 (r + r^2) / (1 + r + r^2)^(5/2)
    (4) and their mean      <min(r, 1/r)>: .5307 for the GOE, 2 ln 2 - 1 = .3863 for Poisson (Atas et al. 2013)
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from appearance_of_rmt_figures import ratio_figure, ritz_figure, spacing_figure
from claims import Claims
from scipy.linalg import eigvalsh_tridiagonal
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from training import Supervised, diabetes, digits, fit

from lightning_rmt import Hessian, LevelStatistics, estimate_spectrum, level_statistics
from lightning_rmt.laws import Semicircle
from lightning_rmt.levels.spacings import GOE_RATIO, POISSON_RATIO, TWO_BLOCK_RATIO, spacing_ratios
from lightning_rmt.levels.unfolding import pooled_unfold

TITLE, REFERENCE = "Appearance of random matrix theory", "Baskerville, Granziol and Keating 2021, arXiv:2102.06740"
ABOUT = """Level statistics of exact batch Hessians: softmax regression (650 parameters) and an MLP 64-10-10 (760) on
scikit-learn's digits, an MLP 10-24-16-1 (681) for regression on its diabetes data, untrained and after 100 epochs of SGD.
`SpectrumMonitor(levels=["net"])` on a real Trainer takes the Hessian of every batch of an epoch, entry by entry in float64.
The code that the authors published computes spectra at fresh weights whatever checkpoint it is given, so both are shown."""
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
    """Eigenvalues of a GOE matrix from its tridiagonal form (Dumitriu and Edelman 2002)."""
    off = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1)))
    return eigvalsh_tridiagonal(rng.normal(0, 2**0.5, n), off, lapack_driver="sterf")


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


class Model(NamedTuple):
    name: str
    net: nn.Module
    loss: object
    data: tuple[Tensor, Tensor]
    batch: int


def models(claims: Claims) -> list[Model]:
    pl.seed_everything(0, verbose=False)
    mlp = partial(_mlp, (64, 32, 32, 10) if claims.full else (64, 10, 10))
    regression = partial(_mlp, (10, 48, 32, 1) if claims.full else (10, 24, 16, 1))
    every = [
        Model("softmax regression", nn.Linear(64, 10), cross_entropy, digits(), 64),
        Model("MLP, digits", mlp(), cross_entropy, digits(), 64),
        Model("MLP, diabetes", regression(), mse_loss, diabetes(), 32),
    ]
    return every[:1] if claims.quick else every


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch_spectra(model: Model, epochs: int, rate: float) -> np.ndarray:
    """Exact spectra of all batches of the last epoch, shape (batches, parameters)."""
    module = Supervised(model.net, model.loss, partial(torch.optim.SGD, lr=rate, momentum=0.9))
    batches = len(model.data[0]) // model.batch
    watch = {"batches": batches, "levels": ["net"], "lanczos_steps": 20, "noise": False}
    return fit(module, model.data, epochs=epochs, batch=model.batch, **watch).levels[0].eigenvalues


def networks(claims: Claims, every: list[Model]) -> dict[str, np.ndarray]:
    """Spectra untrained (a learning rate of 0) and trained; the networks are trained afterwards."""
    spectra: dict[str, np.ndarray] = {}
    for model in every:
        spectra[f"{model.name}, untrained"] = batch_spectra(model, epochs=1, rate=0.0)
        spectra[f"{model.name}, trained"] = batch_spectra(model, epochs=300 if claims.full else 100, rate=0.01)
    rng = np.random.default_rng(2)
    for name, levels in spectra.items():
        found, distances = level_statistics(levels), unfolded(levels)
        control = level_statistics(goe_of_density(levels, rng))
        degenerate = name == "softmax regression, untrained"
        expected = {"softmax regression, untrained": 0.473, "softmax regression, trained": 0.527}.get(name)
        if expected is not None and not claims.full:
            claims.near("(4)", f"{name}: ratio", found.spacing_ratio, expected, within=0.01, stderr=found.stderr)
        if degenerate:
            ours = f"{found.spacing_ratio:.3f} ± {found.stderr:.3f}, {found.z_goe:.0f} sd"
            claims.negative("abstract, (4)", f"{name}: ratio of the GOE", f"{GOE_RATIO}", ours, found.z_goe < -5)
            gap = f"{distances.wigner:.3f} and {distances.poisson:.3f}"
            far = distances.wigner > 0.7 * distances.poisson
            claims.negative("abstract, (1)", f"{name}: nearer to Wigner than to Poisson", "near and far", gap, far)
        else:
            claims.near("(4)", f"{name}: ratio, GOE", found.spacing_ratio, GOE_RATIO, within=0.015, stderr=found.stderr)
            claims.between("(4)", f"{name}: ratio, sd from Poisson", found.z_poisson, low=15)
            share = distances.wigner / distances.poisson
            claims.between("(1), (2)", f"{name}: distance from Wigner over that from Poisson", share, high=0.7)
        if name == "softmax regression, trained" and not claims.quick:
            claims.near("(1), (2)", f"{name}: distance from Wigner", distances.wigner, 0.0565, within=0.03)
            claims.near("(1), (2)", f"{name}: distance from Poisson", distances.poisson, 0.2021, within=0.05)
        against_the_same_density(claims, name, found, control)
    return spectra


def goe_of_density(spectra: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """As many spectra of GOE levels, spread like these: what the unfolding makes of this density."""
    kept = [levels[np.abs(levels) > AUTHORS_ZERO] for levels in spectra]
    count = sum(levels.size for levels in kept) // len(kept)
    pool = np.sort(np.concatenate(kept))[: count * len(kept)]
    profile = pool.reshape(count, len(kept)).mean(axis=1)  # the level of each rank
    law, ranks = Semicircle(2.0), np.arange(count)
    ideal = [law.cdf(goe(count, rng) / count**0.5) * count - 0.5 for _ in kept]
    return [np.unique(np.interp(rank, ranks, profile)) for rank in ideal]


def against_the_same_density(claims: Claims, name: str, found: LevelStatistics, control: LevelStatistics) -> None:
    """The shape of the whole distribution, by one number: Brody's exponent."""
    error = float(np.hypot(found.brody_goe[1], control.brody_goe[1]))
    where, quantity = "(2)", f"{name}: Brody exponent, GOE levels of this density"
    if name == "softmax regression, untrained":
        ours = f"{found.brody:.2f} ± {error:.2f}"
        refuted = found.brody < control.brody - 8 * error
        claims.negative(where, quantity, f"{control.brody:.2f}", ours, refuted)
    else:
        claims.near(where, quantity, found.brody, control.brody, within=0.12, stderr=error)
    claims.show("", f"{name}: unfolding alone, p of those GOE levels", "above .05", f"{control.p_value:.2g}")


def dense(model: Model, dtype: torch.dtype, first: int) -> np.ndarray:
    """The Hessian of one batch of the data in their order, as the authors' code takes it: from one product per parameter."""
    net = copy.deepcopy(model.net).to(dtype)
    x, y = (part[first : first + model.batch] for part in model.data)
    hessian = Hessian(lambda batch: model.loss(net(batch[0]), batch[1]), net.parameters(), [(x.to(dtype), y)])
    hessian.at_once = True
    matrix = hessian.matmat(torch.eye(hessian.size, dtype=dtype))
    return ((matrix + matrix.T) / 2).numpy()


def zeros(claims: Claims, model: Model) -> None:
    """A softmax doesn't see a shift of all scores, nor a dark pixel: what a cut at zero does to its null space."""
    batches = range(0, (9 if claims.quick else 28) * model.batch, model.batch)
    pairs = [(dense(model, torch.float64, first), dense(model, torch.float32, first)) for first in batches]
    noise = max(np.linalg.norm(single - double, 2) for double, single in pairs)  # of the products, measured
    doubles, singles = ([np.linalg.eigvalsh(matrix) for matrix in side] for side in zip(*pairs, strict=True))
    exact = level_statistics(doubles)
    rounded = level_statistics([one.astype(np.float64) for one in singles], noise=noise)
    size = len(doubles) * doubles[0].size
    claims.between(
        "zero cut", "share of levels kept, float64", exact.levels / size, 0.6, 0.8, source="ours before: .65 to .72"
    )
    claims.between("zero cut", "share of levels kept, float32", rounded.levels / size, 0.3, 0.6)
    error = float(np.hypot(exact.stderr, rounded.stderr))
    difference = rounded.spacing_ratio - exact.spacing_ratio
    claims.near("zero cut", "ratio in float32 less that in float64", difference, 0.0, within=2 * error, stderr=error)
    null = np.concatenate([spacing_ratios(one[(np.abs(one) < 1e-14) & (np.abs(one) > 1e-30)]) for one in doubles])
    claims.near(
        "zero cut",
        "ratio of the null space, float64: rounding repels, too",
        null.mean(),
        GOE_RATIO,
        within=0.04,
        stderr=0.308 / null.size**0.5,
    )
    kept = np.mean([np.mean(np.abs(one) > 1e-20) for one in singles])
    claims.negative(
        "|e| > 1e-20, authors' code",
        "leaves out the null space in float32",
        f"keeps {exact.levels / size:.0%}, as in float64",
        f"keeps {kept:.0%}: rounding is rarely an exact zero",
        kept > exact.levels / size + 0.08,
    )


class Diagonal:
    """An operator with these eigenvalues: Lanczos can't tell it from a dense one."""

    def __init__(self, eigenvalues: np.ndarray) -> None:
        self.values = torch.tensor(eigenvalues)
        self.size, self.device, self.dtype = len(eigenvalues), torch.device("cpu"), torch.float64

    def matmat(self, V: Tensor) -> Tensor:
        return V * self.values


def ritz_trap(claims: Claims, levels: np.ndarray) -> dict[str, tuple[np.ndarray, list[float], float]]:
    """What a look at Ritz values or at a random projection would have said, and that it is refused."""
    n, rng = 800 if claims.quick else 2000, np.random.default_rng(1)
    shares = np.array([0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
    known = {"GOE": goe(n, rng), "independent levels": np.sort(rng.uniform(-1, 1, n)), "softmax regression": levels[0]}
    curves = {}
    for name, exact in known.items():
        ratios = []
        for share in shares:
            spectrum = estimate_spectrum(Diagonal(exact), steps=round(share * exact.size), probes=1, seed=0)
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
                within=0.06 if claims.quick else 0.03,
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


def main(arguments: list[str] | None = None) -> int:
    claims = Claims("appearance_of_rmt", TITLE, REFERENCE, ABOUT, arguments)
    torch.set_num_threads(1)
    calibrate(claims)
    every = models(claims)
    spectra = networks(claims, every)
    trained = spectra["softmax regression, trained"]
    zeros(claims, every[0])
    curves = ritz_trap(claims, trained)
    claims.say(
        "The trained networks' levels repel as the GOE's do, and so do the untrained MLPs'; an untrained softmax regression's "
        "don't: its Hessian is nearly a Kronecker product, so that levels come in near-degenerate groups of nine. "
        "Brody's exponent is .957 for GOE levels of a moderate density. Here the density spans nine decades, more than the four "
        "for which the package's unfolding and its p-values were calibrated, so each network is compared with GOE levels "
        "spread like its own: those have exponents of .6 to .9 and p-values far below .05 as well. The words 'the "
        "spacings aren't the GOE's' in a verdict on such a block mean the unfolding, the mean ratio needs none."
    )
    claims.figure(
        spacing_figure({name: unfolded(levels).spacings for name, levels in spectra.items()}),
        "spacings",
        "Spacings after pooled unfolding (1), batches of 64 (diabetes: 32), with Wigner's surmise and Poisson (2).",
    )
    claims.figure(
        ratio_figure({name: (levels, level_statistics(levels)) for name, levels in spectra.items()}, AUTHORS_ZERO),
        "ratios",
        "Left: spacing ratios (3). Right: their mean (4) with two standard errors.",
    )
    claims.figure(
        ritz_figure(curves),
        "ritz",
        "The mean ratio of Ritz values (middle 80 %) after m Lanczos steps on an n x n matrix; dashed: that of its exact "
        "eigenvalues. Any value can be had, from any matrix.",
    )
    return claims.finish()


if __name__ == "__main__":
    sys.exit(main())
