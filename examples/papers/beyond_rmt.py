"""Which ensemble a trained network's bulk looks like, and where its zeros come from.

Granziol 2020, arXiv:2006.07721. ``python examples/papers/beyond_rmt.py [--full] [--out docs/papers]``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from beyond_rmt_ensembles import FAMILIES, own_samples, percolated, products, selection
from beyond_rmt_figures import bulk_figure, ensemble_figure, misfit_figure, zero_figure
from beyond_rmt_networks import FULL, NETWORKS, QUICK, Classifier, Size, digits, watch
from beyond_rmt_zeros import zeros
from claims import Claims
from misfit import Misfit, without_largest
from torch import nn
from torch.utils.data import DataLoader

from lightning_rmt import Reading, Spectrum

TITLE = "Beyond random matrix theory: products and percolation"
REFERENCE = "Granziol 2020, arXiv:2006.07721"
ABOUT = """The paper's claims, of which only the abstract could be read: spectra of deep networks' Hessians deviate
strongly from the semicircle and from Marchenko and Pastur's law, even without their outliers; products of random
Wigner and Wishart matrices and percolated ones match better; both have a large discrete peak at zero, whose weight
is, for a product, set by the ratio of the dimensions of the weight matrices. First the ensembles, simulated. Then an
MLP and a CNN on scikit-learn's digits, watched by SpectrumMonitor: the nearest member of every family, by the
Wasserstein distance W1 from the whole bulk with its zeros, in floors (what a bulk's own law shows at this
resolution). Last, the zeros of a hidden layer's block against its width, from exact float64 eigenvalues."""
SAY = (
    "What reproduces: both networks, early and late, are far from a semicircle and from a Marchenko-Pastur law, and "
    "the best of products and percolated ensembles is nearer than either. At its first step the MLP's bulk can "
    "hardly be told from a product of Wigner and Wishart matrices.",
    "What doesn't: nearer isn't near. Once trained no family is within two floors, while samples of the ensembles "
    "are within 1.5, and the best of the new ones is a fifth nearer than the best of the old. Fits by free "
    "cumulants, those of `rank_laws`, are all rejected too; most products have no fit there, since the cumulants "
    "are those of a few large eigenvalues. The nine largest eigenvalues (classes less one) are taken out of every "
    "bulk whether `Spectrum.outliers` counts them or not: left in, they are most of its standard deviation, and the "
    "floor is then so wide that little can be told.",
    "The zeros. In a product of matrices the share of zeros is a matter of rank. For a linear network that is "
    "exactly so: the block of its hidden layer has 1 - min(h, 9) r / (65 h) zeros for the rank r of the inputs with "
    "the bias, since softmax over ten classes has nine directions. With tanh between the layers every sample weighs "
    "the hidden units differently, and none of these zeros is left, only those of pixels that never change. What "
    "Lanczos can't tell from zero there is a density that grows towards zero: its mass depends on how far one "
    "counts, and on the resolution.",
    "Left out: percolated Wishart matrices as a law other than by sites, and the paper's own normalisations, "
    "networks and data, which weren't at hand.",
)
#: What the networks' bulks are without: as many of the largest eigenvalues as there are classes, less one.
OUTLIERS = 9


def bulks(
    claims: Claims, size: Size, name: str, make: Callable[[int], nn.Module]
) -> tuple[list[Reading], list[dict[str, Misfit]]]:
    """Trains one network; the nearest member of every family at every reading."""
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(digits(), batch_size=256, shuffle=True)
    readings = watch(
        Classifier(make(size.width)), loader, size.epochs, every_n_steps=size.every, batches=size.batches, levels=None
    )
    rests = [without_largest(one.spectrum, OUTLIERS) for one in readings]
    fits = [{family.name: family.fit(rest, size.evaluations) for family in FAMILIES} for rest in rests]
    claims.show(
        name,
        f"steps of the readings below; {readings[0].spectrum.size} parameters",
        "",
        " → ".join(str(r.step) for r in readings),
    )
    counts = [(r.spectrum.outliers.low.count, r.spectrum.outliers.high.count) for r in readings]
    claims.show(
        name,
        "outliers that could be counted, below and above; the nine largest are taken out",
        "",
        " → ".join(f"{low}, {high}" for low, high in counts),
    )
    for family in FAMILIES:
        relative = [one[family.name].relative for one in fits]
        told = " → ".join(f"{value:.2f}" for value in relative)
        if family.new:
            claims.show(name, f"W1 in floors, {family.name}", "", told)
        else:
            claims.true(name, f"W1 in floors, {family.name}: deviates", "> 2 at every step", told, min(relative) > 2)
    new, old = (
        np.array([min(one[f.name].relative for f in FAMILIES if f.new is flag) for one in fits])
        for flag in (True, False)
    )
    claims.true(
        name,
        "best of products and percolated / best of the two others",
        "< 1 at every step",
        " → ".join(f"{r:.2f}" for r in new / old),
        bool((new < old).all()),
    )
    best = [min(one, key=lambda name: one[name].distance) for one in fits]
    claims.show(name, "nearest family", "", " → ".join(best))
    trained = new[1:]
    claims.negative(
        name,
        "they match, once trained: W1 in floors of the best of them",
        "about 1 if it were the law",
        " → ".join(f"{value:.2f}" for value in trained),
        bool(trained.min() > 2),
    )
    words = [[fit.word for fit in reading.laws.fits] for reading in readings[1:]]
    claims.true(
        name,
        "fits by free cumulants (rank_laws), trained: rejected of fitted",
        "all",
        " → ".join(f"{one.count('rejected')} of {len(one)}" for one in words),
        all(set(one) <= {"rejected"} for one in words),
    )
    peaks = [reading.spectrum.zero_mass for reading in readings]
    claims.show(
        name, "zero peak: mass that Lanczos can't tell from zero", "large", " → ".join(f"{mass:.2f}" for mass in peaks)
    )
    for share in (1e-4, 1e-3):
        masses = [near_zero(reading.spectrum, share) for reading in readings]
        claims.show(
            name, f"mass within {share:g} of the largest eigenvalue", "", " → ".join(f"{mass:.2f}" for mass in masses)
        )
    return readings, fits


def near_zero(spectrum: Spectrum, share: float) -> float:
    """Mass within a share of the largest eigenvalue."""
    reach = share * spectrum.lambda_max.value
    return float(spectrum.cdf(reach) - spectrum.cdf(-reach))


def main(arguments: list[str] | None = None) -> int:
    claims = Claims("beyond_rmt", TITLE, REFERENCE, ABOUT, arguments)
    size = QUICK if claims.quick else FULL if claims.full else Size()
    torch.set_num_threads(1)
    products(claims)
    percolated(claims, size.matrix)
    selection(claims, size.draws)
    own_samples(claims, 2 * size.matrix, size.evaluations)
    networks: Mapping[str, Any] = {name: bulks(claims, size, name, NETWORKS[name]) for name in size.networks}
    spectra, predicted = zeros(claims, size)
    for paragraph in SAY:
        claims.say(paragraph)
    claims.figure(
        ensemble_figure(),
        "ensembles",
        "The ensembles: one simulated matrix of size 1000 (bars) and the law (line), without the zeros.",
    )
    claims.figure(
        bulk_figure({name: (readings[-1], fits[-1]) for name, (readings, fits) in networks.items()}, OUTLIERS),
        "bulk",
        "Trained networks: share of the bulk's eigenvalues beyond a positive one, and the nearest member of each family.",
    )
    claims.figure(
        misfit_figure(networks),
        "misfit",
        "Distance of the nearest member of each family over the training. Shaded: what samples of the ensembles show.",
    )
    claims.figure(
        zero_figure(size.widths, predicted, spectra),
        "zeros",
        "The hidden layer's block of 64-h-10. Left: share of exact zeros against the width. Right: share of "
        "eigenvalues smaller than a multiple of the largest, for the largest width: a plateau down to rounding is an "
        "atom, a slope isn't.",
    )
    return claims.finish()


if __name__ == "__main__":
    sys.exit(main())
