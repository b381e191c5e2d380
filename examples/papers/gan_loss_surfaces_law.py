"""The law of the two-block matrix of `gan_loss_surfaces`: simulated, by the quartic, and read from its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from claims import Claims
from misfit import Dense, kolmogorov, misfit
from torch import Tensor

from lightning_rmt import Spectrum, estimate_spectrum
from lightning_rmt.laws import BlockSemicircle

#: kappa, b, b1, x1
Parameters = tuple[float, float, float, float]
#: Each with what an earlier study of ours measured: the law's Kolmogorov distance from a simulation; that of the
#: quartic's root of largest imaginary part with the sign of F in the authors' stored rmt/spectrum.py; the mass of that
#: root with the other sign.
SIMULATED: tuple[tuple[Parameters, float, float, float], ...] = (
    ((0.5, 1.0, 1.0, 0.0), 0.0025, 0.090, 1.009),
    ((0.5, 1.0, 1.0, 1.0), 0.0022, 0.070, 1.033),
    ((0.7, 0.6, 1.0, 2.0), 0.0031, 0.070, 1.115),
)
#: The control's b, b1, x1 and x.
CONTROL = (1.0, 1.5, 1.0, 0.3)


def couplings(p: int, q: int, sigma_z: float, kappa: float) -> tuple[float, float]:
    """The model's b^2 and b1^2: ``(p+q)(p+q-1) 2^(p+q) sigma_z^2`` and ``p(p-1) kappa``."""
    return (p + q) * (p + q - 1) * 2 ** (p + q) * sigma_z**2, p * (p - 1) * kappa


def quartic(z: float, kappa: float, b: float, b1: float, x1: float, sign: float) -> np.ndarray:
    """Roots u of ``A(u) [(1+c) u^2 + (x1-cz) u + F] + (kappa b^2/2) u^2 = 0``; the density is ``2 Im u / (pi b^2)``.

    ``A(u) = u^2 - z u + (1-kappa) b^2/2``, ``c = b1^2 / (kappa b^2)``, ``F = sign (1-kappa) b1^2 / (2 kappa)``.
    """
    c = b1**2 / (kappa * b**2)
    second = [1 + c, x1 - c * z, sign * (1 - kappa) * b1**2 / (2 * kappa)]
    equation = np.convolve([1, -z, (1 - kappa) * b**2 / 2], second)
    equation[2] += kappa * b**2 / 2
    return np.roots(equation)


def by_picked_root(levels: np.ndarray, parameters: tuple[float, ...], sign: float) -> tuple[float, float]:
    """Kolmogorov distance and mass of the density that takes the quartic's root of largest imaginary part."""
    x = np.linspace(levels[0] - 0.5, levels[-1] + 0.5, 1500)
    density = np.array([2 * np.abs(quartic(z, *parameters, sign).imag).max() for z in x]) / (np.pi * parameters[1] ** 2)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    shares = (np.arange(len(levels)) + 0.5) / len(levels)
    return float(np.abs(np.interp(levels, x, mass) - shares).max()), float(mass[-1])


def touching_shift(kappa: float, b: float, b1: float) -> float:
    """The shift x1 at which the support splits into two intervals."""
    low, high = 0.0, 20.0 * (b + b1)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if len(BlockSemicircle(kappa, b, b1, middle).support) > 1 else (middle, high)
    return high


def simulated_pair(n: int, kappa: float, b: float, b1: float, x1: float, x: float, seed: int) -> Tensor:
    """The model's Hessian ``b M + [b1 M1 - x1, 0; 0, 0] - x``, discriminator first."""

    def goe(size: int) -> Tensor:  # radius sqrt(2)
        entries = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return (entries + entries.T) / (2 * math.sqrt(size))

    generator = torch.Generator().manual_seed(seed)
    block = round(kappa * n)
    matrix = b * goe(n) - x * torch.eye(n, dtype=torch.float64)
    matrix[:block, :block] += b1 * goe(block) - x1 * torch.eye(block, dtype=torch.float64)
    return matrix


@dataclass(frozen=True)
class Blocks:
    """The law's parameters as the two blocks have them, and what they say of the whole.

    Attributes:
        kappa: discriminator's share of the parameters.
        b2: ``b^2``, from the generator's block: its variance is ``(1-kappa) b^2/2``.
        b12: ``b1^2``, from the discriminator's: its variance is ``kappa b^2/2 + b1^2/2``; negative where that is too small.
        x: minus the mean of the generator's block.
        x1: minus the mean of the discriminator's block, less x.
        coupling: squared Frobenius norm of the blocks that couple the two, over the ``2 kappa(1-kappa) n b^2/2`` of the law.
        coupling_error: its standard error.
    """

    kappa: float
    b2: float
    b12: float
    x: float
    x1: float
    coupling: float
    coupling_error: float

    @property
    def law(self) -> BlockSemicircle:
        """Of the whole's eigenvalues plus x."""
        return BlockSemicircle(self.kappa, math.sqrt(self.b2), math.sqrt(max(self.b12, 0.0)), self.x1)


def bulk_mean_and_variance(spectrum: Spectrum) -> tuple[float, float]:
    mean, square = spectrum.bulk.mean(lambda x: np.stack([x, x**2]))
    return float(mean), float(square - mean**2)


def read_blocks(whole: Spectrum, discriminator: Spectrum, generator: Spectrum, outliers: bool) -> Blocks:
    """The law's parameters from the spectra of its two blocks, with or without their outliers."""
    n, kappa = whole.size, discriminator.size / whole.size
    if outliers:
        (mean_d, var_d), (mean_g, var_g) = (
            (s.trace.mean / s.size, s.frobenius.mean**2 / s.size - (s.trace.mean / s.size) ** 2)
            for s in (discriminator, generator)
        )
    else:
        (mean_d, var_d), (mean_g, var_g) = bulk_mean_and_variance(discriminator), bulk_mean_and_variance(generator)
    b2 = 2 * var_g / (1 - kappa)
    norms = [s.frobenius for s in (whole, discriminator, generator)]
    cross = norms[0].mean ** 2 - norms[1].mean ** 2 - norms[2].mean ** 2
    error = math.sqrt(sum((2 * norm.mean * norm.stderr) ** 2 for norm in norms))
    law = kappa * (1 - kappa) * n * b2
    return Blocks(kappa, b2, 2 * var_d - kappa * b2, -mean_g, mean_g - mean_d, cross / law, error / law)


# --- what is claimed -------------------------------------------------------------------------------------------------


def simulate(claims: Claims, n: int) -> None:
    """The law against simulated matrices, and the quartic's roots."""
    for parameters, ours_before, wrong_before, mass_before in SIMULATED:
        kappa, b, b1, x1 = parameters
        told = f"(κ, b, b₁, x₁) = ({kappa:g}, {b:g}, {b1:g}, {x1:g})"
        law = BlockSemicircle(*parameters)
        levels = law.rvs(n, np.random.default_rng(0))
        claims.between(
            "spectral density",
            f"KS distance of the law from a matrix of size {n}, {told}",
            kolmogorov(levels, law),
            high=6 / n,
            source=f"before: {ours_before}",
        )
        low, high = law.edges
        x = low + (high - low) * np.linspace(0.05, 0.95, 19)
        height = law.density(x) * np.pi * b**2 / 2
        off = [
            max(np.abs(quartic(z, *parameters, sign).imag - h).min() for z, h in zip(x, height, strict=True))
            for sign in (1, -1)
        ]
        claims.between(
            "quartic, F > 0", f"largest distance of a root's imaginary part from the law's, {told}", off[0], high=1e-6
        )
        if x1:
            claims.between("quartic, F < 0", f"the same, {told}", off[1], low=0.01, source="F < 0 is wrong")
        wrong, _ = by_picked_root(levels, parameters, -1.0)
        claims.near(
            "stored code, F < 0",
            f"KS distance of the root of largest |Im|, {told}",
            wrong,
            wrong_before,
            within=0.02,
            source="before",
        )
        _, mass = by_picked_root(levels, parameters, 1.0)
        claims.near(
            "quartic, F > 0",
            f"mass of the root of largest |Im|, {told}",
            mass,
            mass_before,
            within=0.03,
            source="before",
        )


def split(claims: Claims, n: int, seed: int = 0) -> list[tuple[str, BlockSemicircle, np.ndarray]]:
    """The paper's three cases: merged, touching, separate supports."""
    kappa, b, b1 = 0.5, 1.0, 1.0
    touching = touching_shift(kappa, b, b1)
    cases = []
    for name, x1 in (("merged", 1.0), ("touching", touching), ("separate", touching + 1.5)):
        law = BlockSemicircle(kappa, b, b1, x1)
        levels = law.rvs(n, np.random.default_rng(seed))
        cases.append((f"{name}, x₁ = {x1:.2f}", law, levels))
        claims.near(
            "support",
            f"largest eigenvalue, {name} (x₁ = {x1:.2f})",
            levels[-1],
            law.edges[1],
            relative=2.5 * n ** (-2 / 3),
        )
    (_, first), (second, _) = law.support
    claims.near(
        "support",
        "share of eigenvalues left of the gap, separate: κ",
        float(np.mean(levels < (first + second) / 2)),
        kappa,
        within=0.0,
    )
    claims.true(
        "support",
        "none of them in the gap",
        "0",
        f"{np.sum((levels > first + 0.05) & (levels < second - 0.05))}",
        not ((levels > first + 0.05) & (levels < second - 0.05)).any(),
    )
    return cases


def control(claims: Claims, n: int) -> None:
    """The same procedure as for the GAN, on a simulated pair of networks for which the model is true."""
    b, b1, x1, x = CONTROL
    block = round(0.45 * n)
    matrix = simulated_pair(n, 0.45, b, b1, x1, x, seed=0)
    parts = (matrix, matrix[:block, :block], matrix[block:, block:])
    spectra = [estimate_spectrum(Dense(part.contiguous()), steps=100, probes=8, seed=0) for part in parts]
    found = read_blocks(*spectra, outliers=True)
    claims.near(
        "control", "b read from the generator's block of a simulated pair", math.sqrt(found.b2), b, relative=0.05
    )
    claims.near("control", "b₁ from the discriminator's", math.sqrt(found.b12), b1, relative=0.05)
    claims.near("control", "x₁", found.x1, x1, within=0.1)
    error = found.coupling_error
    claims.near(
        "control", "coupling blocks' squared norm / the law's", found.coupling, 1.0, within=3 * error, stderr=error
    )
    claims.between(
        "control",
        "W1 of the predicted law from the whole, in floors",
        misfit(found.law, spectra[0].bulk, found.x).relative,
        high=1.5,
    )
