"""Energies that networks reach: by training, and at the saddles of linear networks, where they are known exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import geometry_figures as figures
import numpy as np
import torch
from claims import Claims, number
from geometry_laws import NOTES
from geometry_networks import WIDTH, Data, Networks, find_critical_points
from numpy.typing import NDArray

#: Memorisation energies of theory.md 9.13.
MEMORISED = {1 / 4: 0.259, 1 / 2: 0.118}


def linear_saddles(claims: Claims) -> None:
    """The search where critical points are known: at linear networks it ends at saddles, to rounding."""
    random = torch.Generator().manual_seed(2)
    data = tuple(torch.randn(8, 3, 12, generator=random, dtype=torch.float64) for _ in range(2))
    networks = Networks(data, 3, lambda z: z, seed=3)
    found = find_critical_points(networks, data, outer=120, inner=25)
    known = saddle_energies(data)
    off = np.abs(found.energies[:, None] - known).min(axis=1).max()
    said = "largest J_g, search at 8 linear networks of 3-3-3 units"
    claims.between("5.5", said, float(found.gradients.max()), high=1e-20)
    claims.between("5.5", "their energies off the known ones", float(off), high=1e-12, source="Baldi and Hornik 1989")
    saddles = int((found.energies > known.min(axis=1) + 1e-3).sum())
    claims.between("5.5", "how many of them ended at saddles", saddles, low=1)


def saddle_energies(data: Data) -> NDArray[np.float64]:
    """Energies of all critical points of linear networks, shape (networks, 2^n).

    A critical point explains some principal directions of the regression and leaves the others (Baldi and Hornik 1989).
    """
    energies = []
    for x, y in zip(*(part.numpy() for part in data), strict=True):
        outputs, samples = y.shape
        explained = np.linalg.svd(y @ np.linalg.pinv(x) @ x, compute_uv=False) ** 2
        kept = [sum(some) for k in range(outputs + 1) for some in combinations(explained[:outputs], k)]
        energies.append((np.square(y).sum() - np.array(kept)) / (2 * samples * outputs))
    return np.array(energies)


def memorisation(claims: Claims, found: dict[float, NDArray[np.float64]], repeats: int) -> None:
    """Section 5: the energy that training reaches, against (1 - phi)^2 / 2; linear networks against (1 - phi) / 2."""
    points = []
    for phi, one in found.items():
        share, law = Fraction(phi).limit_denominator(20), (1 - phi) ** 2 / 2
        mean, error = float(one.mean()), float(one.std(ddof=1) / np.sqrt(len(one)))
        if phi in MEMORISED:
            claims.near(
                "5.5",
                f"memorisation energy, phi {share}",
                mean,
                MEMORISED[phi],
                within=0.02,
                stderr=error,
                source="earlier runs",
            )
        said = f"memorisation energy against (1 - phi)^2 / 2, phi {share}"
        if phi <= 1 / 2:
            claims.near("5.5", said, mean, law, within=0.02, stderr=error)
        else:  # .0744 to .0762 over three seeds, where 3000 steps had come to .061 before
            claims.show("5.5", said, f"{law:.4g} (.061 ± .008 after 3000 steps)", number(mean, error))
        points.append((phi, mean, error))
    z = [(mean - (1 - phi) ** 2 / 2) / error for phi, mean, error in points]
    if len(z) > 1:
        claims.negative(
            "5.5",
            "(1 - phi)^2 / 2 within the errors, all phi",
            "0 standard errors",
            " ".join(f"{v:+.1f}" for v in z),
            max(map(abs, z)) > 4,
        )
    random, phi = np.random.default_rng(2), 1 / 4
    samples, left = round(2 * WIDTH / phi), []
    for _ in range(repeats):
        x, y = random.standard_normal((2, samples, WIDTH))
        left.append(np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).mean() / 2)
    mean, error = float(np.mean(left)), float(np.std(left, ddof=1) / np.sqrt(len(left)))
    claims.negative(
        "5.5",
        "energy of a linear network, least squares, phi 1/4",
        f"(1 - phi) / 2 = {(1 - phi) / 2:.4g}",
        number(mean, error),
        abs(mean - (1 - phi) / 2) > 5 * error,
    )
    claims.near(
        "5.5",
        "the same, a linear map having n^2 parameters",
        mean,
        (1 - phi / 2) / 2,
        within=4 * error,
        stderr=error,
        source=NOTES,
    )
    claims.figure(
        figures.memorisation(points),
        "memorisation",
        "Energy after training (points; errors are below their size) against phi.",
    )
