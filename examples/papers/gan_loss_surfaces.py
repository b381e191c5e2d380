"""Two coupled networks: the Hessian law of the spin-glass model of a GAN, and a GAN on digits, watched while it trains.

Baskerville, Keating, Mezzadri and Najnudel 2022, arXiv:2101.02524. Its Hessian law only; the complexity of critical points
is left out. ``python examples/papers/gan_loss_surfaces.py [--full] [--out docs/papers]``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from claims import Claims
from gan_loss_surfaces_figures import law_figure, over_time_figure, spectrum_figure
from gan_loss_surfaces_law import Blocks, control, couplings, read_blocks, simulate, split
from misfit import Misfit, misfit, nearest
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset
from training import train_quietly

from lightning_rmt import Reading, SpectrumMonitor
from lightning_rmt.laws import BlockSemicircle, Semicircle
from lightning_rmt.spectra.bulk import Bulk

TITLE = "GAN loss surfaces: two coupled networks"
REFERENCE = "Baskerville, Keating, Mezzadri and Najnudel 2022, arXiv:2101.02524"
ABOUT = """The paper models a GAN by two interacting spin glasses. The Hessian of the discriminator's loss over the
parameters of both networks is then `H = b M + [b₁ M₁ - x₁, 0; 0, 0] - x`: M and M₁ are independent GOE matrices of
radius √2, the second on the share κ of the coordinates that is the discriminator's. With p and q layers in
discriminator and generator and latent noise of standard deviation σ_z, `b² = (p+q)(p+q-1) 2^(p+q) σ_z²` and `b₁² =
p(p-1) κ`. The law is `BlockSemicircle`. Here it is compared with simulated matrices, and then with a GAN on
scikit-learn's digits: p = q = 2, σ_z = 1, a zero-sum game by manual optimization and two Adams,
`SpectrumMonitor(loss_fn=..., blocks=["discriminator", "generator"])` watching. The law's four parameters are read
from mean and variance of the two blocks; what couples the blocks is then predicted."""
SAY = (
    "What reproduces: the law, for the matrices that it is about, merged or separate. The sign of the quartic's "
    "constant term in the authors' stored code is not the model's. The same reading of the parameters from two "
    "blocks recovers them for a simulated pair of networks, and their law is then that of the whole.",
    "What doesn't: each prediction that was tried for this GAN. The blocks that couple the networks are larger than "
    "a common b allows, given the generator's own block. The discriminator's own term is much larger than the "
    "coupling, where the model has it the other way round for σ_z = 1. Neither block is a semicircle, both are "
    "heavy tailed with most of their mass near zero, and no member of the family is near the whole: the nearest "
    "ones hardly couple the networks (b far below b₁) and put the generator's coordinates into a narrow peak. The "
    "bulk's distance is in floors, what the right law shows with one probe.",
    "This is the law only, and one small GAN. The paper's introduction itself cites that real Hessians don't look "
    "like the GOE's; what it compares with real GANs is how the losses depend on κ and σ_z. That, and the "
    "complexity of critical points, isn't reproduced here.",
)
DISCRIMINATOR, GENERATOR = "discriminator", "generator"


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        width: of the hidden layers.
        epochs: of the training, of 8 steps each.
        every: steps from one reading to the next.
        matrix: size of the simulated matrices.
        batches: of 256 digits, in a curvature.
        evaluations: of a distance, for the nearest member of the family.
    """

    width: int = 32
    epochs: int = 101
    every: int = 200
    matrix: int = 1200
    batches: int = 4
    evaluations: int = 350


QUICK = Size(width=12, epochs=26, every=200, matrix=500, batches=1, evaluations=40)
FULL = Size(width=256, epochs=401, every=800, matrix=4000)


class DigitsGAN(pl.LightningModule):
    """Generator and discriminator of two layers each (p = q = 2), 8 x 8 digits, a zero-sum game by hand."""

    latent = 16

    def __init__(self, width: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = nn.Sequential(nn.Linear(64, width), nn.Softplus(), nn.Linear(width, 1))
        self.generator = nn.Sequential(nn.Linear(self.latent, width), nn.Tanh(), nn.Linear(width, 64), nn.Tanh())

    def generated(self, like: Tensor) -> Tensor:
        return self.generator(torch.randn(len(like), self.latent, device=like.device))  # sigma_z = 1

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        of_discriminator, of_generator = self.optimizers()
        for optimizer, sign, wanted in ((of_discriminator, 1.0, "loss_d"), (of_generator, -1.0, "loss_g")):
            self.toggle_optimizer(optimizer)
            loss = sign * discriminator_loss(self, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(wanted, loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.discriminator, self.generator)
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.999)) for network in networks]


def discriminator_loss(module: DigitsGAN, batch: list[Tensor]) -> Tensor:
    """``L_D = E[-log D(x)] + E[-log(1 - D(G(z)))]``; the generator maximises it.

    In the paper ``L_D = l_D(w_D) - sigma_z l_G(w_D, w_G)`` and ``L_G = sigma_z l_G(w_D, w_G)``: the same two terms.
    """
    images = batch[0]
    real, fake = module.discriminator(images), module.discriminator(module.generated(images))
    return softplus(-real).mean() + softplus(fake).mean()


def train(size: Size) -> tuple[DigitsGAN, Tensor, list[Reading]]:
    """Trains with the monitor and loads what it saved."""
    pl.seed_everything(0, verbose=False)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    gan = DigitsGAN(size.width)
    monitor = SpectrumMonitor(
        every_n_steps=size.every,
        batches=size.batches,
        loss_fn=discriminator_loss,
        blocks=[DISCRIMINATOR, GENERATOR],
        levels=None,
        noise=False,
        on_error="raise",
    )
    loader = DataLoader(TensorDataset(images), batch_size=256, shuffle=True)
    readings = train_quietly(gan, loader, [monitor], max_epochs=size.epochs)
    return gan.cpu(), images, readings


def played(claims: Claims, size: Size, gan: DigitsGAN, images: Tensor, readings: Sequence[Reading]) -> None:
    """The training itself: a game in balance that draws digits, and every probe with its two blocks."""
    with torch.no_grad():
        fake = gan.generated(images)
        real_score, fake_score = (torch.sigmoid(gan.discriminator(x)).mean().item() for x in (images, fake))
    claims.show(
        "training",
        "mean of D on digits, on generated ones",
        "1/2, 1/2 in equilibrium",
        f"{real_score:.3f}, {fake_score:.3f}",
    )
    alike = float(np.corrcoef(fake.mean(0), images.mean(0))[0, 1])
    claims.between("training", "correlation of the mean generated image with the mean digit", alike, low=0.9)
    wanted, got = 1 + 8 * size.epochs // size.every, [reading for reading in readings if len(reading.blocks) == 2]
    claims.near("watched live", "readings with the whole and both blocks", len(got), wanted, within=0)
    asymmetry = max(reading.symmetry_error or 0.0 for reading in readings)
    claims.between("watched live", "asymmetry of a product, at the first reading", asymmetry, high=1e-4)


def every(values: Sequence[float], form: str = ".3g") -> str:
    """Numbers over the training."""
    return " → ".join(format(value, form) for value in values)


def compare(claims: Claims, size: Size, readings: Sequence[Reading]) -> list[Blocks]:
    """The law's prediction for two coupled networks beside what was measured."""
    parts = [(r.spectrum, r.blocks[DISCRIMINATOR], r.blocks[GENERATOR]) for r in readings]
    found = [read_blocks(*one, outliers=True) for one in parts]
    claims.show("steps", "of the readings below", "", every([r.step for r in readings], "d"))
    for name, place in (("whole", 0), (DISCRIMINATOR, 1), (GENERATOR, 2)):
        extremes = " → ".join(f"{one[place].lambda_min.value:.2g}, {one[place].lambda_max.value:.2g}" for one in parts)
        claims.show("spectrum", f"smallest and largest eigenvalue, {name}", "", extremes)

    error = max(one.coupling_error for one in found)
    claims.negative(
        "b, both blocks",
        "squared norm of the blocks that couple the networks / what b of the generator's block says",
        "1",
        f"{every([one.coupling for one in found])} (each ± {error:.2g} or less)",
        all(one.coupling - 5 * one.coupling_error > 1.5 for one in found),
    )
    b2, b12 = couplings(p=2, q=2, sigma_z=1.0, kappa=found[0].kappa)
    claims.negative(
        "b² / b₁²",
        "coupling over the discriminator's own term, p = q = 2, σ_z = 1",
        f"{b2 / b12:.3g}",
        every([one.b2 / one.b12 for one in found], ".2g"),
        all(0 < one.b2 / one.b12 < 1 for one in found),
    )
    from_bulks = [read_blocks(*one, outliers=False) for one in parts]
    predicted = [misfit(one.law, part[0].bulk, one.x) for one, part in zip(from_bulks, parts, strict=True)]
    claims.negative(
        "spectral density",
        "W1 of the whole from the law that the blocks predict (their bulks), in floors",
        "about 1",
        every([one.relative for one in predicted]),
        all(one.relative > 2 for one in predicted),
    )
    best = [near(from_bulks[place], parts[place][0].bulk, size) for place in (0, -1)]
    claims.negative(
        "spectral density",
        "the same for the nearest member of the family, b, b₁, x₁ and x free; first and last",
        "about 1",
        every([one.relative for one in best]),
        all(one.relative > 2 for one in best),
    )
    claims.show("spectral density", "its b / b₁", "", every([one.law.coupling / one.law.block for one in best], ".1g"))
    for name, place in ((DISCRIMINATOR, 1), (GENERATOR, 2)):
        semicircles = [misfit(Semicircle.fit(one[place]).law, one[place].bulk).relative for one in parts]
        kurtosis = [one[place].free_cumulants().kurtosis.mean for one in parts]
        claims.negative(
            "GOE blocks",
            f"W1 of the {name}'s block from the semicircle, in floors",
            "about 1",
            every(semicircles),
            all(one > 2 for one in semicircles),
        )
        claims.show("GOE blocks", f"free kurtosis of the {name}'s block", "0", every(kurtosis))
    return from_bulks


def near(blocks: Blocks, whole: Bulk, size: Size) -> Misfit:
    """The member of the family nearest to the whole, from the blocks' and from much narrower ones."""
    b, b1 = blocks.law.coupling, blocks.law.block
    starts = [(b * i, b1 * j, blocks.x1, blocks.x) for i, j in ((1, 1), (3, 1), (0.1, 0.1), (0.01, 0.1))]
    return nearest(
        lambda *free: BlockSemicircle(blocks.kappa, *free),
        starts,
        whole,
        spread=0.05 * b1,
        shifted=True,
        evaluations=size.evaluations,
    )


def main(arguments: list[str] | None = None) -> int:
    claims = Claims("gan_loss_surfaces", TITLE, REFERENCE, ABOUT, arguments)
    size = QUICK if claims.quick else FULL if claims.full else Size()
    torch.set_num_threads(1)
    simulate(claims, size.matrix)
    cases = split(claims, size.matrix)
    control(claims, size.matrix)
    gan, images, readings = train(size)
    played(claims, size, gan, images, readings)
    blocks = compare(claims, size, readings)
    for paragraph in SAY:
        claims.say(paragraph)
    claims.figure(
        law_figure(cases),
        "law",
        f"The law (line) and one simulated matrix of size {size.matrix} (bars): κ = 1/2, b = b₁ = 1. The supports of "
        "the two networks merge, touch or separate as the discriminator's mean -x₁ moves.",
    )
    last = readings[-1]
    claims.figure(
        spectrum_figure({"whole": last.spectrum, **last.blocks}, blocks[-1].law, blocks[-1].x),
        "spectrum",
        f"The GAN after step {last.step}: share of the eigenvalues that are further from zero, for the whole Hessian, "
        "its two diagonal blocks, and the law of the whole with the parameters that the blocks' bulks have.",
    )
    claims.figure(
        over_time_figure(readings),
        "over_time",
        "Over the training: extreme eigenvalues of the whole and of both blocks, and the coupling blocks' squared norm over "
        "the law's (1 in the model).",
    )
    return claims.finish()


if __name__ == "__main__":
    sys.exit(main())
