"""Families fitted to measured spectra: parameters, their errors, distances, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import lanczos_of, spectrum_of
from measured_laws import measured, quantiles, simulated
from simulated_levels import bulk_of

import lightning_rmt.laws.fitting as fitting
from lightning_rmt.laws.bulk import FreeCumulantsOf, NoFitError
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.parameters import parameters_of
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.ranking import CLOSED_FORM
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

# Tolerances are 0.05 unless one start vector doesn't know the parameter so well: four of the relative standard errors that
# one probe has at n = 10,000. The phi and the energies rest on third cumulants; the ratio of ProductWigner and the
# degree on the fourth; unequal dimensions on the root of a difference of two; the center 0.3 is small beside the radius 2.
RECOVERED = [
    (Semicircle(2.0, 0.3), {"center": 0.19}),
    (MarchenkoPastur(0.5), {"ratio": 0.07}),
    (MarchenkoPastur(3.0), {"ratio": 0.12, "scale": 0.10}),
    (WishartPlusWigner(0.5, 0.25), {"phi": 0.24, "energy": 0.14, "scale": 0.06}),
    (RefinedWishartPlusWigner(0.5, 1.0), {"phi": 0.16, "energy": 0.36}),
    (ProductWishart((1.0, 1.0, 1.0)), {"dims[1]": 0.09, "dims[2]": 0.09, "scale": 0.08}),
    (ProductWishart((1.0, 0.5, 2.0)), {"dims[1]": 0.16, "dims[2]": 0.57, "scale": 0.09}),
    (ProductWigner(0.5), {"ratio": 0.16, "scale": 0.06}),
    (ProductWigner(2.0), {"ratio": 0.18, "scale": 0.07}),
    (PercolatedWigner(0.6), {}),
    pytest.param(SparseWigner(4.0), {"degree": 0.22}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("law", "looser"), RECOVERED, ids=lambda value: repr(value)[:40])
def test_parameters_are_recovered(law, looser):
    spectrum = measured(law)
    fit = type(law).fit(spectrum)
    for name, value in parameters_of(law).items():
        assert fit.parameters[name].mean == pytest.approx(value, rel=looser.get(name, 0.05)), name
        if name != "dims[0]":
            assert 0 < fit.parameters[name].stderr < looser.get(name, 0.05) * value
    assert fit.relative < 1.6
    assert fit.exclusion_z < 5
    assert fit.kurtosis_z is None or abs(fit.kurtosis_z) < 4


@pytest.mark.parametrize(
    "law",
    [Semicircle(2.0, 1.0), MarchenkoPastur(0.5), PercolatedWigner(0.6), MarchenkoPastur(3.0), ProductWigner(0.5)],
    ids=repr,
)
def test_parameters_are_recovered_within_five_percent_with_a_large_matrix(law):
    fit = type(law).fit(measured(law, n=200000, steps=60))
    for name, value in parameters_of(law).items():
        assert fit.parameters[name].mean == pytest.approx(value, rel=0.05), name


@pytest.mark.parametrize(
    "law",
    [Semicircle(2.0, 0.5), MarchenkoPastur(0.5), WishartPlusWigner(0.5, 0.25), PercolatedWigner(0.6)],
    ids=lambda law: type(law).__name__,
)
def test_errors_hold_over_start_vectors_of_one_matrix(law):
    """40 start vectors. The truth is the fit to all eigenvalues of the matrix, which is what a start vector samples.

    An odd number of steps: with an even one the atom in the middle of a symmetric law sits between two nodes, and the
    lighter isn't always counted to the zeros.
    """
    levels = quantiles(law, 2000)
    truth = parameters_of(type(law).from_bulk(bulk_of(levels)))
    fits = [type(law).fit(spectrum_of(levels, 41, seed=seed)) for seed in range(40)]
    for name, value in truth.items():
        z = np.array([(fit.parameters[name].mean - value) / fit.parameters[name].stderr for fit in fits])
        assert 0.7 < z.std() < 1.4, name
        assert abs(z.mean()) < 0.8, name
    relative = np.array([fit.relative for fit in fits])
    assert 0.75 < np.median(relative) < 1.3
    assert max(fit.exclusion_z for fit in fits) < 5


def test_the_error_of_a_distance_holds_where_a_law_is_off():
    levels = quantiles(MarchenkoPastur(0.5), 2000)
    fits = [Semicircle.fit(spectrum_of(levels, 40, seed=seed)) for seed in range(40)]
    spread = np.std([fit.distance for fit in fits], ddof=1)
    assert 0.7 < spread / np.median([fit.stderr for fit in fits]) < 1.4


def test_several_probes():
    law = MarchenkoPastur(0.5)
    one, four = MarchenkoPastur.fit(measured(law, 4000, 60)), MarchenkoPastur.fit(measured(law, 4000, 60, probes=4))
    assert four.probes == 4
    assert four.parameters["ratio"].stderr == pytest.approx(one.parameters["ratio"].stderr / 2, rel=0.2)
    assert four.floor < one.floor
    assert four.relative < 2
    assert four.stderr > 0


def test_t15_wishart_plus_wigner():
    fits = [WishartPlusWigner.fit(measured(WishartPlusWigner(0.5, 0.125), 20000, 60, 2, seed)) for seed in range(2)]
    for fit in fits:
        law = fit.law
        assert law.scale == pytest.approx(1, rel=0.05)
        assert law.phi == pytest.approx(0.5, rel=0.10)
        assert 2 * law.energy * law.scale**2 == pytest.approx(0.25, rel=0.15)


def test_t15_a_product_is_no_sum():
    with pytest.raises(NoFitError, match="nothing is left for a Wigner part"):
        WishartPlusWigner.fit(measured(ProductWishart((1.0, 1.0, 1.0))))


FOUR = {
    "semicircle": Semicircle(2.0, 1.0),
    "mp": MarchenkoPastur(0.5),
    "sum": WishartPlusWigner(0.5, 0.25),
    "product": ProductWishart((1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("truth", FOUR)
def test_t16_distances_tell_the_families(truth):
    """The sum comes as near as one likes to a semicircle or a Marchenko-Pastur law, and a product to the latter."""
    nested = {"semicircle": ("sum", "product"), "mp": ("sum", "product"), "sum": (), "product": ()}[truth]
    spectrum = measured(FOUR[truth])
    assert type(FOUR[truth]).fit(spectrum).relative < 1.5
    for name, law in FOUR.items():
        if name == truth or name in nested:
            continue
        try:
            fit = type(law).fit(spectrum)
        except NoFitError:
            continue
        assert fit.relative > 2, name
        assert fit.word == "rejected"


@pytest.mark.parametrize("family", [Semicircle, MarchenkoPastur, WishartPlusWigner], ids=lambda f: f.__name__)
@pytest.mark.parametrize("factor", [1e-6, 1e5])
def test_t23_scale(family, factor):
    levels = quantiles(WishartPlusWigner(0.5, 0.25), 1000)
    one, other = family.fit(spectrum_of(levels, 40)), family.fit(spectrum_of(levels * factor, 40))
    for name in ("distance", "stderr", "floor", "exclusion_z"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-4, abs=1e-6), name
    for name, value in one.parameters.items():
        unit = factor if name in ("radius", "center", "scale") else 1
        assert other.parameters[name].mean == pytest.approx(value.mean * unit, rel=1e-6)
        assert other.parameters[name].stderr == pytest.approx(value.stderr * unit, rel=1e-4)


def test_t23_shift_and_mirror():
    levels = quantiles(MarchenkoPastur(0.5), 1000)
    one = Semicircle.fit(spectrum_of(levels, 40))
    for other in (Semicircle.fit(spectrum_of(levels + 7, 40)), Semicircle.fit(spectrum_of(-levels, 40))):
        assert other.relative == pytest.approx(one.relative, rel=0.03)  # rounding decides which levels are exact
        assert other.parameters["radius"].mean == pytest.approx(one.parameters["radius"].mean, rel=1e-6)
    assert Semicircle.fit(spectrum_of(levels + 7, 40)).law.center == pytest.approx(one.law.center + 7)
    with pytest.raises(NoFitError, match="positive mean"):
        MarchenkoPastur.fit(spectrum_of(-levels, 40))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_too_few_nodes_are_refused(steps):
    spectrum = measured(Semicircle(2.0), 500, steps)
    for family in CLOSED_FORM:
        with pytest.raises(NoFitError, match=f"the bulk has {steps} nodes off zero"):
            family.fit(spectrum)


def test_a_spectrum_of_zeros_is_refused():
    with pytest.raises(NoFitError, match="0 nodes off zero|no width|1 nodes"):
        Semicircle.fit(spectrum_of(np.zeros(100), 20))


def test_without_a_reorthogonalised_run_there_is_a_fit():
    from lightning_rmt.spectra.spectrum import Spectrum

    levels = quantiles(MarchenkoPastur(0.5), 4000)
    run = lanczos_of(levels, 50, seed=1, reorthogonalise=False)
    assert not run.reorthogonalised
    fit = MarchenkoPastur.fit(Spectrum((run,), 4000, 50, 1e-15))
    assert fit.removed_outliers == 0
    assert fit.parameters["ratio"].mean == pytest.approx(0.5, rel=0.15)
    assert fit.relative < 2
    some = MarchenkoPastur.fit(spectrum_of(levels, 50, probes=3, reorthogonalise_all=False))
    assert some.probes == 3
    assert some.relative < 2


def test_a_fit_to_the_wrong_sign_of_k3_is_seen(monkeypatch):
    """Negative control of the matching."""
    spectrum = measured(WishartPlusWigner(0.5, 0.25), 4000, 60)
    right = fitting.MeasuredMoments.moments

    def wrong(self, values=None):
        found = right(self, values)
        whole, rest = (FreeCumulantsOf(of.k1, of.k2, -of.k3, of.k4) for of in (found.whole, found.continuous))
        return type(found)(whole, rest, found.zero_mass)

    assert WishartPlusWigner.fit(spectrum).relative < 1.6
    monkeypatch.setattr(fitting.MeasuredMoments, "moments", wrong)
    with pytest.raises(NoFitError, match="positive third free cumulant"):
        WishartPlusWigner.fit(spectrum)


def test_without_a_floor_the_true_law_is_rejected(monkeypatch):
    """Negative control of the floor."""
    spectrum = simulated(Semicircle(2.0), 2000, 50)
    assert Semicircle.fit(spectrum).word != "rejected"
    monkeypatch.setattr(fitting, "resolution_floor", lambda *_: 0.0)
    assert Semicircle.fit(spectrum).word == "rejected"
