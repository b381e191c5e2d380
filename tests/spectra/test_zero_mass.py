"""Mass at zero and below it."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import (
    NOISE,
    hessian_like,
    lanczos_of,
    marchenko_pastur,
    power_law,
    semicircle,
    spectrum_of,
)

from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.spectra.spectrum import Spectrum


@pytest.mark.parametrize(
    ("n", "steps", "tolerance"), [(2000, 100, 0.06), (2000, 200, 0.09), (20000, 60, 0.05), (20000, 100, 0.03)]
)
def test_an_atom_of_60_percent(n, steps, tolerance):
    """T25: .05 at n = 20000; at n = 2000 one probe's sampling error alone, sqrt(2 * .6 * .4 / n), is .0155.

    The largest errors of 12 start vectors at 100 steps are .052 and, at n = 20000, .015.
    """
    eigenvalues = hessian_like(n, np.random.default_rng(0))
    for seed in range(12 if steps == 100 else 4):
        spectrum = spectrum_of(eigenvalues, steps, seed=seed)
        assert spectrum.zero_mass == pytest.approx(0.6, abs=tolerance)
        assert 0 < spectrum.zero_width < 0.06
        assert spectrum.negative_mass == pytest.approx(0.1, abs=0.04)


def test_three_vector_probes_see_the_same_atom():
    eigenvalues = hessian_like(20000, np.random.default_rng(0))
    for steps in (60, 100, 200):
        spectrum = spectrum_of(eigenvalues, steps, probes=2, reorthogonalise_all=False)
        assert spectrum.zero_mass == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("steps", [40, 41])
def test_an_atom_amid_a_symmetric_bulk_has_the_error_that_it_claims(steps):
    # with an even number of steps it lies between two nodes, and each of them bears a part of it
    law = PercolatedWigner(0.6)
    off, z = [], []
    for seed in range(60):
        spectrum = spectrum_of(law.rvs(1000, np.random.default_rng(seed)), steps, seed=seed)
        off.append(spectrum.bulk.zero_mass - law.atom)
        fit = PercolatedWigner.fit(spectrum)
        z.append([(fit.parameters[k].mean - getattr(law, k)) / fit.parameters[k].stderr for k in ("p", "scale")])
    assert np.sqrt(np.mean(np.square(off))) == pytest.approx((2 * 0.6 * 0.4 / 1000) ** 0.5, rel=0.25)
    assert abs(np.mean(off)) < 0.007
    assert ((np.std(z, axis=0) > 0.7) & (np.std(z, axis=0) < 1.4)).all()
    assert (np.abs(np.mean(z, axis=0)) < 0.5).all()


def test_an_atom_does_not_depend_on_the_parity_of_the_steps():
    eigenvalues = PercolatedWigner(0.6).rvs(1000, np.random.default_rng(0))
    masses = [spectrum_of(eigenvalues, steps).bulk.zero_mass for steps in (40, 41, 42, 43)]
    assert np.ptp(masses) < 0.002


@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_copies_beside_the_atom_do_not_narrow_it(reorthogonalise):
    # The atom converges at step 30; later, rounding puts nodes without weight as near as 1e-9 to it.
    eigenvalues = np.concatenate([np.zeros(12000), np.random.default_rng(0).uniform(0.2, 1.2, 8000)])
    for steps in (60, 100, 150, 200):
        run = lanczos_of(eigenvalues, steps, reorthogonalise=reorthogonalise)
        assert (np.abs(run.nodes) < 1e-6).sum() > 1
        spectrum = Spectrum((run,), 20000, steps, NOISE)
        assert spectrum.zero_width == pytest.approx(0.1, abs=0.02)
        assert spectrum.zero_mass == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    "eigenvalues",
    [semicircle(2000), marchenko_pastur(2000), power_law(2000, 0.5), np.random.default_rng(0).standard_t(3, 2000)],
    ids=["semicircle", "marchenko-pastur", "power law", "t3"],
)
def test_no_atom_where_there_is_none(eigenvalues):
    for steps in (30, 51, 100):
        spectrum = spectrum_of(eigenvalues, steps, seed=steps)
        assert spectrum.zero_mass == spectrum.zero_width == 0
        assert spectrum.zero_mass_bounds[0] == 0
        assert spectrum.negative_mass == pytest.approx(np.mean(eigenvalues < 0), abs=0.06)


def cored(rng):
    """A core around zero with a heavy tail on both sides, as the Hessian of a network: no exact zeros."""
    core = rng.standard_normal(1400) * 10 ** rng.uniform(-8, -3, 1400)
    return np.concatenate([core, 0.3 * np.arange(1.0, 700) ** -0.7, -0.1 * np.arange(1.0, 300) ** -0.7])


@pytest.mark.parametrize("make", [cored, lambda rng: hessian_like(2000, rng)], ids=["core", "atom"])
def test_what_is_said_of_the_width_is_true_of_the_width(make):
    # Whatever the width comes out as, the mass is that within it, and the bounds hold.
    held, error = [], []
    for seed in range(20):
        eigenvalues = make(np.random.default_rng(seed))
        spectrum = spectrum_of(eigenvalues, 80, seed=seed)
        within = np.mean(np.abs(eigenvalues) <= spectrum.zero_width)
        below = np.mean(eigenvalues < -spectrum.zero_width)
        held += [
            spectrum.zero_mass_bounds[0] <= within <= spectrum.zero_mass_bounds[1],
            spectrum.negative_mass_bounds[0] <= below <= spectrum.negative_mass_bounds[1],
        ]
        error += [spectrum.zero_mass - within, spectrum.negative_mass - below]
        assert spectrum.zero_mass_bounds[0] <= spectrum.zero_mass <= spectrum.zero_mass_bounds[1]
        assert spectrum.negative_mass_bounds[0] <= spectrum.negative_mass <= spectrum.negative_mass_bounds[1]
    assert np.mean(held) > 0.9
    assert np.std(error) < 0.08
    assert abs(np.mean(error)) < 0.03


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda rng: Semicircle(2.0).rvs(1000, rng) + 1, 0.6),  # all of it sampling
        (lambda rng: PercolatedWigner(0.5).rvs(1000, rng), 0.6),
        (cored, 0.2),  # mostly resolution, of which the standard deviation is an upper end
        (lambda rng: hessian_like(2000, rng), 0.5),
    ],
    ids=["semicircle", "percolated", "core", "atom"],
)
def test_the_error_of_the_negative_mass_is_what_it_scatters_by(make, least):
    z = []
    for seed in range(24):
        eigenvalues = make(np.random.default_rng(seed))
        spectrum = spectrum_of(eigenvalues, 100, seed=seed)
        below = np.mean(eigenvalues < -spectrum.zero_width)
        z.append((spectrum.negative_mass - below) / spectrum.negative_mass_stderr)
    assert least < np.sqrt(np.mean(np.square(z))) < 1.25
    assert np.abs(z).max() < 3.5


def test_more_probes_make_the_error_of_the_negative_mass_smaller():
    eigenvalues = Semicircle(2.0).rvs(1000, np.random.default_rng(0))
    one, four = (
        Spectrum(tuple(lanczos_of(eigenvalues, 100, seed) for seed in range(probes)), 1000, 100, NOISE)
        for probes in (1, 4)
    )
    assert one.negative_mass_stderr == pytest.approx(np.sqrt(2 * 0.25 / 1002), rel=0.3)
    assert four.negative_mass_stderr == pytest.approx(one.negative_mass_stderr / 2, rel=0.2)


def test_where_all_eigenvalues_are_known_the_negative_mass_has_no_error():
    spectrum = spectrum_of(np.array([-2.0, -1.0, 1.0, 3.0, 4.0]), 5)
    assert (spectrum.negative_mass, spectrum.negative_mass_stderr) == (0.4, 0.0)


def test_positive_operators_have_no_negative_mass():
    spectrum = spectrum_of(marchenko_pastur(1000), 60)
    assert spectrum.negative_mass == 0
    assert spectrum.negative_mass_stderr < 1e-6
    assert spectrum.negative_mass_bounds[1] < 1e-6


def test_the_zero_operator_is_all_zero():
    spectrum = spectrum_of(np.zeros(30), 10)
    assert spectrum.zero_mass == 1
    assert spectrum.negative_mass == 0
