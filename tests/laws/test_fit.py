"""What a fit says, and that it can be saved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lightning_rmt.laws import Fit, MarchenkoPastur
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
