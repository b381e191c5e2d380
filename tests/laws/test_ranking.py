"""Which families a spectrum is told from, and which it isn't."""

from __future__ import annotations

import numpy as np
import pytest
from measured_cases import measured, product_wishart, quantiles, spectrum_of

from lightning_rmt.laws import MarchenkoPastur, Semicircle, WishartPlusWigner, rank_laws
from lightning_rmt.laws.cumulants import measured_moments
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.ranking import QUICK

#: Family, its eigenvalues at n, and the families that it is told from. To be extended by a line a family.
TOLD_APART = [
    (Semicircle, lambda n: quantiles(Semicircle(2.0, center=1.0), n), {MarchenkoPastur, ProductWishart}),
    (MarchenkoPastur, lambda n: quantiles(MarchenkoPastur(0.5), n), {Semicircle, ProductWishart}),
    (
        WishartPlusWigner,
        lambda n: quantiles(WishartPlusWigner(0.5, 0.125), n),
        {Semicircle, MarchenkoPastur, ProductWishart},
    ),
    (
        ProductWishart,
        lambda n: product_wishart(n // 2, np.random.default_rng(0)),
        {Semicircle, MarchenkoPastur, WishartPlusWigner},
    ),
]


@pytest.mark.parametrize(("family", "eigenvalues", "wrong"), TOLD_APART, ids=["semicircle", "mp", "sum", "product"])
def test_the_true_family_is_at_the_floor_and_wrong_ones_are_not(family, eigenvalues, wrong):
    """T16. A sum with hardly any of one part isn't told from the other part, which is no wrong family then."""
    ranking = rank_laws(spectrum_of(eigenvalues(2000), 100, probes=2))
    relative = {type(fit.law): fit.relative for fit in ranking.fits}
    refused = {name for name, _ in ranking.refused}
    assert relative[family] < 1.5
    for other in wrong:
        assert other.__name__ in refused or relative[other] > 2


@pytest.mark.parametrize(
    "law",
    [Semicircle(2.0), Semicircle(2.0, center=3.0), MarchenkoPastur(0.1), MarchenkoPastur(0.5), MarchenkoPastur(2.0)],
)
def test_the_true_family_is_the_simplest_that_fits(law):
    """At n = 2000 and 60 steps, in at least nine of ten simulated cases."""
    right = sum(type(r.simplest.law) is type(law) for r in _rankings(law) if r.simplest is not None)
    assert right >= 9


def test_the_richer_family_is_found_where_it_is_needed():
    eigenvalues = quantiles(WishartPlusWigner(0.5, 0.125), 2000)
    rankings = [rank_laws(spectrum_of(eigenvalues, 60, seed=seed)) for seed in range(10)]
    assert sum(isinstance(r.simplest.law, WishartPlusWigner) for r in rankings if r.simplest is not None) >= 9


def test_parsimony_decides_between_nested_families():
    """On Marchenko-Pastur spectra the sum with a Wigner matrix is often nearer, and never the answer."""
    rankings = _rankings(MarchenkoPastur(0.5))
    assert any(isinstance(ranking.fits[0].law, WishartPlusWigner) for ranking in rankings)
    assert not any(r.simplest is not None and isinstance(r.simplest.law, WishartPlusWigner) for r in rankings)


def test_what_cannot_be_told_apart_is_not():
    """A sum with hardly any covariance part is a semicircle, and with hardly any Wigner part a Marchenko-Pastur law."""
    for law, simple in ((WishartPlusWigner(0.01, 0.5), Semicircle), (WishartPlusWigner(0.5, 0.001), MarchenkoPastur)):
        ranking = rank_laws(spectrum_of(quantiles(law, 2000), 60))
        assert isinstance(ranking.simplest.law, simple)


def test_nothing_is_recommended_where_nothing_fits():
    ranking = rank_laws(measured_two_cut())
    assert ranking.fits
    assert ranking.simplest is None


def test_distances_are_ascending_and_refusals_have_reasons():
    ranking = rank_laws(measured_two_cut())
    assert [fit.distance for fit in ranking.fits] == sorted(fit.distance for fit in ranking.fits)
    assert "WishartPlusWigner" in {name for name, _ in ranking.refused}
    assert "third free cumulant" in str(ranking)
    flat = rank_laws(spectrum_of(np.ones(50), 20))
    assert flat.fits == ()
    assert len(flat.refused) == len(QUICK)


def test_the_table():
    lines = str(rank_laws(measured(MarchenkoPastur(0.5)))).splitlines()
    assert lines[0].split() == ["law", "distance", "/", "floor", "bounds", "z", "verdict"]
    assert sum("simplest such" in line for line in lines) == 1
    assert lines[-1].startswith("resolution 1/100, n = 2000")


def test_free_cumulants_of_a_sparse_matrix():
    """T15 beside tests/spectra/test_moments.py: each entry there with probability 4/n gives a kurtosis of 1/4."""
    n, rng = 2000, np.random.default_rng(0)
    upper = np.triu(rng.random((n, n)) < 4 / n, 1)
    spectrum = spectrum_of(np.linalg.eigvalsh((upper + upper.T) * rng.choice([-1.0, 1.0], (1, 1)) / 2), 60, probes=4)
    of = measured_moments(spectrum.bulk).moments().whole
    assert of.k4 / of.k2**2 == pytest.approx(0.25, abs=0.1)


def _rankings(law):
    return [rank_laws(spectrum_of(law.rvs(2000, np.random.default_rng(s)), 60, seed=s)) for s in range(10)]


def measured_two_cut():
    return spectrum_of(np.concatenate([quantiles(Semicircle(2.0, center=c), 1000) for c in (-4.0, 4.0)]), 60)
