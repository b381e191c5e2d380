"""Noise eats damping: the rules against simulated resolvents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import goe, marchenko_pastur, spectrum_of
from noisy_matrices import goe_matrix, true_curvature, wigner
from scipy.optimize import brentq

from lightning_rmt.local_law import (
    NoDampingError,
    damping_for,
    effective_damping,
    noise_edge,
    self_consistent_damping,
    smallest_damping,
)

N = 1500
CASES = [("flat", 1.0), ("bulk", 1.0), ("power", 0.1), ("network", 1.0)]


def effective_by_simulation(kind, noise, damping, seeds=(0, 1)):
    """The damping of the true matrix whose resolvent has the same trace, and the largest share of it a draw is off."""
    trace = np.mean([np.mean(1 / (wigner(kind, noise, N, seed).levels + damping)) for seed in seeds])
    truth = true_curvature(kind, N)
    return brentq(lambda k: np.mean(1 / (truth + k)) - trace, 1e-9 - truth.min(), 1e6, rtol=1e-12)


@pytest.mark.parametrize(("kind", "noise"), CASES)
@pytest.mark.parametrize("times", [1.1, 1.5, 4.0])
def test_effective_damping_is_that_of_simulated_resolvents(kind, noise, times):
    """T2, second half."""
    draws = [wigner(kind, noise, N, seed) for seed in (0, 1)]
    damping = times * max(2 * noise, *(-draw.levels[0] for draw in draws))
    truth = effective_by_simulation(kind, noise, damping)
    found = np.mean([effective_damping(damping, noise, draw.spectrum) for draw in draws])
    assert found == pytest.approx(truth, rel=0.01)
    clean = spectrum_of(draws[0].truth, 100)
    assert effective_damping(damping, noise, clean, spectrum_noise=0.0) == pytest.approx(truth, rel=0.01)
    assert damping_for(truth, noise, clean, spectrum_noise=0.0) == pytest.approx(damping, rel=0.01)


def test_a_spectrum_with_part_of_the_noise():
    less, more, truth = 0.6, 1.0, true_curvature("power", N)
    rng = np.random.default_rng(7)
    measured = np.diag(truth) + less * goe_matrix(N, rng)
    batch = measured + (more**2 - less**2) ** 0.5 * goe_matrix(N, rng)
    spectrum, damping = spectrum_of(np.linalg.eigvalsh(measured), 100), 2.6
    trace = np.mean(1 / (np.linalg.eigvalsh(batch) + damping))
    known = brentq(lambda k: np.mean(1 / (truth + k)) - trace, 1e-9, 100)
    assert effective_damping(damping, more, spectrum, spectrum_noise=less) == pytest.approx(known, rel=0.01)
    assert abs(effective_damping(damping, more, spectrum) / known - 1) > 0.01  # taken for the batch's own


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "noise"), CASES)
def test_the_inverse(kind, noise, share):
    spectrum = wigner(kind, noise, N).spectrum if share in (None, 1.0) else spectrum_of(true_curvature(kind, N), 100)
    inside = None if share is None else share * noise
    for damping in smallest_damping(noise, spectrum, spectrum_noise=inside) * np.array([1.001, 1.1, 2, 10, 1e4]):
        left = effective_damping(damping, noise, spectrum, spectrum_noise=inside)
        assert left < damping
        assert damping_for(left, noise, spectrum, spectrum_noise=inside) == pytest.approx(damping, rel=1e-8)


def test_noise_spares_parameters_that_do_nothing():
    """A dead block: noise on the others alone, of variance ``s^2 / (1 - z)`` there."""
    n, dead, noise, damping = 1200, 480, 0.5, 2.0
    truth = marchenko_pastur(n - dead)
    block = np.diag(truth) + noise * (n / (n - dead)) ** 0.5 * goe_matrix(n - dead, np.random.default_rng(0))
    levels = np.linalg.eigvalsh(block)
    known = brentq(lambda k: np.mean(1 / (truth + k)) - np.mean(1 / (levels + damping)), 1e-9, 100)
    spectrum = spectrum_of(np.concatenate([levels, np.zeros(dead)]), 100)
    assert effective_damping(damping, noise, spectrum) == pytest.approx(known, rel=0.01)
    assert known == pytest.approx(1.85, rel=0.01)
    plain = damping - noise**2 * np.mean(1 / (np.concatenate([levels, np.zeros(dead)]) + damping))
    assert plain > known * 1.02  # the formula on all directions


# --- the fixed point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_flat_curvature_wants_the_noise_edge(seed, noise):
    """T1: ``2 s`` within 3 %, half of it effective."""
    spectrum = spectrum_of(noise * goe(2000, np.random.default_rng(seed)), 100, seed=seed)
    damping = self_consistent_damping(noise, spectrum)
    assert damping == pytest.approx(noise_edge(noise), rel=0.03)
    assert self_consistent_damping(noise, spectrum_of(np.zeros(500), 3), spectrum_noise=0.0) == pytest.approx(2 * noise)


def test_flat_curvature_by_the_closed_form():
    spectrum = spectrum_of(np.zeros(500), 3)  # d = k + s^2 / k
    assert damping_for(2.0, 1.0, spectrum, spectrum_noise=0.0) == pytest.approx(2.5, rel=1e-12)
    assert effective_damping(2.5, 1.0, spectrum, spectrum_noise=0.0) == pytest.approx(2.0, rel=1e-12)
    assert smallest_damping(1.0, spectrum, spectrum_noise=0.0) == pytest.approx(2.0, rel=1e-12)


def test_a_bulk_far_above_the_noise():
    """T1: ``2 s^2 / mu`` within 2 %."""
    levels = 5 + 0.1 * goe(2000, np.random.default_rng(0))
    assert self_consistent_damping(0.1, spectrum_of(levels, 100)) == pytest.approx(2 * 0.1**2 / 5, rel=0.02)
    clean = spectrum_of(np.full(2000, 5.0), 3)
    assert self_consistent_damping(0.1, clean, spectrum_noise=0.0) == pytest.approx(2 * 0.1**2 / 5, rel=0.02)


@pytest.mark.parametrize(("kind", "noise"), CASES)
def test_the_fixed_point_is_one(kind, noise):
    spectrum = wigner(kind, noise, N).spectrum
    damping = self_consistent_damping(noise, spectrum)
    if damping > smallest_damping(noise, spectrum):
        assert effective_damping(damping, noise, spectrum) == pytest.approx(damping / 2, rel=1e-9)
    clean = self_consistent_damping(noise, spectrum_of(true_curvature(kind, N), 100), spectrum_noise=0.0)
    assert damping == pytest.approx(clean, rel=0.03)


def test_deep_negative_curvature_leaves_the_smallest_stable_damping():
    levels = -5 + 0.1 * goe(1000, np.random.default_rng(0))
    spectrum = spectrum_of(levels, 100)
    damping = self_consistent_damping(0.1, spectrum)
    assert damping == smallest_damping(0.1, spectrum)
    assert -levels[0] < damping < 5.21


# --- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99), noise=st.floats(0.0, 3.0), shift=st.floats(-3, 6), share=st.sampled_from([None, 0.0, 0.7])
)
def test_more_damping_leaves_more(seed, noise, shift, share):
    """T1: monotone, so that the inverse and the fixed point are unique."""
    rng = np.random.default_rng(seed)
    spectrum = spectrum_of(np.sort(shift + rng.standard_exponential(60) * rng.choice([0.1, 1, 10])), 12, seed=seed)
    inside = None if share is None else share * noise
    smallest = smallest_damping(noise, spectrum, spectrum_noise=inside)
    dampings = smallest + np.geomspace(1e-3, 1e3, 25)
    left = [effective_damping(damping, noise, spectrum, spectrum_noise=inside) for damping in dampings]
    assert (np.diff(left) > 0).all()
    assert self_consistent_damping(noise, spectrum, spectrum_noise=inside) >= smallest >= 0


@settings(max_examples=20, deadline=None)
@given(
    scale=st.sampled_from([1e-9, 1e-3, 100.0, 1e7]), share=st.sampled_from([None, 0.0, 0.7]), seed=st.integers(0, 20)
)
def test_scale_covariance(scale, share, seed):
    """T6: c times the curvature and the noise make c times the damping."""
    levels = np.sort(np.random.default_rng(seed).standard_normal(200))
    one, scaled = spectrum_of(levels, 30, seed=seed), spectrum_of(scale * levels, 30, seed=seed)
    inside = [None if share is None else share * c for c in (0.4, 0.4 * scale)]
    for rule in (
        lambda s, c, i: self_consistent_damping(0.4 * c, s, spectrum_noise=i),
        lambda s, c, i: smallest_damping(0.4 * c, s, spectrum_noise=i),
        lambda s, c, i: effective_damping(4 * c, 0.4 * c, s, spectrum_noise=i),
        lambda s, c, i: damping_for(4 * c, 0.4 * c, s, spectrum_noise=i),
    ):
        assert rule(scaled, scale, inside[1]) == pytest.approx(scale * rule(one, 1.0, inside[0]), rel=1e-6)


# --- limits and refusals ---------------------------------------------------------------------------------------------


def test_without_noise_nothing_is_eaten():
    """T13: and nothing is divided by zero."""
    spectrum = spectrum_of(true_curvature("power", 300), 40)
    assert effective_damping(0.3, 0.0, spectrum) == damping_for(0.3, 0.0, spectrum) == 0.3
    assert self_consistent_damping(0.0, spectrum) == 0.0 == noise_edge(0.0)
    assert effective_damping(0.0, 0.0, spectrum_of(np.zeros(10), 2)) == 0.0
    assert self_consistent_damping(0.0, spectrum_of(np.zeros(10), 2)) == 0.0


def test_dampings_below_the_edge_are_refused():
    spectrum = wigner("flat", 1.0, N).spectrum
    with pytest.raises(NoDampingError, match=r"a damping of 1\.9 is below the bulk edge: under (1\.9|2)"):
        effective_damping(1.9, 1.0, spectrum)
    with pytest.raises(NoDampingError, match=r"no damping leaves an effective damping of 0\.1: .* leaves 1\."):
        damping_for(0.1, 1.0, spectrum)  # d = .1 + 1 / .1 is on the wrong branch
    clean = spectrum_of(true_curvature("flat", N), 100)
    with pytest.raises(NoDampingError, match="below the bulk edge"):
        effective_damping(1.9, 1.0, clean, spectrum_noise=0.0)
    with pytest.raises(NoDampingError, match="no damping leaves"):
        damping_for(0.1, 1.0, clean, spectrum_noise=0.0)
    with pytest.raises(NoDampingError, match="singular"):
        effective_damping(1.0, 0.1, spectrum_of(np.append(np.full(60, -1.0), np.linspace(1, 2, 40)), 40))


def test_a_counted_negative_outlier_raises_nothing():
    levels = np.sort(np.append(goe(1000, np.random.default_rng(0)), -9.0))
    spectrum = spectrum_of(levels, 100)
    assert spectrum.outliers.low.count == 1
    assert smallest_damping(1.0, spectrum) < 2.1 < self_consistent_damping(1.0, spectrum) + 0.2


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_arguments(bad):
    spectrum = spectrum_of(true_curvature("power", 100), 20)
    with pytest.raises(ValueError, match="damping must be finite and at least 0"):
        effective_damping(bad, 0.1, spectrum)
    for rule in (effective_damping, damping_for):
        with pytest.raises(ValueError, match=r"noise must be finite and at least 0.*variance s"):
            rule(1.0, bad, spectrum)
    for rule in (self_consistent_damping, smallest_damping):
        with pytest.raises(ValueError, match="noise must be finite"):
            rule(bad, spectrum)
    with pytest.raises(ValueError, match="noise must be finite"):
        noise_edge(bad)
    if bad != -1.0:
        with pytest.raises(ValueError, match="effective must be a finite number"):
            damping_for(bad, 0.1, spectrum)
    with pytest.raises(ValueError, match="spectrum_noise must be"):
        effective_damping(1.0, 0.1, spectrum, spectrum_noise=bad)


def test_other_arguments():
    spectrum = spectrum_of(true_curvature("power", 100), 20)
    with pytest.raises(ValueError, match=r"noise 0\.2, more than the 0\.1"):
        effective_damping(1.0, 0.1, spectrum, spectrum_noise=0.2)
    with pytest.raises(TypeError, match=r"expected a lightning_rmt\.Spectrum, got ndarray"):
        effective_damping(1.0, 0.1, np.ones(3))
