"""Exact weights of resolved levels: what they buy, and that the errors that come with them are true."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import (
    NOISE,
    goe,
    hessian_like,
    lanczos_of,
    power_law,
    repelling_power_law,
    semicircle,
    spectrum_of,
)

from lightning_rmt.spectra.levels import ritz_levels
from lightning_rmt.spectra.quadrature import exact_weight_quadrature
from lightning_rmt.spectra.spectrum import Spectrum


def a_trained_network(rng):
    """The shape of a digits MLP's Hessian: a few large levels, a heavy tail that repels, as many negative, a core at 0."""
    tail = 0.3 * repelling_power_law(600, 0.8, rng) * 600**0.8 / 600**0.8
    return np.concatenate([12 * 0.8 ** np.arange(9), tail, -0.15 * tail[::2], 1e-3 * rng.standard_normal(1500)])


SPECTRA = {
    "network": a_trained_network(np.random.default_rng(0)),
    "power law": power_law(2000, 1.0),
    "spiked semicircle": np.append(semicircle(1996), [2.6, 3.0, 4.0, 5.2]),
    "hessian-like": hessian_like(2000, np.random.default_rng(0)),
    "t3": np.random.default_rng(0).standard_t(3, 2000),
    "mostly resolved": np.append(power_law(60, 1.0), 0.01 * semicircle(60)),
}


def inside(z, limit):
    return np.mean(np.abs(z) < limit)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("extra_probes", [0, 1], ids=["one probe", "with a three-vector probe"])
def test_trace_and_norm_carry_their_own_errors(name, extra_probes):
    eigenvalues = SPECTRA[name]
    z = []
    for seed in range(100):
        spectrum = spectrum_of(eigenvalues, 60, 1 + extra_probes, seed, reorthogonalise_all=False)
        trace, norm = spectrum.trace, spectrum.frobenius
        z.append(
            (
                (trace.mean - eigenvalues.sum()) / trace.stderr,
                (norm.mean - np.linalg.norm(eigenvalues)) / norm.stderr,
            )
        )
    for values in np.array(z).T:
        # 68 % and 95 % for a normal law; 100 draws scatter by 5 and 2.
        assert 0.52 < inside(values, 1) < 0.83
        assert inside(values, 2) > 0.86
        assert abs(values.mean()) < 0.6


def test_raw_weights_are_an_order_worse():
    # The control: without exact weights a probe's errors are dominated by what the outliers happen to weigh.
    eigenvalues = SPECTRA["network"]
    exact, raw = [], []
    for seed in range(40):
        spectrum = spectrum_of(eigenvalues, 60, seed=seed)
        run = spectrum.runs[0]
        exact.append((spectrum.trace.mean, spectrum.frobenius.mean**2))
        raw.append((2409 * run.weights @ run.nodes, 2409 * run.weights @ run.nodes**2))
    gain = np.std(raw, axis=0) / np.std(exact, axis=0)
    assert gain[0] > 3
    assert gain[1] > 50


def test_the_selection_of_levels_does_not_bias_the_norm():
    # A heavy level converges earlier and would lose its surplus: with the last resolved level set to 1/n, doubtful or not,
    # the bias is -0.20 standard deviations here.
    eigenvalues = SPECTRA["power law"]
    norms = np.array([spectrum_of(eigenvalues, 60, seed=seed).frobenius.mean for seed in range(400)])
    assert abs(norms.mean() - np.linalg.norm(eigenvalues)) < 0.13 * norms.std()


def test_more_probes_are_more_precise():
    eigenvalues = SPECTRA["t3"]
    one, four = (spectrum_of(eigenvalues, 60, probes).trace.stderr for probes in (1, 4))
    assert four == pytest.approx(one / 2, rel=0.2)


def test_a_probe_full_of_ghosts_is_cut_where_the_levels_end():
    eigenvalues = hessian_like(2000, np.random.default_rng(0))
    runs = (lanczos_of(eigenvalues, 100, 0), lanczos_of(eigenvalues, 100, 1, reorthogonalise=False))
    levels = ritz_levels(runs[0], NOISE)
    quadrature = exact_weight_quadrature(runs, levels, 2000, NOISE)
    assert quadrature.high == pytest.approx(np.sort(eigenvalues)[-quadrature.high.size :], rel=1e-6)
    assert quadrature.high.size >= 10
    beyond = runs[1].nodes > quadrature.high_cut
    assert beyond.sum() > quadrature.high.size  # ghosts
    for index in range(2):
        nodes, weights = quadrature.probe(index)
        assert weights.sum() == pytest.approx(1)
        assert (nodes[-10:] == quadrature.high[-10:]).all()
        assert weights[-10:] == pytest.approx(np.full(10, 1 / 2000))


def test_a_degenerate_level_keeps_the_weight_that_was_measured():
    eigenvalues = np.concatenate([np.full(100, 5.0), [9.0], goe(1900, np.random.default_rng(0))])
    spectrum = spectrum_of(eigenvalues, 60)
    # One level is exact (9), the next has weight 100/2001 and must not be set to 1/2001.
    assert spectrum.trace.mean == pytest.approx(eigenvalues.sum(), abs=4 * spectrum.trace.stderr)
    assert spectrum.trace.stderr > 30
    assert spectrum.cdf(6.0) - spectrum.cdf(4.0) == pytest.approx(100 / 2001, rel=0.5)


def test_a_level_of_which_copies_have_been_seen_keeps_its_measured_weight_too():
    # Multiplicity 3, so the weight alone (chi-squared with 3 degrees of freedom) says nothing; its copies do.
    eigenvalues = np.concatenate(
        [np.full(3, 9.0), [5.0, 4.0, 3.0], 10 ** np.random.default_rng(0).uniform(-3, -1, 500)]
    )
    found = [spectrum_of(eigenvalues, 60, seed=seed) for seed in range(60)]
    assert (np.abs(found[0].nodes - 9) < 1e-9).sum() > 1
    traces = np.array([spectrum.trace.mean for spectrum in found])
    assert abs(traces.mean() - eigenvalues.sum()) < 4 * traces.std() / 60**0.5
    assert 4 * traces.std() / 60**0.5 < 18  # what setting it to one level would cost


@pytest.mark.parametrize("steps", [10, 14, 20, 60])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        np.append(0.1 * semicircle(1950), np.repeat(2.0 ** np.arange(1, 6), 10)),
        np.append(0.1 * semicircle(1980), np.repeat(2.0 * np.arange(1, 11), 2)),
        np.repeat(power_law(700, 1.5), 3),
        np.repeat([0.0, 1.0, 2.0, 3.0, 5.0], 20),
    ],
    ids=["ten outputs", "pairs", "three outputs, heavy tail", "five values"],
)
def test_levels_of_unknown_multiplicity_keep_their_measured_weights(eigenvalues, steps):
    # Set to one level each, the resolved ones miss the norm by up to a thousand of its errors.
    worst = 0.0
    for seed in range(20):
        spectrum = spectrum_of(eigenvalues, steps, seed=seed)
        for estimate, truth in (
            (spectrum.trace, eigenvalues.sum()),
            (spectrum.frobenius, np.linalg.norm(eigenvalues)),
        ):
            worst = max(worst, abs(estimate.mean - truth) / estimate.stderr)
    assert worst < 5


def test_a_large_level_that_the_probe_hardly_sees_does_not_claim_a_small_error():
    # Five levels far out and close together: those that converge late are those of little weight.
    eigenvalues = np.append(np.random.default_rng(0).standard_normal(1995), 1000 + 10 * np.arange(5))
    z = []
    for seed in range(60):
        spectrum = spectrum_of(eigenvalues, 10, seed=seed)
        z.append(
            (
                (spectrum.trace.mean - eigenvalues.sum()) / spectrum.trace.stderr,
                (spectrum.frobenius.mean - np.linalg.norm(eigenvalues)) / spectrum.frobenius.stderr,
            )
        )
    assert np.abs(z).max() < 5
    for values in np.array(z).T:
        assert inside(values, 1) > 0.55
        assert inside(values, 2) > 0.86


def test_the_norm_is_not_known_better_than_the_products():
    run = lanczos_of(np.append(np.random.default_rng(0).standard_normal(2000), 1e6), 20)
    norm = Spectrum((run,), 2001, 20, noise=2.4e-6).frobenius
    assert norm.mean == pytest.approx(1e6, abs=norm.stderr)
    assert norm.stderr == pytest.approx(2.4, rel=0.1)


@pytest.mark.parametrize(
    "eigenvalues",
    [np.arange(1.0, 8.0), np.append(np.zeros(300), [3.0, -2.0, 1.0]), np.ones(5), np.zeros(4), np.array([2.5])],
    ids=["all simple", "low rank", "identity", "zero", "one by one"],
)
def test_an_exhausted_run_of_simple_levels_leaves_no_error(eigenvalues):
    spectrum = spectrum_of(eigenvalues, 50)
    assert spectrum.trace.mean == pytest.approx(eigenvalues.sum(), abs=1e-10)
    assert spectrum.frobenius.mean == pytest.approx(np.linalg.norm(eigenvalues), abs=1e-10)
    assert spectrum.trace.stderr == pytest.approx(0, abs=1e-10)


def test_an_exhausted_run_with_fewer_values_than_dimensions_is_not_taken_for_simple_levels():
    # Eigenvalue 1 nine times and 3 once: two nodes, ten dimensions. The heavy node must be the degenerate one.
    eigenvalues = np.append(np.ones(9), 3.0)
    errors = [abs(spectrum_of(eigenvalues, 10, seed=seed).trace.mean - 12.0) < 1e-9 for seed in range(20)]
    assert np.mean(errors) > 0.9
