"""Geometry of neural network loss surfaces via random matrix theory (Pennington and Bahri, ICML 2017).

    python examples/papers/geometry_of_loss_surfaces.py [--full | --quick] [--out docs/papers]

Equation numbers are the paper's. ``phi`` is parameters over samples times outputs, ``eps`` the loss per output.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction

import geometry_energies as energies_of
import geometry_figures as figures
import geometry_laws as laws
import geometry_relu as relu
import numpy as np
import torch
from claims import Claims, number
from geometry_index import fit_index, index_bounds, ks, law_exponent
from geometry_networks import WIDTH, Networks, Search, find_critical_points, train
from geometry_text import TEXT
from numpy.typing import NDArray
from scipy.stats import spearmanr

from lightning_rmt import Reading
from lightning_rmt.laws import NoFitError, WishartPlusWigner


@dataclass(frozen=True)
class Size:
    """What is run: networks for every phi, steps of training, of the search, and of its inner solver."""

    networks: dict[float, int]
    steps: int
    outer: int
    inner: int
    matrix: int = 1200
    autoencoders: int = 6
    repeats: int = 200


DEFAULT = Size({1 / 16: 8, 1 / 8: 16, 1 / 4: 32, 1 / 2: 32, 2 / 3: 32}, 600, 16, 50)
QUICK = Size({1 / 2: 8}, 500, 2, 20, matrix=400, autoencoders=2, repeats=40)
FULL = Size(dict.fromkeys((1 / 16, 1 / 8, 1 / 4, 1 / 2, 2 / 3), 200), 3000, 150, 100)
#: Networks whose tensors are gone through together: all of them on a GPU, few enough for the cache on a CPU.
SAMPLES_TOGETHER = 2048


def main(arguments: list[str] | None = None) -> int:
    claims = Claims(
        "geometry_of_loss_surfaces",
        "Geometry of loss surfaces",
        "Pennington and Bahri, ICML 2017",
        "Two laws for the Hessian at a critical point, H = H0 + H1 (Gauss-Newton part and residual part, taken as free), "
        "against simulated matrices; then tanh networks with 16-16-16 units on Gaussian data, trained by a Trainer under a "
        "SpectrumMonitor, whose weights on the way are the starts of a search for critical points that minimises the "
        "squared gradient by Hessian products; and ReLU networks for H1 and for the freeness of H0 and H1.",
        arguments,
    )
    torch.set_num_threads(1)
    size = QUICK if claims.quick else FULL if claims.full else DEFAULT
    laws.density(claims, size.matrix)
    laws.threshold(claims)
    laws.refined(claims)
    laws.fit(claims, size.matrix)
    found = {phi: networks(claims, size, phi) for phi in size.networks}
    index_against_energy(claims, size, found)
    energies_of.linear_saddles(claims)
    energies_of.memorisation(claims, {phi: one.memorised for phi, one in found.items()}, size.repeats)
    relu.residual_part(claims, claims.quick)
    relu.freeness(claims, size.autoencoders, (30,) if claims.quick else (30, 300))
    for paragraph in TEXT:
        claims.say(paragraph)
    return claims.finish()


@dataclass(frozen=True)
class Found:
    """What the networks of one phi gave."""

    reading: Reading
    memorised: NDArray[np.float64]
    start: NDArray[np.float64]
    search: Search


def networks(claims: Claims, size: Size, phi: float) -> Found:
    """Section 5: tanh networks on Gaussian data, m = 2 n / phi samples; the energies that are passed on the way down."""
    count, samples = size.networks[phi], round(2 * WIDTH / phi)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(round(1 / phi))
    x, y = (torch.randn(count, WIDTH, samples, generator=random, dtype=torch.float64).to(device) for _ in "xy")
    lowest = (1 - phi) ** 2 / 2
    levels = torch.linspace(0.97 * lowest, lowest + 0.5 * (0.5 - lowest), count, dtype=torch.float64)
    module = Networks((x, y), WIDTH, torch.tanh, seed=0, levels=levels)
    reading = train(module, (x, y), size.steps)
    assert reading is not None
    memorised = module.energies((x, y))
    share = Fraction(phi).limit_denominator(20)
    if phi == 1 / 2:
        exact = np.linalg.eigvalsh(module.dense(module.hessian((x, y))))
        index, spectrum = float((exact < 0).mean()), reading.spectrum
        low, high = index_bounds(spectrum.nodes, spectrum.weights)
        claims.between("5.3", "exact index after training, within the monitor's bounds, phi 1/2", index, low, high)
        mass, error = spectrum.negative_mass, spectrum.negative_mass_stderr
        claims.near("5.3", "index by the monitor's negative mass", mass, index, within=3 * error, stderr=error)
        trace = spectrum.trace
        within = 4 * trace.stderr
        claims.near(
            "5.3", "trace by the monitor, to exact", trace.mean, exact.sum(), within=within, stderr=trace.stderr
        )
    try:
        own = WishartPlusWigner.fit(reading.spectrum)
        said = f"phi {own.law.phi:.3g}, eps {own.law.energy:.3g}: {own.word}, {own.relative:.2g} floors"  # type: ignore[attr-defined]
    except NoFitError as error:
        said = f"no fit: {error}"
    claims.show(
        "(18)",
        f"fit to the monitor's reading after training, phi {share}",
        f"phi {phi:.3g}, eps {memorised.mean():.3g}",
        said,
    )
    together = count if device == "cuda" else max(1, SAMPLES_TOGETHER // samples)
    parts, start = [], []
    for first in range(0, count, together):
        some, data = module.subset((x, y), slice(first, first + together))
        start.append(some.energies(data))
        parts.append(find_critical_points(some, data, size.outer, size.inner))
    return Found(reading, memorised, np.concatenate(start), Search.join(parts))


def index_against_energy(claims: Claims, size: Size, found: dict[float, Found]) -> None:
    """Figures 1 and 6: the spectrum at the points found, and how the index grows with the energy."""
    misses, rows = [], []
    for phi, one in found.items():
        share, search = Fraction(phi).limit_denominator(20), one.search
        energies, index, law = search.energies, search.index, WishartPlusWigner(phi, float(np.median(search.energies)))
        claims.between(
            "fig. 6",
            f"Spearman correlation of index and energy, phi {share}",
            float(spearmanr(energies, index)[0]),
            low=0.6,
        )
        middle = np.argsort(np.abs(energies - law.energy))[: max(2, len(energies) // 3)]
        levels = search.eigenvalues[middle]
        scaled = WishartPlusWigner(phi, float(energies[middle].mean()), float(levels.mean()))
        ours, mean = float(index[middle].mean()), float(energies[middle].mean())
        error = float(index[middle].std(ddof=1) / np.sqrt(len(middle)))
        claims.negative(
            "5.3",
            f"index at eps {mean:.3f}, phi {share}",
            f"{scaled.index:.3f} by (18)",
            number(ours, error),
            abs(ours - scaled.index) > 4 * error,
        )
        claims.show(
            "(18)", f"KS of the spectra there, mean fitted, phi {share}", "0", f"{ks(scaled, levels.ravel()):.3f}"
        )
        rows.append((phi, search, levels.ravel(), scaled))
        if len(energies) >= 10:
            fitted = fit_index(energies, index, size.repeats)
            own, (low, high) = law_exponent(phi, fitted.window), fitted.window
            claims.show(
                "(20)",
                f"exponent at index {low:.3f} to {high:.3f}, {fitted.points} networks, phi {share}",
                f"3/2 at eps_c; (18) fitted alike: {own:.2f}",
                number(fitted.exponent, fitted.exponent_error),
            )
            law_value = (1 - phi) ** 2 / 2
            said = f"eps_c, exponent free, phi {share}"
            if phi <= 1 / 2:
                tolerance, error = 3 * fitted.free_error, fitted.free_error
                claims.near("fig. 6", said, fitted.free_critical, law_value, within=tolerance, stderr=error)
            else:  # see the text: asserted at first, and failed
                claims.show("fig. 6", said, f"{law_value:.4f}", number(fitted.free_critical, fitted.free_error))
            claims.show(
                "fig. 6",
                f"eps_c, exponent 3/2, phi {share}",
                f"{law_value:.4f}",
                number(fitted.critical, fitted.critical_error),
            )
            misses.append((fitted.critical - law_value) / fitted.critical_error)
            rows[-1] = (*rows[-1], fitted)
    if len(misses) > 1:
        z = float(np.sqrt(np.mean(np.square(misses))))
        claims.negative(
            "fig. 6",
            "eps_c fitted with exponent 3/2, off (1 - phi)^2 / 2",
            "0 standard errors",
            f"{z:.1f} (root mean square)",
            z > 2.5,
        )
    moved = np.concatenate([one.search.energies - one.start for one in found.values()])
    claims.show(
        "5.5", "energy, change by the search", "", f"median {np.median(moved):+.4f}, most {np.abs(moved).max():.4f}"
    )
    below = np.concatenate([one.search.gradients for one in found.values()])
    flat = np.concatenate([one.search.flatness for one in found.values()])
    claims.negative(
        "5.5",
        "share of points with J_g < 1e-6",
        "all: others are discarded",
        f"{(below < 1e-6).mean():.2f}, median J_g {np.median(below):.1e}",
        (below < 1e-6).mean() < 0.5,
    )
    claims.show("5.5", "share of J_g along |eigenvalue| < lambda_max / 100", "", f"median {np.median(flat):.3f}")
    strict = np.mean(
        [(one.search.eigenvalues < -1e-3 * one.search.eigenvalues[:, -1:]).mean() for one in found.values()]
    )
    loose = np.mean([one.search.index.mean() for one in found.values()])
    claims.show(
        "5.3", "mean index, eigenvalues below -lambda_max / 1000 only", f"{loose:.3f} with all below 0", f"{strict:.3f}"
    )
    claims.figure(
        figures.spectra(rows),
        "spectra",
        "Spectra at the points found nearest the median energy of each phi (histograms), and equation (18) at their "
        "phi and energy with their mean (lines).",
    )
    claims.figure(
        figures.index(rows),
        "index",
        "Index against energy, one point a network. Curves: fits up to index 0.15, with exponent 3/2 (solid) and a free "
        "one (dashed). Crosses: (1 - phi)^2 / 2.",
    )


if __name__ == "__main__":
    sys.exit(main())
