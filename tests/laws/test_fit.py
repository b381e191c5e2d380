"""What a fit says: its words, its sentence, its numbers in a file; the verdict at known answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from known_spectra import goe, hessian_like, marchenko_pastur, spectrum_of
from measured_laws import measured

from lightning_rmt.laws.fit import Fit
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.spectra.moments import Estimate

PLAIN = Fit(
    law=Semicircle(2.0),
    distance=0.01,
    stderr=0.002,
    floor=0.01,
    exclusion_z=1.0,
    kurtosis_z=0.5,
    removed_outliers=0,
    removed_outlier_mass=0.0,
    removed_zero_mass=0.0,
    parameters={"radius": Estimate(2.0, 0.01), "center": Estimate(0.0, math.nan)},
    steps=100,
    size=2000,
    probes=1,
)


@pytest.mark.parametrize(
    ("floors", "z", "word"),
    [
        (0.5, 0, "indistinguishable"),
        (1.29, 4.9, "indistinguishable"),
        (1.31, 0, "weak misfit"),
        (1.99, 0, "weak misfit"),
        (2.01, 0, "rejected"),
        (0.5, 5.1, "rejected"),
        (1.5, 5.1, "rejected"),
        (math.nan, 0, "rejected"),
        (math.inf, 0, "rejected"),
    ],
)
def test_words(floors, z, word):
    fit = replace(PLAIN, distance=0.01 * floors, exclusion_z=z)
    assert fit.word == word
    assert fit.excluded == (z > 5)
    assert fit.verdict.startswith(f"{word} at resolution 1/100, n = 2000")
    assert ("excluded by its distribution function" in fit.verdict) == fit.excluded
    assert ("not excluded at Lanczos resolution 1/100" in fit.verdict) == (not fit.excluded)
    assert "accept" not in fit.verdict


def test_without_a_floor_nothing_is_indistinguishable():
    fit = replace(PLAIN, floor=0.0)
    assert fit.relative == math.inf
    assert fit.word == "rejected"


def test_a_fourth_cumulant_that_is_off_is_said():
    assert "off by 6.0 standard errors" in replace(PLAIN, kurtosis_z=-6.0).verdict
    assert "cumulant" not in replace(PLAIN, kurtosis_z=4.0).verdict
    assert "cumulant" not in replace(PLAIN, kurtosis_z=None).verdict


def test_removed_outliers_are_stated():
    levels = np.concatenate([goe(4000, np.random.default_rng(0)), [3.0, 4.0, 6.0]])
    fit = Semicircle.fit(spectrum_of(levels, 100))
    assert fit.removed_outliers == 3
    assert fit.removed_outlier_mass == pytest.approx(3 / 4003)
    assert fit.removed_zero_mass == 0
    assert "without 3 outliers (0.00075 of all)" in fit.verdict
    assert fit.parameters["radius"].mean == pytest.approx(2, abs=0.06)
    assert not fit.excluded


def test_removed_zeros_are_stated_by_laws_without_an_atom():
    """60 % zeros and MP .5; a law with its own atom is compared with the zeros in place."""
    spectrum = spectrum_of(np.concatenate([np.zeros(6000), marchenko_pastur(4000)]), 100)
    plain, whole = Semicircle.fit(spectrum), ProductWishart.fit(measured(ProductWishart((1.0, 0.5, 2.0))))
    assert plain.removed_zero_mass == pytest.approx(0.6, abs=0.05)
    assert f"without the {plain.removed_zero_mass:.3g} at zero" in plain.verdict
    assert whole.law.atom > 0.4
    assert whole.removed_zero_mass == 0
    assert "zero" not in whole.verdict


def test_a_semicircle_is_rejected_for_a_hessian():
    """Negative control: zeros, a one-sided bulk, a few negative eigenvalues and ten outliers."""
    spectrum = spectrum_of(hessian_like(10000, np.random.default_rng(0)), 100)
    fit = Semicircle.fit(spectrum)
    assert fit.word == "rejected"
    assert fit.relative > 3
    assert fit.removed_outliers == spectrum.outliers.high.values.size + spectrum.outliers.low.values.size >= 10
    assert fit.removed_zero_mass == pytest.approx(0.6, abs=0.06)
    assert f"without {fit.removed_outliers} outliers" in fit.verdict
    assert "at zero" in fit.verdict


def test_a_file_gives_it_back():
    for fit in (PLAIN, MarchenkoPastur.fit(measured(MarchenkoPastur(0.5), n=2000, steps=50))):
        saved = json.loads(json.dumps(fit.to_dict(), allow_nan=False))
        back = Fit.from_dict(saved)
        assert back.to_dict() == fit.to_dict()
        assert back.law == fit.law
        assert back.verdict == fit.verdict
        assert type(back.removed_outliers) is int


def test_a_file_gives_back_a_law_with_a_tuple_and_what_is_not_finite():
    fit = replace(PLAIN, law=ProductWishart((1.0, 2.0, 0.5)), distance=math.nan, kurtosis_z=None)
    back = Fit.from_dict(json.loads(json.dumps(fit.to_dict(), allow_nan=False)))
    assert back.law == ProductWishart((1.0, 2.0, 0.5))
    assert math.isnan(back.distance)
    assert math.isnan(back.parameters["center"].stderr)
    assert back.kurtosis_z is None
    assert back.word == "rejected"


@pytest.mark.parametrize("name", ["law", "parameters", "distance", "steps"])
def test_a_damaged_file_is_refused(name):
    saved = PLAIN.to_dict()
    del saved[name]
    with pytest.raises(ValueError, match="damaged"):
        Fit.from_dict(saved)
    with pytest.raises(ValueError, match="damaged"):
        Fit.from_dict({**PLAIN.to_dict(), name: "rubbish"} if name != "steps" else {})


def test_a_family_without_a_fit_says_so():
    from lightning_rmt.laws.block_semicircle import BlockSemicircle

    with pytest.raises(ValueError, match="BlockSemicircle has no fit"):
        BlockSemicircle.fit(measured(Semicircle(2.0), n=500, steps=40))
    assert issubclass(BlockSemicircle, Law)
