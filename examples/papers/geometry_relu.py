"""ReLU networks: the residual part H1 against its law, and whether H0 and H1 are free (Pennington and Bahri, 4 and 6)."""

from __future__ import annotations

from fractions import Fraction

import geometry_figures as figures
import numpy as np
import torch
from claims import Claims, number
from geometry_index import ks
from geometry_networks import Data, Networks, train
from numpy.typing import NDArray
from scipy.stats import ortho_group
from sklearn.datasets import load_digits

from lightning_rmt.laws import RefinedWishartPlusWigner

#: n0 and n1 of the networks whose H1 is looked at.
WIDTH = 16


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
            within=0.03,
            stderr=error[0] / (eps * phi / 2),
        )
        claims.near(
            "(28)", f"m4 / m2^2 of H1, phi {share}", (fourth / second**2).mean(), 2 + phi, within=0.15, stderr=error[1]
        )
        law = RefinedWishartPlusWigner(phi, eps, 0.02 * np.sqrt(eps * phi / 2))  # an H0 too small to be seen
        claims.between("(28)", f"KS of H1, {count} networks, phi {share}", ks(law, H1.ravel()), high=0.03)
        shown.append((phi, law, H1.ravel()))
    claims.figure(
        figures.residual(shown),
        "residual",
        "H1 of ReLU networks with errors N(0, 100) (histograms) and the law with the transform (28) (lines).",
    )


def freeness(claims: Claims, count: int, steps: int) -> None:
    """Section 4: H0 + H1 and H0 + Q H1 Q' for Haar Q, at trained ReLU autoencoders of 150 images of 4 x 4 pixels."""
    images = load_digits().images.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16)
    chosen = np.random.default_rng(5).choice(len(images), 150, replace=False)
    centred = images[chosen] - images[chosen].mean(axis=0)
    U, _, _ = np.linalg.svd(centred, full_matrices=False)
    x = torch.tensor(U.T * np.sqrt(len(chosen))).expand(count, -1, -1).contiguous()
    module = Networks((x, x), 20, torch.relu, seed=6)
    train(module, (x, x), steps, watch=False)
    H, H0 = module.dense(module.hessian((x, x))), module.dense(module.gauss_newton((x, x)))
    rows, first = [], None
    for a, b in zip(H, H0, strict=True):
        true = np.linalg.eigvalsh(a)
        Q, R = (ortho_group.rvs(len(a), random_state=np.random.default_rng(7 + len(rows) * 2 + k)) for k in range(2))
        rotated, again = (np.linalg.eigvalsh(b + q @ (a - b) @ q.T) for q in (Q, R))
        alone, rest = np.linalg.eigvalsh(b), np.linalg.eigvalsh(a - b)
        commuting = alone + np.random.default_rng(len(rows)).permutation(rest)
        rows.append([_ks(true, other) for other in (rotated, commuting, alone)] + [_ks(rotated, again)])
        first = first or (true, rotated, commuting)
    mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    eps = float(module.energies((x, x)).mean())
    claims.show("4", "energy of the autoencoders, phi 4/15", "", f"{eps:.4f}")
    claims.between("4", "KS of H0 + H1 to H0 + Q H1 Q'", mean[0], high=0.1, stderr=error[0])
    claims.between("4", "the same over its value for commuting parts", mean[0] / mean[1], high=1.0)
    claims.show("4", "KS of H0 + H1 to H0 alone", "", number(mean[2], error[2]))
    claims.negative(
        "4",
        "H0 and H1 free: KS as between two rotations",
        number(mean[3], error[3]),
        number(mean[0], error[0]),
        mean[0] > 3 * mean[3],
    )
    assert first is not None
    claims.figure(
        figures.freeness(*first),
        "freeness",
        "One autoencoder: eigenvalues of H0 + H1, of H0 + Q H1 Q' with a Haar Q, and of commuting parts.",
    )


def _ks(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    at = np.concatenate([a, b])
    upto = (np.searchsorted(np.sort(v), at, side="right") / len(v) for v in (a, b))
    return float(np.abs(np.subtract(*upto)).max())
