"""Standard errors of what the local law says, on simulated matrices: they are what the answers scatter about the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from known_spectra import marchenko_pastur, spectrum_of
from noisy_matrices import goe_matrix
from scipy.optimize import brentq

from lightning_rmt.local_law import clean, self_consistent_damping, self_consistent_damping_error, smallest_damping
from lightning_rmt.local_law.resolvent import Resolvent

N, REPEATS = 300, 30
FLAT = np.concatenate([np.zeros(N - 3), [2.0, 4.0, 8.0]])
BULK = np.concatenate([marchenko_pastur(N - 4), [5.0, 7.0, 9.0, 14.0]])
WIDE = np.concatenate([np.linspace(0, 3, N - 3), [8.0, 12.0, 20.0]])


def measured(truth, noise, relative):
    """Spectra of noisy matrices with what is known of each; the noise scale is known to so much."""
    rng = np.random.default_rng(3)
    for seed in range(REPEATS):
        levels, vectors = np.linalg.eigh(np.diag(truth) + noise * goe_matrix(N, rng))
        yield levels, vectors, spectrum_of(levels, 60, 1, seed=seed), noise * (1 + relative * rng.standard_normal())


def in_errors(found):
    return np.sqrt(np.mean(np.square(found)))


@pytest.mark.parametrize("relative", [0.0, 0.05])
@pytest.mark.parametrize(("truth", "noise"), [(FLAT, 0.5), (BULK, 0.3), (WIDE, 1.0)], ids=["flat", "bulk", "wide"])
def test_cleaned_outliers(truth, noise, relative):
    apart = []
    for _, vectors, spectrum, known in measured(truth, noise, relative):
        count = spectrum.outliers.high.count
        if not count:
            continue
        levels = spectrum.top[:count]
        found = clean([level.value for level in levels], known, spectrum, noise_stderr=relative * known)
        u = vectors[:, ::-1][:, :count]
        apart += list((found.curvature - (u**2 * truth[:, None]).sum(axis=0))[found.told] / found.stderr[found.told])
    assert len(apart) >= 2 * REPEATS
    assert in_errors(apart) == pytest.approx(1, abs=0.2)
    assert np.mean(np.abs(apart) < 2) > 0.9


def test_residuals_and_outliers_that_move_by_themselves_make_it_larger():
    _, _, spectrum, _ = next(iter(measured(FLAT, 0.5, 0.0)))
    values = [level.value for level in spectrum.top[:3]]
    plain = clean(values, 0.5, spectrum).stderr
    moved = clean(values, 0.5, spectrum, along=1.0).stderr
    steep = 1 / clean(values, 0.5, spectrum).overlap - 1
    np.testing.assert_allclose(moved, np.sqrt(1 + 2 * steep), rtol=0.01)
    apart = clean(values, 0.5, spectrum, residuals=[0.3, 0.2, 0.1]).stderr
    np.testing.assert_allclose(apart**2 - plain**2, ((1 + 2 * steep) * [0.3, 0.2, 0.1]) ** 2, rtol=1e-9)
    assert clean(values, 0.0, spectrum).stderr.tolist() == [0, 0, 0]


def exact_damping(levels, noise, added):
    """Of these eigenvalues, with s_0^2 = noise^2 - added in them, counted outliers left out."""
    return brentq(lambda k: k - (2 * noise**2 - added) * np.sum(1 / (levels + k)) / N, 1e-9 - levels[0], 1e3)


@pytest.mark.parametrize(("truth", "noise", "share"), [(BULK, 0.3, 1.0), (WIDE, 0.5, 1.0), (WIDE, 1.0, 0.6)])
@pytest.mark.parametrize("relative", [0.0, 0.05])
def test_damping(truth, noise, share, relative):
    apart = []
    for levels, _, spectrum, known in measured(truth, share * noise, relative):
        both = {"spectrum_noise": known}
        found = self_consistent_damping(known / share, spectrum, **both)
        error = self_consistent_damping_error(known / share, spectrum, **both, noise_stderr=relative * known / share)
        bulk = levels[: N - spectrum.outliers.high.count]
        added = noise**2 * (1 - share**2)
        k = exact_damping(bulk, noise, added)
        exact = k + added * np.sum(1 / (bulk + k)) / N
        if not math.isnan(error):
            apart.append((found - exact) / error)
    assert len(apart) > 0.8 * REPEATS
    assert in_errors(apart) == pytest.approx(1, abs=0.25)


def test_a_damping_at_the_bulks_edge_has_no_error():
    _, _, spectrum, _ = next(iter(measured(FLAT, 0.5, 0.0)))
    assert self_consistent_damping(0.1, spectrum) == smallest_damping(0.1, spectrum)
    assert math.isnan(self_consistent_damping_error(0.1, spectrum))
    assert math.isnan(self_consistent_damping_error(0.0, spectrum_of(WIDE, 60, 1)))


def test_zeros_that_noise_does_not_reach():
    """A third of the directions is dead: their sampled number moves the mean over the others, and the noise in them."""
    alive, noise = 200, 0.4  # over all directions
    rng, apart = np.random.default_rng(5), []
    for seed in range(40):
        within = noise * (N / alive) ** 0.5
        levels = np.linalg.eigvalsh(np.diag(np.linspace(0.3, 3, alive)) + within * goe_matrix(alive, rng))
        spectrum = spectrum_of(np.concatenate([levels, np.zeros(N - alive)]), 60, 1, seed=seed)
        if Resolvent.of(spectrum, noise).dead == 0:  # the live ones leave too wide a gap around zero to tell
            continue
        exact = brentq(lambda k: k - 2 * within**2 * np.mean(1 / (levels + k)), 1e-9 - levels[0], 1e3)  # noqa: B023
        found = self_consistent_damping(noise, spectrum)
        apart.append((found - exact) / self_consistent_damping_error(noise, spectrum))
    assert len(apart) >= 30
    assert in_errors(apart) == pytest.approx(1, abs=0.25)
