"""Which ensemble a trained network's bulk looks like, and where its zeros come from.

Granziol 2020, arXiv:2006.07721. ``python examples/papers/beyond_rmt.py [--full] [--out docs/papers]``
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from beyond_rmt_ensembles import FAMILIES, own_samples, percolated, products, selection
from beyond_rmt_figures import bulk_figure, ensemble_figure, misfit_figure, zero_figure
from claims import Claims
from misfit import Misfit, without_largest
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import Reading, Spectrum, SpectrumMonitor

TITLE = "Beyond random matrix theory: products and percolation"
REFERENCE = "Granziol 2020, arXiv:2006.07721"
ABOUT = """The paper's claims, of which only the abstract could be read: spectra of deep networks' Hessians deviate
strongly from the semicircle and from Marchenko and Pastur's law, even without their outliers; products of random
Wigner and Wishart matrices and percolated ones match better; both have a large discrete peak at zero, whose weight
is, for a product, set by the ratio of the dimensions of the weight matrices. First the ensembles, simulated (numbers
of theory.md section 4). Then an MLP and a CNN on scikit-learn's digits, watched by SpectrumMonitor: the nearest
member of every family, by the Wasserstein distance W1 from the whole bulk with its zeros, in floors (what a bulk's
own law shows at this resolution). Last, the zeros of a hidden layer's block against its width, from exact float64
eigenvalues."""
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


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        matrix: size of the simulated matrices.
        draws: samples of every ensemble.
        width: of the MLP's layers; the CNN has a quarter as many channels.
        epochs: of the training, of 8 steps each.
        every: steps from one reading to the next.
        batches: of 256 digits, in a curvature.
        widths: of the hidden layer whose zeros are counted.
        samples: for that.
        passes: over them.
        evaluations: of a distance, for the nearest member of a family.
        networks: that are trained.
    """

    matrix: int = 1000
    draws: int = 4
    width: int = 32
    epochs: int = 101
    every: int = 400
    batches: int = 4
    widths: tuple[int, ...] = (6, 12, 20, 32)
    samples: int = 400
    passes: int = 101
    evaluations: int = 250
    networks: tuple[str, ...] = ("MLP", "CNN")


QUICK = Size(
    matrix=400,
    draws=1,
    width=16,
    epochs=16,
    every=120,
    batches=1,
    widths=(6, 14),
    samples=150,
    passes=21,
    evaluations=30,
    networks=("MLP",),
)
FULL = Size(
    matrix=3000, draws=20, width=256, epochs=1001, every=2000, batches=7, widths=(8, 16, 32, 48, 60), samples=1797
)


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    first, second = width // 4, width // 2
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * second, 10)),
    )


NETWORKS = {"MLP": mlp, "CNN": cnn}


def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target))


def watch(module: Classifier, loader: DataLoader, epochs: int, **monitor: Any) -> list[Reading]:
    """Trains under a SpectrumMonitor and loads what it saved."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for words in (".*many workers.*", ".*smaller than the logging interval.*", ".*GPU available.*", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", words)
        logging.disable(logging.INFO)
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            devices=1,
            logger=CSVLogger(folder),
            callbacks=[SpectrumMonitor(noise=False, on_error="raise", figures_every=0, **monitor)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, loader)
        logging.disable(logging.NOTSET)
        return [Reading.load(path) for path in sorted(Path(folder).rglob("*.npz"))]


# --- which law fits the bulk -----------------------------------------------------------------------------------------


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


# --- zeros of a hidden layer against its width -----------------------------------------------------------------------


def zeros(claims: Claims, size: Size) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """Exact eigenvalues of the hidden layer's block, linear and tanh, at the first step and trained."""
    images, labels = digits().tensors
    images, labels = images[: size.samples], labels[: size.samples]
    inputs = torch.cat([images, torch.ones(len(images), 1)], 1).double()
    rank = int(torch.linalg.matrix_rank(inputs))
    widths = np.array(size.widths)
    predicted = 1 - np.minimum(widths, 9) * rank / (65 * widths)
    claims.show(
        "zeros by rank",
        f"hidden widths h of 64-h-10; rank of the inputs and the bias: {rank} of 65",
        "",
        ", ".join(map(str, widths)),
    )
    spectra: dict[str, list[np.ndarray]] = {}
    for name, activation in (("linear", nn.Identity), ("tanh", nn.Tanh)):
        for width in size.widths:
            pl.seed_everything(0, verbose=False)
            net = nn.Sequential(nn.Linear(64, width), activation(), nn.Linear(width, 10))
            loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
            readings = watch(
                Classifier(net, 1e-2),
                loader,
                size.passes,
                every_n_steps=size.passes - 1,
                levels=["net.0"],
                lanczos_steps=20,
            )
            for when, reading in zip(("first step", "trained"), readings, strict=True):
                spectra.setdefault(f"{name}, {when}", []).append(np.sort(np.abs(reading.levels[0].eigenvalues[0])))
    shares = {name: np.array([exact_zeros(one) for one in found]) for name, found in spectra.items()}

    def told(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    ratio = "product: 1 - min(h, 9) r / (65 h)"
    off = np.abs(shares["linear, first step"] - predicted)
    claims.true(
        ratio,
        "zeros of the hidden block, linear network, first step",
        told(predicted),
        told(shares["linear, first step"]),
        off.max() < 1e-9,
    )
    trained = shares["linear, trained"]
    claims.true(
        ratio,
        "the same, trained (eigenvalues of fitted samples vanish, too)",
        told(predicted),
        told(trained),
        np.abs(trained - predicted).max() < 0.05,
    )
    constant = 1 - rank / 65
    for when in ("first step", "trained"):
        found = shares[f"tanh, {when}"]
        claims.negative(
            ratio,
            f"the same with tanh, {when}",
            told(predicted),
            told(found),
            bool(np.abs(found - constant).max() < 0.02),
        )
    claims.near(
        ratio,
        "with tanh, first step: only pixels that don't vary, mean over h",
        float(shares["tanh, first step"].mean()),
        constant,
        within=1e-3,
    )
    return spectra, predicted


def exact_zeros(sizes: np.ndarray, cut: float = 1e-12) -> float:
    """Share of eigenvalues that are rounding errors of float64."""
    return float(np.mean(sizes <= cut * sizes[-1]))


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
