"""Which laws a spectrum can be told from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from known_spectra import goe, hessian_like, spectrum_of
from measured_laws import measured

from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.ranking import FAMILIES, QUICK, Ranking, rank_laws
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner
from lightning_rmt.spectra.moments import Estimate

CASES = [
    Semicircle(2.0, 0.3),
    MarchenkoPastur(0.5),
    MarchenkoPastur(3.0),
    WishartPlusWigner(0.5, 0.25),
    ProductWishart((1.0, 0.5, 2.0)),
    ProductWigner(0.5),
]


def best(ranking):
    return type((ranking.simplest or ranking.fits[0]).law)


#: Parameters with which a family can be told from the others at 1500 eigenvalues, 100 steps and one probe, and how many
#: matrices of each; the families are those of `rank_laws`'s docstring.
TOLD = {
    Semicircle(2.0, 0.3): 3,
    Semicircle(1.0, -1.0): 3,
    MarchenkoPastur(0.2): 3,
    MarchenkoPastur(0.5): 3,
    MarchenkoPastur(3.0): 3,
    WishartPlusWigner(1.0, 0.5): 3,
    WishartPlusWigner(2.0, 0.25): 3,
    RefinedWishartPlusWigner(1.0, 2.0): 3,
    RefinedWishartPlusWigner(2.0, 1.0): 3,
    ProductWishart((1.0, 1.0, 1.0)): 3,
    ProductWishart((1.0, 0.5, 2.0)): 3,
    ProductWigner(1.0): 3,
    ProductWigner(2.0): 3,
    PercolatedWigner(0.3): 4,
    PercolatedWigner(0.6): 4,
    SparseWigner(2.0): 2,
    SparseWigner(4.0): 1,
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_true_family_is_picked_in_nine_of_ten_simulated_matrices():
    """Lanczos on simulated matrices. The sparse family takes seconds a fit and competes where it is the truth."""
    right = {law: [] for law in TOLD}
    for place, (law, count) in enumerate(TOLD.items()):
        families = FAMILIES if isinstance(law, SparseWigner) else [f for f in FAMILIES if f is not SparseWigner]
        for seed in range(20_000 + 100 * place, 20_000 + 100 * place + count):
            spectrum = spectrum_of(law.rvs(1500, np.random.default_rng(seed)), 100, seed=seed)
            right[law].append(best(rank_laws(spectrum, families)) is type(law))
    assert np.mean(np.concatenate(list(right.values()))) >= 0.9, right
    for family in {type(law) for law in TOLD}:
        assert np.mean(np.concatenate([r for law, r in right.items() if type(law) is family])) >= 2 / 3, right


@pytest.mark.parametrize(
    ("truth", "other"),
    [
        (WishartPlusWigner(0.25, 0.25), RefinedWishartPlusWigner),
        (WishartPlusWigner(0.15, 0.5), Semicircle),
        (PercolatedWigner(0.6), Semicircle),
        (ProductWigner(4.0), SparseWigner),
    ],
    ids=repr,
)
def test_pairs_that_cannot_be_told_apart(truth, other):
    """What the docstring of rank_laws names; if one of these fails, it has become better than its word."""
    spectrum = measured(truth, 4000, 100)
    assert type(truth).fit(spectrum).relative < 2
    assert other.fit(spectrum).word != "rejected"


def test_the_nearest_comes_first_and_the_refused_say_why():
    ranking = rank_laws(measured(MarchenkoPastur(0.5), 4000, 60), QUICK)
    distances = [fit.distance for fit in ranking.fits]
    assert distances == sorted(distances)
    names = [type(fit.law).__name__ for fit in ranking.fits] + [name for name, _ in ranking.refused]
    assert sorted(names) == sorted(family.__name__ for family in QUICK)
    assert dict(ranking.refused)["PercolatedWigner"].startswith("site percolation leaves a mass")


def test_the_simplest_has_the_fewest_parameters():
    spectrum = measured(MarchenkoPastur(0.5), 20000, 60)
    fit = MarchenkoPastur.fit(spectrum)
    assert fit.word == "indistinguishable"
    richer = replace(fit, law=WishartPlusWigner(0.5, 0.01), distance=fit.distance / 2)
    richer = replace(richer, parameters={"phi": fit.parameters["ratio"], **fit.parameters})
    assert Ranking((richer, fit), ()).simplest is fit
    assert Ranking((richer, replace(fit, exclusion_z=6.0)), ()).simplest is richer
    assert Ranking((replace(fit, exclusion_z=6.0),), ()).simplest is None
    assert Ranking((), ()).simplest is None


def test_zeros_that_a_law_explains_are_no_parameter():
    """A percolated Wigner matrix and a semicircle beside zeros are one law; the former has one number less."""
    spectrum = measured(PercolatedWigner(0.6), 4000, 60)
    percolated, semicircle = PercolatedWigner.fit(spectrum), Semicircle.fit(spectrum)
    assert semicircle.removed_zero_mass > 0
    nearer = replace(semicircle, distance=percolated.distance / 2)
    assert Ranking((nearer, percolated), ()).simplest is percolated
    without = replace(nearer, removed_zero_mass=0.0)
    assert Ranking((without, percolated), ()).simplest is without


def test_a_parameter_that_is_not_there_does_not_win():
    spectrum = measured(MarchenkoPastur(0.5), 4000, 60)
    fit = MarchenkoPastur.fit(spectrum)
    none, some = Estimate(0.001, 0.002), Estimate(0.3, 0.01)
    three = {"phi": some, "energy": none, "scale": some}
    rich = replace(fit, law=WishartPlusWigner(0.5, 0.001), parameters=three, distance=1.2 * fit.floor)
    weak = replace(fit, distance=1.5 * fit.floor)
    assert rich.vanishing == {"energy": "MarchenkoPastur"}
    assert Ranking((rich, weak), ()).simplest is weak
    assert "energy not told from 0: see MarchenkoPastur" in str(Ranking((rich, weak), ()))
    assert Ranking((replace(rich, parameters=three | {"energy": some}), weak), ()).simplest is not weak
    assert Ranking((rich, replace(fit, distance=2.5 * fit.floor)), ()).simplest is rich
    dims = {"dims[0]": Estimate(1, 0), "dims[1]": some, "dims[2]": Estimate(10, 8), "scale": some}
    product = replace(rich, law=ProductWishart((1.0, 2.0, 10.0)), parameters=dims)
    assert Ranking((product, weak), ()).simplest is weak


def test_an_excluded_law_is_never_indistinguishable():
    for law in CASES:
        for fit in rank_laws(measured(law, 4000, 60), QUICK).fits:
            assert not (fit.excluded and fit.word != "rejected")
            assert "accept" not in fit.verdict


def test_a_hessian_is_none_of_the_symmetric_laws():
    ranking = rank_laws(spectrum_of(hessian_like(10000, np.random.default_rng(0)), 100), QUICK)
    for fit in ranking.fits:
        assert fit.removed_outliers >= 10
        if isinstance(fit.law, Semicircle | ProductWigner | PercolatedWigner):
            assert fit.word == "rejected"


def test_the_table():
    levels = np.concatenate([goe(4000, np.random.default_rng(0)) + 1, [6.0, 9.0]])
    ranking = rank_laws(spectrum_of(levels, 60), QUICK)
    lines = str(ranking).splitlines()
    assert lines[0].split() == ["law", "distance", "/", "floor", "bounds", "z", "verdict"]
    assert len(lines) == len(QUICK) + 2
    assert any(line.startswith("Semicircle(radius ") and "+-" in line for line in lines)
    assert sum("no fit: " in line for line in lines) == len(ranking.refused)
    assert str(ranking).count("simplest such") == (ranking.simplest is not None)
    assert lines[-1] == "resolution 1/60, n = 4002, probes 1, outliers 2"
    assert "accept" not in str(ranking)


def test_a_spectrum_without_any_fit():
    ranking = rank_laws(measured(Semicircle(2.0), 500, 3))
    assert ranking.fits == ()
    assert len(ranking.refused) == len(QUICK)
    assert ranking.simplest is None
    assert "the bulk has 3 nodes off zero" in str(ranking)
