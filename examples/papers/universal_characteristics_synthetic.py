"""`universal_characteristics` on matrices that are noise plus spikes, where its equations are exact as they grow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from claims import Claims
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from lightning_rmt import Spectrum, estimate_spectrum
from lightning_rmt.krylov.eigenpairs import top_eigenpairs
from lightning_rmt.local_law import (
    NoDampingError,
    VectorMeasure,
    clean,
    curvature_variance,
    damping_for,
    effective_damping,
    expected_curvature,
    ledoit_wolf,
    noise_edge,
    noise_scale,
    outlier_batch_fit,
    self_consistent_damping,
)

#: A bulk of three levels with its shares, and spikes: the true curvature of the sections on damping and cleaning.
LEVELS, SHARES, SPIKES = (0.0, 0.3, 1.0), (0.5, 0.3, 0.2), (1.0, 2.0, 4.0, 8.0)


class Dense:
    """A symmetric matrix as an operator."""

    def __init__(self, matrix: np.ndarray, samples: float | None = None) -> None:
        self.matrix, self.samples = torch.as_tensor(matrix), samples
        self.size, self.device, self.dtype = len(matrix), torch.device("cpu"), torch.float64

    def matmat(self, V: Tensor) -> Tensor:
        return V @ self.matrix


def goe(n: int, rng: np.random.Generator) -> np.ndarray:
    """GOE(1): off-diagonal variance 1/n, edges at -2 and 2."""
    g = rng.standard_normal((n, n))
    return (g + g.T) / (2 * n) ** 0.5


def one_spike(theta: float, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Largest eigenvalue of GOE(1) plus one spike, and its overlap; tridiagonal, of the same law (Householder)."""
    diagonal = rng.normal(0, 2**0.5, n) / n**0.5
    diagonal[0] += theta
    off = np.sqrt(rng.chisquare(np.arange(n - 1, 0, -1)) / n)
    value, vector = eigh_tridiagonal(diagonal, off, select="i", select_range=(n - 1, n - 1))
    return float(value[0]), float(vector[0, 0] ** 2)


class SpikeCurve(NamedTuple):
    """Spikes in units of sigma, shape (k,), and draws, shape (k, draws)."""

    theta: np.ndarray
    location: np.ndarray
    overlap: np.ndarray


def synthetic(claims: Claims) -> SpikeCurve:
    """Everything; returns what the figure shows."""
    spikes(claims)
    two_atoms(claims)
    curve = spike_curve(1500)
    batch_line(claims)
    noise_of_batches(claims)
    damping(claims)
    cleaning(claims)
    return curve


def spikes(claims: Claims) -> None:
    """(4): two spikes above the threshold and one below."""
    n, sigma, theta = 800 if claims.quick else 1500, 0.7, np.array([4.0, 2.0, 0.5])
    rng, rows, told, counts = np.random.default_rng(0), [], [], []
    for seed in range(4):
        matrix = sigma * goe(n, rng) + np.diag(np.append(theta, np.zeros(n - 3)))
        spectrum = estimate_spectrum(Dense(matrix), steps=200, probes=1, seed=seed)
        pairs = top_eigenpairs(Dense(matrix), 2, steps=100, seed=seed)
        cleaned = clean([level.value for level in spectrum.top[:3]], sigma, spectrum)
        seen = np.square(pairs.vectors.numpy()[[0, 1], [0, 1]])
        rows.append([cleaned.eigenvalues, cleaned.location, np.append(cleaned.overlap[:2], 0), np.append(seen, 0)])
        told.append(cleaned.told.tolist())
        counts.append(spectrum.outliers.high.count)
    value, location, predicted, seen = np.mean(rows, axis=0)
    for j in (0, 1):
        law, overlap = theta[j] + sigma**2 / theta[j], 1 - sigma**2 / theta[j] ** 2
        error = np.sqrt(2 * overlap / n / len(rows)) * sigma  # an outlier fluctuates by sigma sqrt(2 overlap / n)
        claims.near(
            "(4)", f"spike {theta[j]:g}, sigma .7: outlier", value[j], law, within=4 * error, source="4 of its errors"
        )
        claims.near("(4)", f"spike {theta[j]:g}: location theta from H alone", location[j], theta[j], relative=0.02)
        claims.near("(4)", f"spike {theta[j]:g}: overlap", seen[j], overlap, within=0.02)
        claims.near(
            "(4)", f"spike {theta[j]:g}: overlap from H alone", predicted[j], seen[j], within=0.02, source="seen"
        )
    claims.near("(4)", "spike .5, below the threshold: sticks to the edge", value[2], 2 * sigma, relative=0.02)
    refused = all(row == [True, True, False] for row in told) and set(counts) == {2}
    claims.true("(4)", "outliers reported in four draws", "2, never the third", f"{counts}", refused)


def two_atoms(claims: Claims) -> None:
    """(4) above a bulk with levels of its own, one fifth of them at 1."""
    n, sigma, theta, rng = 1000, 0.7, 3.0, np.random.default_rng(1)
    truth = np.append(theta, np.repeat([0.0, 1.0], [4 * n // 5, n // 5 - 1]))
    rows = []
    for seed in range(4):
        pairs = top_eigenpairs(Dense(np.diag(truth) + sigma * goe(n, rng)), 1, steps=60, seed=seed)
        rows.append((pairs.values[0], float(pairs.vectors[0, 0]) ** 2))
    value, seen = np.mean(rows, axis=0)
    law, overlap = theta + sigma**2 * (0.8 / 3 + 0.2 / 2), 1 - sigma**2 * (0.8 / 9 + 0.2 / 4)
    error = np.sqrt(2 * overlap / n / len(rows)) * sigma
    claims.near("(4)", "spike 3, bulk {0: .8, 1: .2}: outlier", value, law, within=4 * error, source="4 of its errors")
    claims.near("(4)", "the same: overlap", seen, overlap, within=0.02)


def spike_curve(n: int) -> SpikeCurve:
    theta, rng = np.linspace(0.3, 3, 19), np.random.default_rng(2)
    draws = np.array([[one_spike(one, n, rng) for _ in range(3)] for one in theta])
    return SpikeCurve(theta, draws[..., 0], draws[..., 1])


def batch_line(claims: Claims) -> None:
    """(3) against batch sizes: theta = 4 and 2, noise of one sample 4, 4000 samples."""
    n, theta, sigma, total, rng = (
        1500 if claims.quick else 3000,
        np.array([4.0, 2.0]),
        4.0,
        4000,
        np.random.default_rng(3),
    )
    sizes = np.repeat([16.0, 32, 64, 128, 256, 512], 8)
    scales = sigma * np.sqrt(1 / sizes - 1 / total)
    rows = [[s * one_spike(one / s, n, rng)[0] for one in theta] for s in scales]
    found = outlier_batch_fit(sizes, rows, total, sample_noise=sigma, bulk_mean=0.0)
    for one, expected in zip(found.theta, theta, strict=True):
        claims.near("(3)", f"batch fit: theta = {expected:g}", one.mean, expected, relative=0.01, stderr=one.stderr)
    claims.near("(3)", "batch fit: alpha", found.alpha.mean, sigma**2, relative=0.1, stderr=found.alpha.stderr)
    slope, error = found.alpha.mean / theta[1], found.alpha.stderr / theta[1]
    claims.near("(3)", "batch fit: slope of theta = 2 against 1/b", slope, 8.0, relative=0.1, stderr=error)
    claims.near(
        "(1)", "batch fit: q of s(b) = b^-q", found.exponent.mean, 0.5, within=0.05, stderr=found.exponent.stderr
    )
    claims.near("(3)", "batch fit: anisotropy", found.anisotropy.mean, 1.0, within=0.1, stderr=found.anisotropy.stderr)
    claims.between("(3)", "batch fit: R^2", found.r_squared, low=0.95)


def noise_of_batches(claims: Claims) -> None:
    """The variance V = E |H_b - A|_F^2 / P from products: sigma0 = 2, batches of 16 and P = 600 make .2504."""
    n, batch, draws, rng = 600, 16, 12, np.random.default_rng(4)
    truth = 4 / batch * (1 + 1 / n)
    matrices = [2 / batch**0.5 * goe(n, rng) for _ in range(draws)]
    halves = [
        noise_scale(Dense(one, batch), Dense(other, batch), probes=12, seed=seed).mean ** 2
        for seed, (one, other) in enumerate(zip(matrices[::2], matrices[1::2], strict=True))
    ]
    claims.near("V", "two batches", float(np.mean(halves)), truth, relative=0.03, stderr=np.std(halves) / 6**0.5)
    probes = rng.standard_normal((8, n))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    plug_in = float(np.mean([curvature_variance([one @ z for one in matrices]) for z in probes]))
    claims.near("V", "12 batches, times 12/11", plug_in * draws / (draws - 1), truth, relative=0.03)
    claims.near("V", "12 batches, as the damping learner has it", plug_in, truth * (draws - 1) / draws, relative=0.03)
    total, n = 64, 200
    samples = np.array([2 * goe(n, rng) for _ in range(total)])
    whole, spread = samples.mean(axis=0), samples.var(axis=0, ddof=1).sum() / n
    drawn = [samples[rng.permutation(total)[:batch]].mean(axis=0) - whole for _ in range(150)]
    ratio = float(np.mean([np.sum(one**2) / n for one in drawn])) / (spread / batch)
    claims.near("(1)", "V of 16 of 64 samples over that of 16 fresh ones", ratio, 1 - batch / total, relative=0.03)
    halves = noise_scale(Dense(samples[:32].mean(axis=0), 32), Dense(samples[32:].mean(axis=0), 32), probes=40)
    at = halves.at(batch, total).mean ** 2 / (halves.at(batch).mean ** 2)
    claims.near("(1)", "the same by NoiseScale.at", at, 1 - batch / total, relative=1e-9)


class Noisy(NamedTuple):
    """A matrix of known truth with noise of scale .5."""

    truth: np.ndarray
    matrix: np.ndarray
    spectrum: Spectrum


SIGMA = 0.5


def noisy(n: int, seed: int, **spectrum: int) -> Noisy:
    counts = [round(share * n) for share in SHARES]
    counts[0] -= len(SPIKES)
    truth = np.append(SPIKES, np.repeat(LEVELS, counts))
    matrix = np.diag(truth) + SIGMA * goe(n, np.random.default_rng(seed))
    return Noisy(truth, matrix, estimate_spectrum(Dense(matrix), seed=seed, **spectrum))


def damping(claims: Claims) -> None:
    """(5) to (7): the damping of which .8 is left."""
    n, wanted = 600 if claims.quick else 1200, 0.8
    draws = [noisy(n, seed, steps=100, probes=4) for seed in (5, 6)]
    exact = wanted + SIGMA**2 * np.mean(1 / (draws[0].truth + wanted))
    chosen = float(np.mean([damping_for(wanted, SIGMA, one.spectrum) for one in draws]))
    claims.near("(6)", "damping of which .8 is left, from the noisy spectrum", chosen, exact, relative=0.01)
    left = float(np.mean([effective_damping(exact, SIGMA, one.spectrum) for one in draws]))
    claims.near("(5)", "what is left of it", left, wanted, relative=0.01)
    resolvents = [np.linalg.inv(one.matrix + exact * np.eye(n)) for one in draws]
    for j, spike in enumerate(SPIKES):
        entry = float(np.mean([resolvent[j, j] for resolvent in resolvents]))
        claims.near("(5)", f"entry of (H + d)^-1 at a spike of {spike:g}", entry, 1 / (spike + wanted), relative=0.03)
    naive = np.mean([resolvents[k][0, 0] for k in (0, 1)]) * (1 + exact)
    claims.negative("no law", "entry at a spike of 1, over 1 / (1 + d)", "1", f"{naive:.3f}", naive > 1.05)

    # (7), in the trace: the true second-order cost of steps of which nothing is known but H
    ratios = []
    for one in draws:
        values, resolvent = np.linalg.eigvalsh(one.matrix), np.linalg.inv(one.matrix + 2 * np.eye(n))
        cost = expected_curvature(2.0, SIGMA, one.spectrum, VectorMeasure(values, np.ones(n)))
        ratios.append(cost / np.sum(np.square(resolvent) * one.truth))
    within = 0.05 if claims.quick else 0.03  # four standard deviations of two draws, .7 %
    claims.near("(7)", "tr E[R A R] from H alone over the truth, d = 2", float(np.mean(ratios)), 1.0, within=within)

    flat = estimate_spectrum(Dense(SIGMA * goe(n, np.random.default_rng(7))), steps=100, probes=2, seed=0)
    try:
        refusal = f"{effective_damping(0.9 * noise_edge(SIGMA), SIGMA, flat)}"
    except NoDampingError as error:
        refusal = str(error)
    claims.true(
        "(5), edge", "a damping of .9, flat curvature, edge 1", "refused", refusal[:48] + "...", "below" in refusal
    )
    claims.near(
        "(7)",
        "d = 2 sigma^2 tau(d), flat curvature",
        self_consistent_damping(SIGMA, flat),
        1.0,
        relative=0.03,
        source="2 sigma; before 1.008",
    )
    high = Dense(5 * np.eye(n) + 0.1 * goe(n, np.random.default_rng(8)))
    far = self_consistent_damping(0.1, estimate_spectrum(high, steps=60, probes=1, seed=0))
    claims.near("(7)", "the same, bulk at 5, sigma = .1", far, 0.004, relative=0.01, source="2 sigma^2 / 5")
    small = estimate_spectrum(Dense(1e-3 * draws[0].matrix), steps=100, probes=4, seed=5)
    covariant = damping_for(1e-3 * wanted, 1e-3 * SIGMA, small) / damping_for(wanted, SIGMA, draws[0].spectrum)
    claims.near("(6)", "d of a thousandth of H, over d", covariant, 1e-3, relative=1e-5)


def cleaning(claims: Claims) -> None:
    """(8) and (9) from a Lanczos quadrature alone, against the truth that no rule knows."""
    n, eta = 500 if claims.quick else 1000, 0.06
    one = noisy(n, 9, steps=80, probes=12)
    levels, vectors = np.linalg.eigh(one.matrix)
    mean, square = one.truth @ vectors**2, one.truth**2 @ vectors**2  # u'Au and u'A^2 u
    nodes, weights = one.spectrum.nodes.ravel(), one.spectrum.weights.ravel() / len(one.spectrum.nodes)
    z = levels + 1j * eta
    g = (1 / (z[:, None] - nodes)) @ weights
    xi = levels - 2 * SIGMA**2 * g.real
    rmse = float(np.sqrt(np.mean((xi - mean) ** 2)))
    claims.between("(8)", "RMSE of the cleaned curvature to u'Au", rmse, high=0.065, source="before: 0.053")

    def risk(curvature: np.ndarray) -> float:
        """|U curvature U' - A|_F^2 / P."""
        return float(np.mean(curvature**2 - 2 * curvature * mean + square))

    shrunk = ledoit_wolf(SIGMA, one.spectrum)
    linear = shrunk.intensity * levels + (1 - shrunk.intensity) * shrunk.target
    claims.near("(8)", "risk |H - A|^2 / P, raw", risk(levels), 0.2494, relative=0.02)
    claims.near("(8)", "risk, linear shrinkage", risk(linear), 0.1196, relative=0.15 if claims.quick else 0.05)
    claims.between("(8)", "risk, cleaned, over that of linear shrinkage", risk(xi) / risk(linear), high=0.8)
    claims.near("(8)", "risk, cleaned, over the oracle's", risk(xi) / risk(mean), 1.0, within=0.05)

    omega = z - SIGMA**2 * g
    first, second = (omega * g).imag / g.imag, (omega**2 * g - omega).imag / g.imag
    p = first / second
    # second >= first^2 as a mean of squares, and no step is longer than one over what the damping leaves
    longest = 2 / self_consistent_damping(SIGMA, one.spectrum)
    safe = np.clip(first / np.maximum(second, first**2), 0, longest)

    def loss(steps: np.ndarray) -> float:
        """|P A - I|_F^2 / P of the preconditioner U steps U'."""
        return float(np.mean(steps**2 * square - 2 * steps * mean + 1))

    uniform = min(loss(1 / (np.abs(levels) + d)) for d in np.geomspace(0.05, 5, 60))
    best = loss(mean / square)
    claims.near("(9)", "|P A - I|^2 / P, kept in bounds, over the oracle's", loss(safe) / best, 1.0, within=0.03)
    claims.between("(9)", "the same, over that of the best uniform damping", loss(safe) / uniform, high=1.0)
    claims.show("(9)", "the same as it stands, over the oracle's", "1", f"{loss(p) / best:.3f}")
    naive = loss(1 / np.maximum(np.abs(xi), 1e-3))
    claims.true(
        "(8), (9)",
        "1 / cleaned curvature as a step",
        "worse than any damping",
        f"{naive:.2f}, best {best:.3f}",
        naive > uniform,
    )
