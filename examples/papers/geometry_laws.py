"""Pennington and Bahri's two laws as matrices: sections 5 and 6 without a network."""

from __future__ import annotations

from fractions import Fraction

import geometry_figures as figures
import numpy as np
import torch
from claims import Claims
from geometry_index import ks
from scipy.optimize import brentq

from lightning_rmt import Hessian, estimate_spectrum
from lightning_rmt.laws import RefinedWishartPlusWigner, WishartPlusWigner

#: theory.md 5.3: phi to eps_c of (21), alpha0 of (20), alpha / (eps/eps_c - 1)^(3/2) at .02, .04 and .08, slope between .02
#: and .04 in logarithms (the notes' own derivation: the paper leaves alpha0 to its supplement).
THRESHOLDS = {
    1 / 8: (0.075214, 0.11721, (0.11514, 0.11314, 0.10932), 1.463),
    1 / 4: (0.043510, 0.07483, (0.07366, 0.07253, 0.07036), 1.467),
    1 / 2: (0.011271, 0.03350, (0.03303, 0.03258, 0.03170), 1.470),
    2 / 3: (0.003103, 0.01839, (0.01814, 0.01790, 0.01744), 1.472),
}
ABOVE = np.array([0.02, 0.04, 0.08])
NOTES = "our derivation"
#: Start vectors of the fit, which takes a small difference of two cumulants for the energy, and their Lanczos steps.
PROBES, STEPS = 100, 20


def density(claims: Claims, n: int) -> None:
    """Section 5: the cubic (18) against H0 + H1 as the paper defines them, dense and in no special basis."""
    random, shown = np.random.default_rng(0), []
    for phi, eps in ((0.25, 0.1), (0.5, 0.5), (0.75, 1.0)):
        law = WishartPlusWigner(phi, eps)
        X = random.standard_normal((n, round(n / phi)))
        G = random.standard_normal((n, n)) * np.sqrt(eps / n)  # G + G' has off-diagonal variance 2 eps / n
        eigenvalues = np.linalg.eigvalsh(X @ X.T / X.shape[1] + G + G.T)
        claims.between("(18)", f"KS to simulation, phi {phi}, eps {eps}", ks(law, eigenvalues), high=6 / n)
        index = float((eigenvalues < 0).mean())
        claims.near("5.3", f"index, phi {phi}, eps {eps}", index, law.index, within=4 / n)
        shown.append((law, eigenvalues))
    claims.figure(
        figures.laws(shown), "laws", f"Equation (18) (lines) and one simulated H0 + H1 of dimension {n} (histograms)."
    )


def threshold(claims: Claims) -> None:
    """Where the index leaves zero, (21) and (22), and how, (20)."""
    for phi, (critical, alpha0, ratios, slope) in THRESHOLDS.items():
        law, share = WishartPlusWigner(phi, 1.0), Fraction(phi).limit_denominator(20)
        printed = (1 - 20 * phi - 8 * phi**2 + (1 + 8 * phi) ** 1.5) / 16
        edge = brentq(lambda eps, phi=phi: WishartPlusWigner(phi, eps).edges[0], printed / 2, printed * 2, xtol=1e-12)
        claims.near("(21)", f"eps_c where the lower edge is 0, phi {share}", edge, printed, relative=1e-6)
        claims.near("(21)", f"eps_c in closed form, phi {share}", law.critical_energy, critical, within=6e-7)
        claims.near("(20)", f"alpha0, phi {share}", law.threshold_factor, alpha0, within=6e-6, source=NOTES)
        index = np.array([WishartPlusWigner(phi, law.critical_energy * (1 + r)).index for r in ABOVE])
        off = np.abs(index / ABOVE**1.5 - ratios).max()
        claims.between(
            "(20)", f"alpha / rel^1.5 off the table, rel .02 .04 .08, phi {share}", off, high=3e-5, source=NOTES
        )
        slopes = np.diff(np.log(index)) / np.diff(np.log(ABOVE))
        claims.near("(20)", f"slope over .02 to .08, phi {share}", slopes.mean(), slope, within=0.012, source=NOTES)
    near = WishartPlusWigner(0.25, WishartPlusWigner(0.25, 1).critical_energy * 1.001).index
    near = np.log(WishartPlusWigner(0.25, WishartPlusWigner(0.25, 1).critical_energy * 1.002).index / near) / np.log(2)
    claims.near("(20)", "slope over .001 to .002, phi 1/4", near, 1.5, within=0.005)
    tenth = WishartPlusWigner(0.25, 1.1 * WishartPlusWigner(0.25, 1).critical_energy).index
    claims.show("(20)", "negative eigenvalues of 512 at eps = 1.1 eps_c, phi 1/4", "", f"{512 * tenth:.1f}")
    for phi, ratio in ((0.9, 1.035), (0.99, 1.0033)):
        limit = 2 / 27 * (1 - phi) ** 3
        ours = WishartPlusWigner(phi, 1.0).critical_energy / limit
        claims.near("(22)", f"eps_c over 2/27 (1 - phi)^3, phi {phi}", ours, ratio, within=6e-4, source=NOTES)


def refined(claims: Claims) -> None:
    """Section 6: the quartic (30) has its own threshold (32)."""
    for phi, critical in ((0.25, 0.6274170), (0.5, 0.0810367)):
        law = RefinedWishartPlusWigner(phi, 1.0)
        edge = brentq(
            lambda eps, phi=phi: RefinedWishartPlusWigner(phi, eps).edges[0], critical / 2, critical * 2, xtol=1e-12
        )
        claims.near("(32)", f"refined eps_c, phi {phi}", law.critical_energy, critical, within=6e-8)
        claims.near("(30)", f"refined eps_c where the lower edge is 0, phi {phi}", edge, critical, relative=1e-6)
    for phi in (0.99, 0.999):
        limit = 8 / 27 * (1 - phi) ** 3
        ours = RefinedWishartPlusWigner(phi, 1.0).critical_energy / limit
        claims.near("(33)", f"refined eps_c over 8/27 (1 - phi)^3, phi {phi}", ours, 1.0, within=1.1 * (1 - phi))


def fit(claims: Claims, n: int) -> None:
    """The parameters of (18) back from Hessian products with a matrix drawn from it."""
    phi, eps = 0.25, 0.1
    random = torch.Generator().manual_seed(1)
    X = torch.randn(n, round(n / phi), generator=random, dtype=torch.float64)
    G = torch.randn(n, n, generator=random, dtype=torch.float64) * (eps / n) ** 0.5
    A = X @ X.T / X.shape[1] + G + G.T
    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    operator = Hessian(lambda _: x @ A @ x / 2, [x], [None])
    found = WishartPlusWigner.fit(estimate_spectrum(operator, steps=STEPS, probes=PROBES, seed=0))
    within = 0.05 * (1200 / n) ** 0.5
    for name, true in (("phi", phi), ("energy", eps)):
        ours, said = found.parameters[name], f"{name} fitted to {operator.products} products, n = {n}"
        claims.near("(18)", said, ours.mean, true, relative=within, stderr=ours.stderr)
