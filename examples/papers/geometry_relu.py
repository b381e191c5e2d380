"""ReLU networks: the residual part H1 against its law, and whether H0 and H1 are free (Pennington and Bahri, 4 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import geometry_figures as figures
import numpy as np
import torch
from claims import Claims, number
from geometry_index import ks
from geometry_networks import WIDTH, Data, Networks, train
from numpy.typing import NDArray
from scipy.stats import ortho_group
from sklearn.datasets import load_digits

from lightning_rmt.laws import RefinedWishartPlusWigner

FINITE = "2 + phi, and 1/n for finite blocks"


def residual_part(claims: Claims, quick: bool) -> None:
    """Section 6: H1 of ReLU networks with errors overwritten by N(0, 100), so that eps = 50, against (28)."""
    shown = []
    for phi in (1 / 4,) if quick else (1 / 16, 1 / 4):
        count, samples, eps = (3 if quick else 10), round(2 * WIDTH / phi), 50.0
        random = torch.Generator().manual_seed(3)
        x, e = (torch.randn(count, WIDTH, samples, generator=random, dtype=torch.float64) for _ in "xe")
        module = Networks((x, e), WIDTH, torch.relu, seed=4)
        data: Data = (x, module.outputs((x, e)).detach() - 10 * e)
        H1 = np.linalg.eigvalsh(module.dense(module.hessian(data)) - module.dense(module.gauss_newton(data)))
        share = Fraction(phi).limit_denominator(20)
        second, fourth = ((H1**k).mean(axis=1) for k in (2, 4))
        error = [float(np.std(v, ddof=1) / np.sqrt(count)) for v in (second, fourth / second**2)]
        claims.near(
            "(28)",
            f"m2 of H1 over eps phi / 2, phi {share}",
            second.mean() / (eps * phi / 2),
            1,
            within=4 * error[0] / (eps * phi / 2),
            stderr=error[0] / (eps * phi / 2),
        )
        # blocks of 16 x 16 entries have 2 + 1/16 where large ones have 2
        limit = 2 + phi + 1 / WIDTH
        ratio = float((fourth / second**2).mean())
        claims.near(
            "(28)",
            f"m4 / m2^2 of H1, phi {share}",
            ratio,
            limit,
            within=4 * error[1],
            stderr=error[1],
            source="2 + phi + 1/n",
        )
        law = RefinedWishartPlusWigner(phi, eps, 0.02 * np.sqrt(eps * phi / 2))  # an H0 too small to be seen
        claims.between("(28)", f"KS of H1, {count} networks, phi {share}", ks(law, H1.ravel()), high=0.03)
        shown.append((phi, law, H1.ravel()))
    claims.figure(
        figures.residual(shown),
        "residual",
        "H1 of ReLU networks with errors N(0, 100) (histograms) and the law with the transform (28) (lines).",
    )


def freeness(claims: Claims, count: int, stages: tuple[int, ...]) -> None:
    """Section 4: H0 + H1 and H0 + Q H1 Q' for Haar Q, at ReLU autoencoders of 150 images of 4 x 4 pixels.

    At the end of training the errors are small, and so is H1: then H0 alone is as near. So also early on.
    """
    images = load_digits().images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    chosen = np.random.default_rng(5).choice(len(images), 150, replace=False)
    white = np.linalg.svd(images[chosen] - images[chosen].mean(axis=0), full_matrices=False)[0] * np.sqrt(len(chosen))
    x = torch.tensor(white.T).expand(count, -1, -1).contiguous()
    shown = []
    for stage, upto in zip(("early", "trained"), stages, strict=False):
        module = Networks((x, x), 20, torch.relu, seed=6)
        train(module, (x, x), upto, watch=False)
        H, H0 = module.dense(module.hessian((x, x))), module.dense(module.gauss_newton((x, x)))
        compared = [_compare(a, b, seed) for seed, (a, b) in enumerate(zip(H, H0, strict=True))]
        values = np.array([one.numbers for one in compared])
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(count)
        free, commuting, alone, null, alternating = zip(mean, error, strict=True)
        energy = float(module.energies((x, x)).mean())
        claims.between(
            "4", f"KS of H0 + H1 to H0 + Q H1 Q', {stage}, eps {energy:.3f}", free[0], high=0.06, stderr=free[1]
        )
        claims.negative(
            "4",
            f"the same, {stage}",
            f"{null[0]:.4f} between two Q",
            number(*free),
            free[0] - null[0] > 4 * free[1],
        )
        claims.show("4", f"KS of H0 + H1 to commuting parts, {stage}", "", number(*commuting))
        claims.show("4", f"KS of H0 + H1 to H0 alone, {stage}", "", number(*alone))
        said, expected = (
            f"tr(ABAB) over tr A^2 tr B^2, centred H0 and H1, {stage}",
            "0 if free, 1 if commuting and independent",
        )
        if count > 4:  # enough for its error
            claims.negative("4", said, expected, number(*alternating), abs(alternating[0]) > 3 * alternating[1])
        else:
            claims.show("4", said, expected, number(*alternating))
        shown.append((stage, energy, compared[0]))
    claims.figure(
        figures.freeness(shown),
        "freeness",
        "One autoencoder: distribution function of the eigenvalues of H0 + Q H1 Q' with a Haar Q, of commuting parts and of "
        "H0 alone, less that of H0 + H1.",
    )


@dataclass(frozen=True)
class Compared:
    """Eigenvalues of H0 + H1 and of what it is compared with, and the distances."""

    true: NDArray[np.float64]
    rotated: NDArray[np.float64]
    commuting: NDArray[np.float64]
    alone: NDArray[np.float64]
    numbers: tuple[float, float, float, float, float]


def _compare(H: NDArray[np.float64], H0: NDArray[np.float64], seed: int) -> Compared:
    random, H1 = np.random.default_rng(seed), H - H0
    true, alone, rest = (np.linalg.eigvalsh(matrix) for matrix in (H, H0, H1))
    rotated, again = (
        np.linalg.eigvalsh(H0 + Q @ H1 @ Q.T) for Q in ortho_group.rvs(len(H), size=2, random_state=random)
    )
    commuting = np.sort(alone + random.permutation(rest))
    A, B = (matrix - np.trace(matrix) / len(H) * np.eye(len(H)) for matrix in (H0, H1))
    product = A @ B
    alternating = float((product * product.T).sum() * len(H) / np.square(A).sum() / np.square(B).sum())
    distances = [_ks(true, other) for other in (rotated, commuting, alone)]
    return Compared(true, rotated, commuting, alone, (*distances, _ks(rotated, again), alternating))


def _ks(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    at = np.concatenate([a, b])
    upto = (np.searchsorted(np.sort(v), at, side="right") / len(v) for v in (a, b))
    return float(np.abs(np.subtract(*upto)).max())
