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
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from appearance_of_rmt_controls import AUTHORS_ZERO, calibrate, goe_of_density, ritz_trap, unfolded
from appearance_of_rmt_figures import ratio_figure, ritz_figure, spacing_figure
from claims import Claims, number
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from training import Supervised, diabetes, digits, fit

from lightning_rmt import Hessian, LevelStatistics, level_statistics
from lightning_rmt.levels.reference import moments
from lightning_rmt.levels.spacings import GOE_RATIO, spacing_ratios

TITLE, REFERENCE = "Appearance of random matrix theory", "Baskerville, Granziol and Keating 2021, arXiv:2102.06740"
ABOUT = """Level statistics of exact batch Hessians: softmax regression (650 parameters) and an MLP 64-10-10 (760) on
scikit-learn's digits, an MLP 10-24-16-1 (681) for regression on its diabetes data, untrained and after 100 epochs of
SGD. `SpectrumMonitor(levels=["net"])` on a real Trainer takes the Hessian of every batch of an epoch, entry by entry
in float64. The code that the authors published computes spectra at fresh weights whatever checkpoint it is given, so
both are shown."""
SAY = """The trained networks' levels repel as the GOE's do, and so do the untrained MLPs'. An untrained softmax
regression's don't: its Hessian is nearly a Kronecker product, so that its levels come in near-degenerate groups.

How near is a matter of the training: over three seeds the trained networks' mean ratios went from .515 to .539, where
the error within one training is .003. So .02 is asserted. It excludes Poisson, not small differences from the GOE.

Brody's exponent is .957 for GOE levels of a moderate density. Here the density spans nine decades and has features of
its own. So each network is compared with GOE levels spread like its own. A p-value is refused where the fitted mean
spacing is far off, whatever the reason. That of the untrained MLP on diabetes is given, and small; GOE levels of nearly
its density are refused, so that it may be the unfolding's. The mean ratio needs none. Five of the six exponents are
below the comparison's by more than four of their errors: near the GOE's, and not the same, unless the density has
features finer than some five levels, which the comparison lacks."""


class Model(NamedTuple):
    name: str
    net: nn.Module
    loss: object
    data: tuple[Tensor, Tensor]
    batch: int


def models(claims: Claims) -> list[Model]:
    pl.seed_everything(0, verbose=False)
    mlp = partial(_mlp, (64, 24, 24, 10) if claims.full else (64, 10, 10))
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
    epochs = 300 if claims.full else 50 if claims.quick else 100
    for model in every:
        spectra[f"{model.name}, untrained"] = batch_spectra(model, epochs=1, rate=0.0)
        spectra[f"{model.name}, trained"] = batch_spectra(model, epochs=epochs, rate=0.01)
    rng = np.random.default_rng(2)
    for name, levels in spectra.items():
        found, distances = level_statistics(levels), unfolded(levels)
        control = level_statistics(goe_of_density(levels, rng))
        degenerate = name == "softmax regression, untrained"
        expected = {"softmax regression, untrained": 0.473, "softmax regression, trained": 0.527}.get(name)
        if expected is not None and not claims.full:
            claims.near("(4)", f"{name}: ratio", found.spacing_ratio, expected, within=0.02, stderr=found.stderr)
        if degenerate:
            ours = f"{found.spacing_ratio:.3f} ± {found.stderr:.3f}, {found.z_goe:.0f} sd"
            claims.negative("abstract, (4)", f"{name}: ratio of the GOE", f"{GOE_RATIO}", ours, found.z_goe < -5)
            gap = f"{distances.wigner:.3f} and {distances.poisson:.3f}"
            far = distances.wigner > 0.7 * distances.poisson
            claims.negative("abstract, (1)", f"{name}: nearer to Wigner than to Poisson", "near and far", gap, far)
        else:
            # trainings differ by more than the error of one: over three seeds by up to .016
            claims.near("(4)", f"{name}: ratio, GOE", found.spacing_ratio, GOE_RATIO, within=0.02, stderr=found.stderr)
            claims.show("(4)", f"{name}: ratio, standard errors from GOE", "0", f"{found.z_goe:+.1f}")
            claims.between("(4)", f"{name}: ratio, sd from Poisson", found.z_poisson, low=15)
            share = distances.wigner / distances.poisson
            claims.between("(1), (2)", f"{name}: distance from Wigner over that from Poisson", share, high=0.7)
        if name == "softmax regression, trained" and not claims.quick:
            claims.near("(1), (2)", f"{name}: distance from Wigner", distances.wigner, 0.0565, within=0.03)
            claims.near("(1), (2)", f"{name}: distance from Poisson", distances.poisson, 0.2021, within=0.05)
        against_the_same_density(claims, name, found, control)
    return spectra


def against_the_same_density(claims: Claims, name: str, found: LevelStatistics, control: LevelStatistics) -> None:
    """The shape of the whole distribution, by one number: Brody's exponent; and what a verdict may rest on."""
    error = float(np.hypot(brody_error(found), brody_error(control)))
    where, quantity = "(2)", f"{name}: Brody exponent, GOE levels of this density"
    ours = number(found.brody, error)
    if name == "softmax regression, untrained":
        refuted = found.brody < control.brody - 8 * error
        claims.negative(where, quantity, f"{control.brody:.2f}", ours, refuted)
    else:
        claims.show(where, quantity, f"{control.brody:.3f}", ours)
    told = [word(one.p_value) for one in (control, found)]
    claims.show("", f"{name}: p, GOE levels of this density and its own", told[0], told[1])


def brody_error(found: LevelStatistics) -> float:
    """As for GOE levels, as many in as many spectra."""
    return moments("brody", found.levels // found.spectra).sd / found.spectra**0.5


def word(p: float | None) -> str:
    return "refused: too uneven to be unfolded" if p is None else f"{p:.2g}"


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


def main(arguments: list[str] | None = None) -> int:
    claims = Claims("appearance_of_rmt", TITLE, REFERENCE, ABOUT, arguments)
    torch.set_num_threads(1)
    calibrate(claims)
    every = models(claims)
    spectra = networks(claims, every)
    trained = spectra["softmax regression, trained"]
    zeros(claims, every[0])
    curves = ritz_trap(claims, trained)
    claims.say(SAY)
    claims.figure(
        spacing_figure(
            {name: (unfolded(levels).spacings, len(levels) - len(levels) // 3) for name, levels in spectra.items()}
        ),
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
