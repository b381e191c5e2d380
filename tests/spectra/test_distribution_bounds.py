"""The Chebyshev-Markov-Stieltjes band: true for every spectrum, and tight where something is known."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import (
    hessian_like,
    lanczos_of,
    marchenko_pastur,
    power_law,
    repelling_power_law,
    semicircle,
    spectrum_of,
    two_cut,
)

from lightning_rmt.spectra.band import node_bounds, stieltjes_bounds


def share_below(eigenvalues, x):
    return np.searchsorted(np.sort(eigenvalues), x, side="right") / len(eigenvalues)


def what_the_probe_sees(eigenvalues, seed, x):
    weight = np.random.default_rng(seed).standard_normal(len(eigenvalues)) ** 2
    order = np.argsort(eigenvalues)
    return np.append(0, np.cumsum(weight[order]) / weight.sum())[np.searchsorted(eigenvalues[order], x, side="right")]


@pytest.mark.parametrize("steps", [5, 20, 60])
@pytest.mark.parametrize("kind", ["power law", "two cuts", "atom"])
def test_bounds_hold_without_exception_for_what_the_start_vector_sees(kind, steps):
    rng = np.random.default_rng(0)
    eigenvalues = {"power law": power_law(800, 0.7), "two cuts": two_cut(800), "atom": hessian_like(800, rng)}[kind]
    x = np.concatenate([np.linspace(eigenvalues.min() - 0.1, eigenvalues.max() + 0.1, 101), eigenvalues[:50]])
    for seed in range(3):
        run = lanczos_of(eigenvalues, steps, seed)
        x_all = np.append(x, run.nodes)  # at the nodes the prescribed entry is infinite
        lower, upper = stieltjes_bounds(run, x_all)
        seen = what_the_probe_sees(eigenvalues, seed, x_all)
        assert (lower <= seen + 1e-9).all()
        assert (seen <= upper + 1e-9).all()
        assert (upper - lower).max() < 1.0 if steps > 20 else True


@pytest.mark.parametrize(
    "eigenvalues", [semicircle(3000), hessian_like(3000, np.random.default_rng(0)), power_law(3000, 1.0)]
)
def test_the_cheap_bounds_contain_the_sharp_ones(eigenvalues):
    run = lanczos_of(eigenvalues, 40)
    x = np.sort(np.append(np.linspace(eigenvalues.min() - 0.1, eigenvalues.max() + 0.1, 200), run.nodes))
    sharp, cheap = stieltjes_bounds(run, x), node_bounds(run, x)
    assert (cheap[0] <= sharp[0] + 1e-7).all()
    assert (sharp[1] <= cheap[1] + 1e-7).all()
    middle = (run.nodes[1:] + run.nodes[:-1]) / 2
    (low, high), (wide_low, wide_high) = stieltjes_bounds(run, middle), node_bounds(run, middle)
    assert np.median((high - low) / (wide_high - wide_low)) < 0.8


truths = pytest.mark.parametrize(
    "eigenvalues",
    [
        semicircle(2000),
        marchenko_pastur(2000),
        power_law(2000, 1.0),
        hessian_like(2000, np.random.default_rng(0)),
        repelling_power_law(2000, 0.5, np.random.default_rng(0)),
    ],
    ids=["semicircle", "marchenko-pastur", "power law", "hessian-like", "repelling"],
)


@truths
def test_the_band_covers_the_true_distribution(eigenvalues):
    # Pointwise at two standard errors of sampling: at least 95 %, and more where the resolution adds to it.
    x = np.quantile(eigenvalues, [0.01, 0.05, 0.2, 0.35, 0.65, 0.8, 0.95, 0.99])
    missed = []
    for seed in range(40):
        lower, upper = spectrum_of(eigenvalues, 60, seed=seed).cdf_band(x)
        truth = share_below(eigenvalues, x)
        missed.append((truth < lower - 1e-9) | (truth > upper + 1e-9))
    assert np.mean(missed) < 0.05


@truths
def test_the_truth_is_never_five_errors_outside(eigenvalues):
    """T13: 100 runs in all, at every node and between them."""
    for seed in range(20):
        spectrum = spectrum_of(eigenvalues, 60, seed=seed)
        nodes = spectrum.nodes[0]
        # A level that is resolved counts as one at its node; its eigenvalue is up to 4e-5 of it away here.
        for x, apart in ((nodes, 1e-4 * np.abs(nodes)), ((nodes[1:] + nodes[:-1]) / 2, 0.0)):
            lower, upper = spectrum.cdf_band(x, z=5)
            assert (share_below(eigenvalues, x + apart) >= lower - 1e-9).all()
            assert (share_below(eigenvalues, x - apart) <= upper + 1e-9).all()


def test_sampling_must_be_in_the_band():
    # The control: the bare inequalities bound what the probe sees, not the spectrum.
    eigenvalues = semicircle(300)
    x = np.quantile(eigenvalues, np.linspace(0.05, 0.95, 19))
    truth = share_below(eigenvalues, x)
    missed = 0.0
    for seed in range(20):
        lower, upper = spectrum_of(eigenvalues, 120, seed=seed).cdf_band(x, z=0)
        missed += np.mean((truth < lower) | (truth > upper)) / 20
    assert missed > 0.1


def test_the_band_excludes_another_law():
    x = np.linspace(0.2, 2.8, 50)
    lower, upper = spectrum_of(marchenko_pastur(4000), 60).cdf_band(x, z=5)
    other = share_below(1 + 0.5**0.5 * semicircle(4000), x)  # same mean and variance
    assert ((other < lower) | (other > upper)).any()


def test_the_tail_of_resolved_levels_is_exact():
    eigenvalues = power_law(2000, 1.0)
    spectrum = spectrum_of(eigenvalues, 100)
    x = np.array([0.0402, 0.101, 0.3, 0.99, 1.1])
    lower, upper = spectrum.cdf_band(x)
    assert lower == pytest.approx(share_below(eigenvalues, x))
    assert upper == pytest.approx(lower)
    # 20 of 2000 levels are above the 0.99-quantile: counted, not estimated
    low, high = spectrum.quantile_bounds(0.99)
    assert low == pytest.approx(1 / 21, rel=1e-6)
    assert high == pytest.approx(1 / 21, rel=1e-6)
    assert spectrum.quantile(0.99) == pytest.approx(1 / 21, rel=1e-6)


def test_quantiles_and_their_bounds():
    eigenvalues = semicircle(4000)
    hits = []
    for seed in range(15):
        spectrum = spectrum_of(eigenvalues, 60, seed=seed)
        for p in (0.01, 0.3, 0.5, 0.99):
            low, high = spectrum.quantile_bounds(p)
            truth = np.quantile(eigenvalues, p)
            hits.append(low <= truth <= high)
            assert low <= spectrum.quantile(p) <= high
            bare_low, bare_high = spectrum.quantile_bounds(p, z=0)
            assert low <= bare_low <= bare_high <= high
            assert high - low < 0.5
    assert np.mean(hits) > 0.94
    assert spectrum.quantile(0.3) == pytest.approx(np.quantile(eigenvalues, 0.3), abs=0.1)


def test_a_quantile_beyond_all_nodes_has_no_finite_bound():
    # Ten steps see neither end of these; the smallest of 2000 eigenvalues is out of reach for any power law.
    misses, infinite = 0, 0
    for eigenvalues in (np.sort(semicircle(2000)), np.sort(power_law(2000, 1.0))):
        for seed in range(10):
            spectrum = spectrum_of(eigenvalues, 10, seed=seed)
            for rank in (1, 4, 20, 1000, 1980, 1996, 2000):
                low, high = spectrum.quantile_bounds(rank / 2000)
                misses += not low <= eigenvalues[rank - 1] <= high
                infinite += np.isinf(low) or np.isinf(high)
    assert misses <= 3
    assert infinite > 60
    assert np.isfinite(spectrum_of(semicircle(2000), 60).quantile_bounds(0.99)).all()


def test_rounding_does_not_decide_on_which_side_an_eigenvalue_lies():
    # The run is exhausted after five steps; its node for zero is zero to 1e-16 only.
    eigenvalues = np.repeat([0.0, 1.0, 2.0, 3.0, 5.0], 20)
    held = []
    for seed in range(40):
        spectrum = spectrum_of(eigenvalues, 20, seed=seed)
        lower, upper = spectrum.cdf_band(np.unique(eigenvalues), z=3)
        truth = share_below(eigenvalues, np.unique(eigenvalues))
        held.append(((lower <= truth + 1e-12) & (truth <= upper + 1e-12)).all())
        held.append(spectrum.zero_mass_bounds[0] <= 0.2 <= spectrum.zero_mass_bounds[1])
        held.append(spectrum.negative_mass_bounds[0] == 0)
    assert np.mean(held) > 0.95


def test_quantiles_run_from_end_to_end():
    spectrum = spectrum_of(semicircle(1000), 40)
    values = [spectrum.quantile(p) for p in np.linspace(0, 1, 101)]
    assert (np.diff(values) >= 0).all()
    assert values[0] == pytest.approx(-2, abs=0.02)
    assert values[-1] == pytest.approx(2, abs=0.02)
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            spectrum.quantile(bad)
        with pytest.raises(ValueError, match="between 0 and 1"):
            spectrum.quantile_bounds(bad)


def test_more_probes_narrow_the_band():
    x = np.array([0.5])
    one, four = (spectrum_of(semicircle(1000), 200, probes).cdf_band(x) for probes in (1, 4))
    assert (four[1] - four[0])[0] < 0.7 * (one[1] - one[0])[0]


def test_scalars_and_arrays_of_any_shape():
    spectrum = spectrum_of(semicircle(500), 20)
    assert spectrum.cdf(0.3).shape == ()
    assert spectrum.density(np.zeros((2, 3))).shape == (2, 3)
    lower, upper = spectrum.cdf_band(np.zeros((2, 3)))
    assert lower.shape == upper.shape == (2, 3)
    lower, upper = spectrum.density_band(0.1)
    assert lower.shape == upper.shape == ()
