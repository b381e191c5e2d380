"""Which Ritz values are eigenvalues: against spectra that are known."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import (
    NOISE,
    goe,
    hessian_like,
    lanczos_of,
    marchenko_pastur,
    power_law,
    repelling_power_law,
    semicircle,
    spectrum_of,
)

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.levels import exact_levels, noise_floor, ritz_levels
from lightning_rmt.spectra.spectrum import Spectrum


def heavy_tails(rng):
    return [repelling_power_law(2000, exponent, rng) for exponent in (0.5, 1.0, 1.5)] + [goe(2000, rng)]


@pytest.mark.parametrize("steps", [50, 100])
def test_certified_levels_are_the_true_levels_in_order(steps):
    # None skipped, none invented, none off: 0 of 68744 were, when this was tried at length.
    rng = np.random.default_rng(0)
    checked = 0
    for index, eigenvalues in enumerate(heavy_tails(rng)):
        truth = np.sort(eigenvalues)
        for probe in range(8):
            spectrum = spectrum_of(eigenvalues, steps, seed=100 * index + probe)
            top = np.array([level.value for level in spectrum.top])
            bottom = np.array([level.value for level in spectrum.bottom])
            assert top == pytest.approx(truth[::-1][: top.size], rel=1e-8)
            assert bottom == pytest.approx(truth[: bottom.size], rel=1e-8)
            checked += top.size + bottom.size
    assert checked > 300


def test_resolved_levels_are_rarely_off_and_the_certificate_is_what_makes_them_sure():
    # A resolved prefix may end in a level that is one further down (0.05 % of levels): hence the stricter certificate.
    rng = np.random.default_rng(1)
    resolved = off = loose = 0
    for index, eigenvalues in enumerate(heavy_tails(rng)[:3]):
        truth = np.sort(eigenvalues)[::-1]
        for probe in range(20):
            levels = ritz_levels(lanczos_of(eigenvalues, 60, 100 * index + probe), NOISE)
            values = levels.values[::-1][: levels.resolved_high]
            error = np.abs(values / truth[: values.size] - 1)
            resolved, off, loose = resolved + values.size, off + (error > 1e-2).sum(), loose + (error > 1e-8).sum()
    assert off <= 0.005 * resolved
    assert loose > 0.02 * resolved  # resolved alone doesn't mean eight digits


def test_an_eigenvalue_lies_within_the_residual_of_every_ritz_value():
    eigenvalues = np.sort(power_law(3000, 0.7))
    levels = ritz_levels(lanczos_of(eigenvalues, 40), NOISE)
    distance = np.abs(levels.values[:, None] - eigenvalues[None, :]).min(axis=1)
    assert (distance <= levels.residuals + levels.rounding).all()
    assert levels.residuals.max() > 1e-3  # most are far from converged


@pytest.mark.parametrize("gap", [1e-5, 1e-6, 1e-7])
def test_a_pair_not_yet_told_apart_is_not_certified_to_digits_that_it_lacks(gap):
    # One Ritz value lies between the two for a while, with a residual of about their distance and nothing near it.
    between = 0
    for steps in range(14, 30, 2):
        for seed in range(6):
            spectrum = spectrum_of(np.append(semicircle(2000), [3.0, 3.0 * (1 - gap)]), steps, seed=seed)
            found = spectrum.lambda_max
            error = min(abs(found.value / truth - 1) for truth in (3.0, 3.0 * (1 - gap)))
            between += error > 1e-8
            assert error <= found.residual / 3
            assert error <= 1e-8 or not found.certified
    assert between > 20


def test_no_level_is_certified_at_the_noise_floor():
    eigenvalues = np.array([1.0, 0.5, 1e-3, 1e-7, 1e-8, -1e-9])
    spectrum = spectrum_of(eigenvalues, 6)
    assert [level.value for level in spectrum.top] == pytest.approx([1.0, 0.5, 1e-3], rel=1e-8)
    assert spectrum.bottom == ()
    assert spectrum.lambda_min.certified is False
    assert spectrum.lambda_min.value == pytest.approx(-1e-9, abs=spectrum.lambda_min.residual)


def test_a_residual_never_claims_less_error_than_the_product_has():
    run = lanczos_of([3.0, 2.0, 1.0, 0.5], 4)
    for noise in (4.4e-15, 2.4e-6):
        levels = ritz_levels(run, noise)
        assert all(levels.level(index).residual >= 3 * noise for index in range(4))
    assert noise_floor(2.4e-6) == pytest.approx(1e-5, rel=0.1)
    assert noise_floor(4.4e-15) == 1e-10


def test_a_noisy_product_certifies_only_to_its_noise():
    # Iterates to 1e-9 are meaningless when products carry 1e-3: the same run is judged by its noise.
    run = lanczos_of(np.append(goe(2000, np.random.default_rng(0)), [3.0, 4.0]), 18)
    sharp, blunt = ritz_levels(run, 1e-12), ritz_levels(run, 1e-3)
    assert not sharp.certified()[-2]
    assert blunt.certified()[-2]


def test_an_exhausted_run_holds_eigenvalues_only():
    eigenvalues = np.concatenate([[5.0, 4.0, 3.0, 2.0, 1.0], np.zeros(200)])
    run = lanczos_of(eigenvalues, 50)
    assert run.steps == 6
    levels = ritz_levels(run, NOISE)
    assert levels.complete
    assert levels.resolved_high == levels.resolved_low == 6
    spectrum = spectrum_of(eigenvalues, 50)
    assert [level.value for level in spectrum.top] == pytest.approx([5, 4, 3, 2, 1], rel=1e-12)
    assert spectrum.lambda_min.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [44, 52, 60, 100, 150])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_copies_of_a_degenerate_level_are_one_level(steps, order):
    # Rounding brings copies in late; each alone passes for a level with a residual of zero. At which step depends on the
    # order of summation, hence on the machine, and here on the order of the eigenvalues. On its way up a copy passes the
    # levels 3 and 4 as a Ritz value that is no eigenvalue: its residual says so, and it costs certificates.
    eigenvalues = np.concatenate([np.full(40, 5.0), [4.0, 3.0], 10 ** np.random.default_rng(0).uniform(-3, -1, 2000)])
    eigenvalues = np.random.default_rng(order).permutation(eigenvalues)
    run = lanczos_of(eigenvalues, steps)
    assert (np.abs(run.nodes - 5) < 1e-9).sum() > 1
    levels = ritz_levels(run, NOISE)
    distance = np.abs(levels.values[:, None] - [3.0, 4.0, 5.0])
    assert (distance < 1e-9).sum(axis=0).tolist() == [1, 1, 1]
    assert levels.values[-1] == pytest.approx(5.0, rel=1e-9)
    assert levels.copies[-1] > 1
    assert levels.weights.sum() == pytest.approx(1)
    between = (levels.values > 0.1) & (distance.min(axis=1) >= 1e-9)
    nearest = np.abs(levels.values[:, None] - eigenvalues).min(axis=1)
    assert (nearest <= levels.residuals + levels.rounding).all()
    assert not levels.certified()[between].any()
    top = [level.value for level in spectrum_of(eigenvalues, steps).top]
    assert len(top) >= 1
    assert top == pytest.approx(np.unique(eigenvalues)[::-1][: len(top)], rel=1e-8)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_two_real_levels_side_by_side_are_not_taken_for_copies(distance):
    eigenvalues = np.concatenate([goe(1000, np.random.default_rng(0)), [5.0, 5.0 + distance]])
    # Step by step, while the second comes apart from the first.
    for steps in range(8, 40):
        levels = ritz_levels(lanczos_of(eigenvalues, steps), NOISE)
        assert levels.copies.max() == 1
    assert levels.values[-2:] == pytest.approx([5.0, 5.0 + distance], abs=1e-9)


def test_levels_that_rounding_blurs_are_not_resolved():
    run = lanczos_of(np.append(goe(1000, np.random.default_rng(0)), [5.0, 5.01]), 60)
    assert ritz_levels(run, 1e-5).resolved_high >= 2
    assert ritz_levels(run, 3e-4).resolved_high == 0


def test_only_levels_that_can_be_counted_from_an_end_are_certified():
    # A degenerate level between two bulks converges early, with an unknown number of levels outside of it.
    eigenvalues = np.concatenate([semicircle(700) - 4, np.full(600, 0.5), semicircle(700) + 4])
    levels = ritz_levels(lanczos_of(eigenvalues, 100), NOISE)
    inside = np.argmin(np.abs(levels.values - 0.5))
    assert levels.residuals[inside] < 1e-9
    assert levels.resolved_high < 5
    assert not levels.certified()[inside]


def test_without_reorthogonalisation_there_are_no_levels_and_the_extremes_are_not_certified():
    eigenvalues = hessian_like(2000, np.random.default_rng(0))
    run = lanczos_of(eigenvalues, 100, reorthogonalise=False)
    assert (np.abs(run.nodes - eigenvalues.max()) < 1e-6).sum() > 1  # the ghosts are there
    spectrum = type(spectrum_of(eigenvalues, 10))((run,), 2000, 100, NOISE)
    assert spectrum.top == spectrum.bottom == ()
    assert spectrum.lambda_max.value == pytest.approx(eigenvalues.max(), rel=1e-9)
    assert not spectrum.lambda_max.certified
    assert spectrum.outliers.high.count is None
    assert "not" in spectrum.outliers.high.verdict or "no run" in spectrum.outliers.high.verdict


def test_levels_of_the_negated_operator_are_mirrored():
    run = lanczos_of(hessian_like(1000, np.random.default_rng(0)), 60)
    levels = ritz_levels(run, NOISE)
    negated = ritz_levels(Tridiagonal(-run.alpha, run.beta), NOISE)
    assert levels.mirrored().values == pytest.approx(negated.values, abs=1e-12)
    assert levels.mirrored().resolved_high == negated.resolved_high == levels.resolved_low
    assert levels.mirrored().mirrored().values == pytest.approx(levels.values)


def test_exact_levels_are_all_resolved():
    eigenvalues = marchenko_pastur(500)
    levels = exact_levels(eigenvalues[::-1])
    assert levels.values == pytest.approx(eigenvalues)
    assert levels.resolved_high == 500
    assert levels.complete
    with pytest.raises(ValueError, match="finite"):
        exact_levels([1.0, np.nan])


@pytest.mark.parametrize("noise", [1e-3, 3e-3, 2e-2])
def test_imprecise_products_do_not_make_one_level_of_a_whole_bulk(noise):
    """Neighbours within the products' error form a chain through it, which is no degenerate eigenvalue."""
    eigenvalues = np.concatenate([[10.0, 9.0], np.linspace(-0.3, 0.3, 2000)])
    run = lanczos_of(eigenvalues, 80)
    assert (np.diff(run.nodes) < 2 * noise * 10).sum() > 5
    spectrum = Spectrum((run,), eigenvalues.size, run.steps, noise)
    assert spectrum.lambda_min.value == run.nodes[0]
    assert abs(spectrum.lambda_min.value + 0.3) < spectrum.lambda_min.residual
    levels = ritz_levels(run, noise)
    assert levels.values[:-2].min() == pytest.approx(-0.3, abs=4 * noise * 10)
    assert (levels.copies < 40).all() or noise == 2e-2  # there the products' error is as wide as the bulk
