"""What a fit says, and that it can be saved."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_rmt.laws import Fit, MarchenkoPastur, Semicircle
from lightning_rmt.spectra.moments import Estimate

FIT = Fit(
    law=MarchenkoPastur(0.5, 2.0),
    distance=0.011,
    stderr=0.002,
    floor=0.01,
    exclusion_z=1.2,
    kurtosis_z=0.4,
    removed_outliers=0,
    removed_outlier_mass=0.0,
    removed_zero_mass=0.0,
    parameters={"ratio": Estimate(0.5, 0.01), "scale": Estimate(2.0, 0.1)},
    steps=100,
    size=12345,
    probes=1,
)


@pytest.mark.parametrize(
    ("distance", "z", "word"),
    [
        (0.011, 1.2, "indistinguishable"),
        (0.0129, 4.9, "indistinguishable"),
        (0.0131, 1.2, "weak misfit"),
        (0.0199, 1.2, "weak misfit"),
        (0.0201, 1.2, "rejected"),
        (0.005, 5.1, "rejected"),
        (0.015, 5.1, "rejected"),
        (np.nan, 1.2, "rejected"),
    ],
)
def test_the_words(distance, z, word):
    fit = replace(FIT, distance=distance, exclusion_z=z)
    assert fit.word == word
    assert fit.verdict.startswith(f"{word} at resolution 1/100, n = 12345")
    assert ("not excluded" in fit.verdict) == (z <= 5)
    assert "accepted" not in fit.verdict


def test_what_was_taken_out_is_said():
    said = replace(FIT, removed_outliers=3, removed_outlier_mass=0.001, removed_zero_mass=0.25, kurtosis_z=-7.0).verdict
    assert "without 3 outliers (0.001 of all)" in said
    assert "without the 0.25 at zero" in said
    assert "fourth free cumulant is off by 7.0" in said


def test_saving():
    assert Fit.from_dict(json.loads(json.dumps(FIT.to_dict()))) == FIT
    unknown = replace(FIT, stderr=np.nan, kurtosis_z=None, parameters={"ratio": Estimate(0.5, np.nan)})
    back = Fit.from_dict(json.loads(json.dumps(unknown.to_dict(), allow_nan=False)))
    assert np.isnan(back.stderr)
    assert np.isnan(back.parameters["ratio"].stderr)
    assert back.kurtosis_z is None
    assert back.verdict == unknown.verdict
    # A later version may say more.
    assert Fit.from_dict(FIT.to_dict() | {"colour": "red"}) == FIT


@pytest.mark.parametrize(
    "damage",
    [{"law": {"name": "Gauss"}}, {"law": {"name": "Semicircle", "color": 1}}, {"parameters": None}, {"law": 3}],
)
def test_a_damaged_fit_is_refused(damage):
    with pytest.raises(ValueError, match=r"damaged|there is no law"):
        Fit.from_dict(FIT.to_dict() | damage)
    with pytest.raises(ValueError, match="damaged"):
        Fit.from_dict({key: value for key, value in FIT.to_dict().items() if key != "floor"})


def test_a_law_keeps_its_kind():
    saved = replace(FIT, law=Semicircle(2.0, 1.0)).to_dict()
    assert Fit.from_dict(saved).law == Semicircle(2.0, 1.0)
