"""The outlier rule on spectra that are known. The same on trained networks: test_outliers_of_networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_spectra import (
    NOISE,
    clump,
    goe,
    group_above_power_law,
    hessian_like,
    lanczos_of,
    marchenko_pastur,
    power_law,
    repelling_power_law,
    semicircle,
    spectrum_of,
    two_cut,
    wishart,
)

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.spectra.bulk_edge import CoefficientEdge
from lightning_rmt.spectra.levels import RitzLevels, exact_levels, ritz_levels
from lightning_rmt.spectra.outliers import find_outliers, outliers_of_eigenvalues
from lightning_rmt.spectra.spectrum import Spectrum


def spiked_wigner(n):
    return np.append(semicircle(n - 4), [t + 1 / t for t in (1.6, 2, 3, 5)])


def spiked_marchenko_pastur(n):
    return np.append(marchenko_pastur(n - 3), [3.6, 4.5, 7.0])


def spiked_one_cut(n):
    return np.append(marchenko_pastur(n - 5) + 0.3 * semicircle(n - 5), [5, 6, 7, 8, 9.0])


@pytest.mark.parametrize(("make", "count"), [(spiked_wigner, 4), (spiked_marchenko_pastur, 3), (spiked_one_cut, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spikes_beyond_an_edge_are_counted_exactly(make, count, seed):
    """A1 (and T17): spiked Wigner, Marchenko-Pastur and their sum."""
    eigenvalues = make(20000)
    side = spectrum_of(eigenvalues, 100, seed=seed).outliers.high
    assert (side.count, side.kind, side.confidence, side.at_least) == (count, "edge", 2, False)
    assert side.values == pytest.approx(np.sort(eigenvalues)[::-1][:count], rel=1e-6)
    assert "bulk edge" in side.verdict


@pytest.mark.parametrize("steps", [50, 100, 200])
@pytest.mark.parametrize("n", [2000, 20000])
def test_a_hessian_like_spectrum_has_ten_clear_outliers(n, steps):
    """A2 (and T17)."""
    eigenvalues = hessian_like(n, np.random.default_rng(n))
    for seed in range(3):
        side = spectrum_of(eigenvalues, steps, seed=seed).outliers.high
        assert (side.count, side.kind, side.confidence) == (10, "gap", 2)
        assert side.at_least == (steps < 100)
        assert side.values == pytest.approx(np.sort(eigenvalues)[::-1][:10], rel=1e-9)


@pytest.mark.parametrize("steps", [50, 100])
@pytest.mark.parametrize("law", ["semicircle", "goe", "marchenko-pastur", "wishart"])
def test_a_bare_bulk_has_none_at_either_end(law, steps):
    """A3 (and T17)."""
    rng = np.random.default_rng(0)
    eigenvalues = {
        "semicircle": semicircle(20000),
        "goe": goe(5000, rng),
        "marchenko-pastur": marchenko_pastur(20000),
        "wishart": wishart(5000, rng),
    }[law]
    for seed in range(2):
        found = spectrum_of(eigenvalues, steps, seed=seed).outliers
        for side in (found.high, found.low):
            assert (side.count, side.kind) == (0, "edge")
            assert side.values.size == len(side.levels) == 0


@pytest.mark.parametrize("steps", [30, 50, 100, 200])
@pytest.mark.parametrize("make", [lambda: power_law(2000, 1.0), lambda: power_law(2000, 0.5), lambda: two_cut(2000)])
def test_no_count_without_an_edge_or_a_gap(make, steps):
    """A4 (and T17): two power laws and two cuts."""
    for seed in range(3):
        side = spectrum_of(make(), steps, seed=seed).outliers.high
        assert (side.count, side.kind, side.confidence) == (None, "none", 0)
        assert side.verdict.startswith("no outlier count: ")


@pytest.mark.parametrize("steps", [50, 100, 200])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_a_group_above_a_power_law(exponent, steps):
    """A5."""
    eigenvalues = group_above_power_law(2000, exponent)
    for seed in range(4):
        spectrum = spectrum_of(eigenvalues, steps, seed=seed)
        side = spectrum.outliers.high
        assert (side.count, side.kind, side.confidence) == (9, "gap", 2)
        assert side.values == pytest.approx(5 * 1.3 ** np.arange(9)[::-1], rel=1e-9)
        i = np.arange(10, 20)
        assert side.gap_spacings == pytest.approx(9 * np.log(5) / (exponent * np.mean(i * np.log(1 + 1 / i))), rel=1e-2)
        assert spectrum.bulk_edges.high == pytest.approx(1.0, abs=1e-6)
        assert spectrum.bulk_edges.definition == "gap"


def test_groups_of_more_than_32_are_not_looked_for():
    # The quoted probabilities are for 32 places where a gap may be.
    assert outliers_of_eigenvalues(group_above_power_law(2000, 1.0, count=32, growth=1.1)).high.count == 32
    assert outliers_of_eigenvalues(group_above_power_law(2000, 1.0, count=33, growth=1.1)).high.count is None


def test_spikes_above_two_cuts():
    """A4."""
    for steps in (30, 50, 100, 200):
        for seed in range(3):
            assert spectrum_of(np.append(two_cut(2000), [9, 11, 14.0]), steps, seed=seed).outliers.high.count == 3


class SpikedMatrix:
    """A GOE matrix with edges at -2 and 2 and six spikes on its diagonal; half of it is stored."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, n, spikes):
        self.size, self.spikes = n, torch.zeros(n)
        self.spikes[: len(spikes)] = torch.tensor(spikes)
        # not the seed of the start vector, which would be the first row
        self.half = torch.randn(n, n, generator=torch.Generator().manual_seed(1)).div_((2 * n) ** 0.5)

    def matmat(self, V):
        return V @ self.half + V @ self.half.T + V * self.spikes


def test_subcritical_spikes_are_never_found():
    """T17: a spike theta moves a level to theta + 1/theta only for theta > 1; below that it stays in the bulk."""
    n, above = 8000, (5.0, 3.0, 2.0, 1.6)
    side = estimate_spectrum(SpikedMatrix(n, (*above, 0.5, 0.8)), steps=100).outliers.high
    assert (side.count, side.kind) == (4, "edge")
    assert side.values == pytest.approx([t + 1 / t for t in above], abs=4 / n**0.5)


class TestNulls:
    """A7: false counts on exact levels, no Lanczos: the rates that the verdicts quote."""

    def test_levels_that_repel(self):
        rng = np.random.default_rng(0)
        counted = 0
        for _ in range(300):
            levels = repelling_power_law(400, 1.0, rng)
            counted += outliers_of_eigenvalues(levels).high.count is not None
        assert counted <= 2

    def test_an_uncorrelated_heavy_tail(self):
        rng = np.random.default_rng(0)
        confidence = [outliers_of_eigenvalues(1 + rng.pareto(1.0, 400)).high.confidence for _ in range(500)]
        assert np.mean([c == 2 for c in confidence]) <= 0.07
        assert 0.10 <= np.mean([c > 0 for c in confidence]) <= 0.30

    def test_the_quoted_probability_bounds_the_rate(self):
        rng = np.random.default_rng(1)
        p = [outliers_of_eigenvalues(1 + rng.pareto(1.0, 400)).high.p_scale_free for _ in range(400)]
        for level in (0.1, 0.3):
            assert np.mean([value <= level for value in p]) <= level + 0.03

    def test_an_edge_on_exact_levels(self):
        rng = np.random.default_rng(0)
        for _ in range(30):
            assert outliers_of_eigenvalues(goe(400, rng)).high.count is None


def test_exact_levels_and_a_run_give_the_same_answer():
    rng = np.random.default_rng(0)
    for eigenvalues in (
        group_above_power_law(1000, 1.0),
        power_law(1000, 0.7),
        hessian_like(1000, rng),
        repelling_power_law(1000, 1.0, rng),
    ):
        exact = outliers_of_eigenvalues(eigenvalues)
        for steps in (100, 200):
            measured = spectrum_of(eigenvalues, steps).outliers
            assert measured.high.count == exact.high.count
            assert measured.high.gap_index == exact.high.gap_index
            assert measured.high.gap_spacings == pytest.approx(exact.high.gap_spacings, rel=0.05)


def test_negating_the_operator_swaps_the_sides():
    """A9 (and T22)."""
    for eigenvalues in (-group_above_power_law(1000, 1.0), spiked_wigner(5000)):
        run = lanczos_of(eigenvalues, 100)
        plus = Spectrum((run,), len(eigenvalues), 100, NOISE).outliers
        minus = Spectrum((Tridiagonal(-run.alpha, run.beta),), len(eigenvalues), 100, NOISE).outliers
        for mine, theirs in ((plus.high, minus.low), (plus.low, minus.high)):
            assert (mine.count, mine.kind, mine.confidence, mine.gap_index) == (
                theirs.count,
                theirs.kind,
                theirs.confidence,
                theirs.gap_index,
            )
            assert mine.values == pytest.approx(-theirs.values, rel=1e-10)
            if mine.gap_spacings is not None:
                assert mine.gap_ratio == pytest.approx(theirs.gap_ratio, rel=1e-8)
                assert mine.gap_spacings == pytest.approx(theirs.gap_spacings, rel=1e-8)
    assert plus.high.edge == pytest.approx(-minus.low.edge)
    assert f"{minus.low.edge:.3g}" in minus.low.verdict


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_rule_is_scale_free(scale):
    """A9 (and T23)."""
    run = lanczos_of(group_above_power_law(1000, 1.0), 100)
    base = find_outliers([ritz_levels(run, NOISE)], 1000).high
    scaled = find_outliers([ritz_levels(Tridiagonal(scale * run.alpha, scale * run.beta), NOISE)], 1000).high
    assert (scaled.count, scaled.gap_index) == (base.count, base.gap_index)
    assert scaled.gap_ratio == pytest.approx(base.gap_ratio, rel=1e-8)
    assert scaled.gap_spacings == pytest.approx(base.gap_spacings, rel=1e-8)


def test_nothing_is_counted_past_a_degenerate_level():
    """A10."""
    for steps in (50, 100, 200):
        for seed in range(3):
            side = spectrum_of(clump(), steps, seed=seed).outliers.high
            assert side.count in (14, None)
            if side.count is not None:
                assert np.unique(side.values).size == 14
                assert "degenerate" in side.verdict
                assert side.gap_spacings < 1e5
    # Exact levels have the copies themselves.
    exact = outliers_of_eigenvalues(clump()).high
    assert exact.count == 14
    assert "multiplicity >= 64" in exact.verdict


def test_an_operator_of_low_rank():
    """A11 (and T21)."""
    spectrum = spectrum_of(np.append(np.zeros(500), [5.0, 4.0, 3.0, 2.0, 1.0]), 50)
    assert spectrum.runs[0].steps == 6
    assert spectrum.weights.sum() == pytest.approx(1)
    side = spectrum.outliers.high
    assert side.count is None
    assert "only 5 eigenvalues above the noise floor" in side.verdict
    assert "only 0 eigenvalues above the noise floor" in spectrum.outliers.low.verdict
    for eigenvalues in (np.zeros(3), np.ones(1)):
        assert spectrum_of(eigenvalues, 3).outliers.high.count is None


def test_an_edge_with_a_spike_that_is_not_resolved_yet_is_a_lower_bound():
    found = spectrum_of(np.append(semicircle(19998), [2.07, 2.4]), 30).outliers.high
    assert found.count is None or (found.at_least and ">=" in found.verdict)
    later = spectrum_of(np.append(semicircle(19998), [2.07, 2.4]), 100).outliers.high
    assert later.count == 2
    assert not later.at_least


class TestSeveralProbes:
    GROUP = group_above_power_law(1000, 1.0)

    def side(self, *spectra, noise=NOISE):
        probes = [ritz_levels(lanczos_of(e, steps, seed), noise) for seed, (e, steps) in enumerate(spectra)]
        return find_outliers(probes, 1000).high

    def test_they_agree(self):
        side = self.side((self.GROUP, 100), (self.GROUP, 60))
        assert side.count == 9
        assert side.confidence == 2
        assert "probes" not in side.verdict

    def test_they_disagree(self):
        other = group_above_power_law(1000, 1.0, lowest=12.0, count=5)
        side = self.side((self.GROUP, 100), (other, 100))
        assert side.count is None
        assert side.values.size == 0
        assert "probes disagree (9, 5)" in side.verdict
        assert side.gap_index == 9  # the near misses stay visible

    def test_one_refuses(self):
        side = self.side((self.GROUP, 12), (self.GROUP, 100))
        assert side.count == 9
        assert side.confidence == 1
        assert "1 of 2 probes could not count" in side.verdict

    def test_all_refuse(self):
        assert self.side((power_law(1000, 1.0), 60), (power_law(1000, 1.0), 60)).count is None

    def test_runs_without_reorthogonalisation_are_not_asked(self):
        eigenvalues = hessian_like(20000, np.random.default_rng(0))
        runs = (lanczos_of(eigenvalues, 100, 0), lanczos_of(eigenvalues, 100, 1, reorthogonalise=False))
        ghosts = (runs[1].nodes > 1.9).sum()
        assert ghosts > 10
        spectrum = Spectrum(runs, 20000, 200, NOISE)
        assert spectrum.outliers.high.count == 10
        assert np.unique(np.round(spectrum.outliers.high.values, 6)).size == 10
        # The control: asked all the same, a run full of ghosts doesn't know.
        wrong = find_outliers([ritz_levels(Tridiagonal(runs[1].alpha, runs[1].beta), NOISE)], 20000).high
        assert wrong.count != 10


class TestWords:
    """What the user reads; every sentence is about the curvature batch, and none names a cause."""

    def test_every_verdict_says_what_it_is_about(self):
        for eigenvalues in (semicircle(2000), power_law(500, 1.0), TestSeveralProbes.GROUP, np.ones(3), clump()):
            found = spectrum_of(eigenvalues, 60).outliers
            for side in (found.high, found.low):
                assert "on this curvature batch" in side.verdict
                assert "class" not in side.verdict

    def test_a_clear_gap(self):
        side = spectrum_of(TestSeveralProbes.GROUP, 100).outliers.high
        assert side.verdict.startswith("9 outliers: gap x5.00 = 15.0 local spacings")
        assert "next eigenvalue 1 " in side.verdict

    def test_a_short_run_gives_a_lower_bound_unless_all_levels_that_could_matter_are_resolved(self):
        for steps in (32, 60, 80, 99):
            spectrum = spectrum_of(TestSeveralProbes.GROUP, steps)
            sure = spectrum._levels.resolved_high >= 43
            assert sure is (steps == 99)
            assert spectrum.outliers.high.verdict.startswith("9 outliers" if sure else ">= 9 outliers")

    def test_a_group_above_a_wider_group_is_a_lower_bound_while_the_wider_one_is_hidden(self):
        values = np.concatenate([[2000, 1800, 1500], np.linspace(100, 60, 17), power_law(1000, 0.7) / 125])
        for steps in (40, 60, 80):
            found = spectrum_of(values, steps).outliers.high
            assert found.count in (None, 20) or found.at_least

    def test_a_likely_gap_carries_its_probability(self):
        side = outliers_of_eigenvalues(group_above_power_law(1000, 1.0, lowest=1.9, growth=1.05)).high
        assert side.confidence == 1
        assert side.verdict.startswith("probably 9 outliers: gap x1.90 = 6.0 local spacings")
        assert f"p<={side.p_scale_free:.2g}" in side.verdict

    def test_no_gap_names_the_widest_and_what_it_lacks(self):
        verdict = outliers_of_eigenvalues(power_law(1000, 1.0)).high.verdict
        assert "thin out without a gap (widest x1." in verdict
        assert "need 5)" in verdict
        side = outliers_of_eigenvalues(group_above_power_law(1000, 0.35, lowest=1.3, growth=1.02)).high
        assert side.count is None
        assert "need 10, or 5 and a ratio of 1.5" in side.verdict

    def test_too_short_a_run(self):
        side = spectrum_of(power_law(2000, 1.0), 4).outliers.high
        assert "resolved at m=4; raise the number of steps" in side.verdict

    def test_one_is_singular(self):
        assert "1 outlier " in spectrum_of(np.append(semicircle(20000), 4.0), 100).outliers.high.verdict


def test_the_gap_is_described_also_where_an_edge_decides():
    side = spectrum_of(spiked_wigner(5000), 100).outliers.high
    assert side.kind == "edge"
    assert side.gap_index is not None
    assert side.gap_ratio > 1


def test_levels_come_with_their_certificates():
    side = spectrum_of(TestSeveralProbes.GROUP, 100).outliers.high
    assert all(level.certified for level in side.levels)
    assert [level.value for level in side.levels] == list(side.values)


def test_a_shift_changes_the_rule_which_is_why_weight_decay_must_be_subtracted():
    eigenvalues = TestSeveralProbes.GROUP
    assert outliers_of_eigenvalues(eigenvalues).high.count == 9
    assert outliers_of_eigenvalues(eigenvalues + 100.0).high.count is None
    assert exact_levels(eigenvalues + 100.0).floor > 0


def levels_by_hand(values, residuals, weights, resolved, size):
    """Ritz levels as a run of 100 steps might leave them, given from the largest value down."""
    values, residuals, weights = (np.asarray(row, dtype=float)[::-1] for row in (values, residuals, weights))
    return RitzLevels(
        values=values,
        residuals=residuals,
        weights=weights / size,
        copies=np.ones(values.size, dtype=int),
        resolved_high=resolved,
        resolved_low=0,
        scale=float(np.abs(values).max()),
        noise=NOISE,
        complete=False,
        steps=100,
    )


class TestWhatIsNotResolved:
    """Cases that real runs meet rarely, made by hand."""

    BULK = CoefficientEdge(low=-2.0, high=2.0, margin=0.04, variation=0.01, drift=0.0)

    def test_a_likely_gap_needs_resolved_followers(self):
        group = 1.9 * 1.05 ** np.arange(9)[::-1]
        tail = 10 / np.arange(10.0, 60)
        for residual, count in ((1e-6, 9), (1e-3, None)):
            residuals = np.concatenate([np.zeros(9), np.full(50, residual)])
            levels = levels_by_hand(np.append(group, tail), residuals, np.ones(59), 10, 5000)
            side = find_outliers([levels], 5000).high
            assert side.gap_index == 9
            assert side.count == count
            assert side.unresolved == (count is None)
        assert "levels behind it are not resolved: raise the number of steps" in side.verdict

    def test_a_clear_gap_does_not(self):
        levels = levels_by_hand(
            np.append(5 * 1.05 ** np.arange(9)[::-1], 10 / np.arange(10.0, 60)),
            np.concatenate([np.zeros(9), np.full(50, 1e-3)]),
            np.ones(59),
            10,
            5000,
        )
        assert find_outliers([levels], 5000).high.count == 9

    def test_beyond_an_edge_only_what_is_surely_beyond_counts(self):
        levels = levels_by_hand([3.0, 2.5, 2.1, 1.9], [0.01, 0.01, 0.05, 0.1], np.ones(4), 2, 5000)
        side = find_outliers([levels], 5000, [self.BULK]).high
        assert (side.count, side.at_least, side.unresolved, side.confidence) == (2, True, True, 1)
        assert side.verdict.startswith(">= 2 outliers beyond the bulk edge 2 ")

    def test_beyond_an_edge_nothing_is_counted_past_a_degenerate_level(self):
        levels = levels_by_hand([5.0, 4.0, 3.0, 1.9], np.zeros(4), [1.0, 20.0, 1.0, 1.0], 4, 5000)
        side = find_outliers([levels], 5000, [self.BULK]).high
        assert (side.count, side.at_least) == (1, True)
