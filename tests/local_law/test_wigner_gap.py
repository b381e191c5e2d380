"""Noise that isn't the same in all directions: how far the local law's cleaned curvature is off, and who hears of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from newton_harness import NoisyQuadratic, goe_spectrum

from lightning_rmt import DampingController
from lightning_rmt.local_law.cleaning import clean, wigner_gap
from lightning_rmt.local_law.damping import self_consistent_damping
from lightning_rmt.spectra.spectrum import Spectrum


def spiked(anisotropy, scale=0.1, n=600, seed=0):
    """The top eigenpair of ``e e' + N``, its true curvature, and the noisy matrix's spectrum."""
    random = np.random.default_rng(seed)
    N = random.standard_normal((n, n))
    N = scale * (N + N.T) / math.sqrt(2 * n)
    N[0, 1:] *= math.sqrt(anisotropy)
    N[1:, 0] *= math.sqrt(anisotropy)
    N[0, 0] = 0.0
    H = np.zeros((n, n))
    H[0, 0] = 1.0
    values, vectors = np.linalg.eigh(H + N)
    return values[-1], float(vectors[0, -1] ** 2), values


@pytest.mark.parametrize("anisotropy", [1.0, 8.0, 16.0])
def test_the_gap_is_what_the_local_law_is_off_by(anisotropy, exact_spectrum):
    value, truth, values = spiked(anisotropy)
    cleaned = clean([value], 0.1, exact_spectrum(values))
    off = abs(cleaned.curvature[0] - truth) / truth
    gap = wigner_gap(cleaned, anisotropy)
    assert gap == pytest.approx(off, abs=0.04)
    assert (gap > 0.2) == (anisotropy > 10)


@pytest.fixture
def exact_spectrum():
    from lightning_rmt.krylov.tridiagonal import Tridiagonal

    def of(values):
        """A quadrature with all of the eigenvalues: what endless Lanczos from an even start would see."""
        n = len(values)
        bulk = np.quantile(values[:-1], (np.arange(60) + 0.5) / 60)
        nodes = np.append(bulk, values[-1])
        weights = np.append(np.full(60, (1 - 1 / n) / 60), 1 / n)
        alpha, beta = lanczos(nodes, weights)
        return Spectrum((Tridiagonal(alpha, np.append(beta, 0.0)),), n, len(nodes), 1e-14)

    return of


def lanczos(nodes, weights):
    """Recurrence coefficients of a discrete measure, in full orthogonality."""
    basis = [np.sqrt(weights / weights.sum())]
    alpha, beta = [], []
    for step in range(len(nodes)):
        product = nodes * basis[-1]
        alpha.append(product @ basis[-1])
        for _ in range(2):
            product = product - sum((product @ row) * row for row in basis)
        if step < len(nodes) - 1:
            beta.append(np.linalg.norm(product))
            basis.append(product / beta[-1])
    return np.array(alpha), np.array(beta)


def test_so_much_noise_that_nothing_is_left():
    _, _, values = spiked(1.0)
    assert wigner_gap(clean([values[-1]], 0.1, goe_spectrum(0.1)), 1e4) == math.inf
    assert wigner_gap(clean([0.15], 0.1, goe_spectrum(0.1)), 50.0) is None  # within the noise: nothing to compare


def test_a_local_law_that_is_far_off_gives_way_to_held_out_curvature():
    problem = NoisyQuadratic(damping=1e-3, noise=1.0)
    control = DampingController(mode="control", method="local-law", every=1).attach(problem.optimizer)
    control.update(goe_spectrum(), 1.0, wigner_gap=0.19)
    problem.run(control, 2)
    assert control.report.ratio is None
    with pytest.warns(RuntimeWarning, match="21% off in the outliers' directions"):
        control.update(goe_spectrum(), 1.0, wigner_gap=0.21)
    problem.run(control, 1)
    assert control.report.ratio is not None
    before = control.damping
    control.update(goe_spectrum(0.01), 0.01, wigner_gap=0.0)  # and stays with it
    assert control.damping == before != self_consistent_damping(0.01, goe_spectrum(0.01))
