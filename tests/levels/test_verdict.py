"""The words, from the numbers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_rmt.levels.verdict import Evidence, detectable_difference, insufficient, p_words, verdict

GOE = Evidence(
    spacing_ratio=0.531,
    stderr=0.012,
    z_goe=0.1,
    z_poisson=11.0,
    brody_z_poisson=12.0,
    p_value=0.4,
    levels=600,
    spectra=1,
    effective_ratios=598,
)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, "repel", "levels repel (consistent with GOE, excludes Poisson)"),
        ({"p_value": None}, "repel", "levels repel"),
        ({"p_value": 0.009}, "intermediate", "the ratio is consistent with GOE, the unfolded spacings aren't"),
        (
            {"p_value": 0.009, "outliers_counted": False},
            "intermediate",
            "aren't, which outliers that couldn't be counted",
        ),
        ({"brody": 0.93, "brody_goe": (0.957, 0.014)}, "repel", "levels repel (consistent with GOE, excludes Poisson)"),
        ({"brody": 0.86, "brody_goe": (0.957, 0.014)}, "repel", "Brody exponent, 0.86, isn't GOE's 0.96 +- 0.01"),
        ({"p_value": 0.011}, "repel", "levels repel"),
        ({"z_goe": 2.6}, "regular", "more regular than GOE"),
        ({"z_goe": -2.5}, "repel", "levels repel"),
        ({"z_goe": -5.0}, "intermediate", "repel less than GOE's, and more than Poisson's"),
        ({"z_goe": -9.0, "z_poisson": 1.0}, "intermediate", "more than Poisson's"),
        ({"z_goe": -9.0, "z_poisson": 1.0, "brody_z_poisson": 1.0}, "no_repulsion", "Poisson or >= 4 independent"),
        ({"z_goe": -9.0, "z_poisson": 1.0, "brody_z_poisson": None}, "no_repulsion", "no repulsion detected"),
        ({"z_goe": -15.0, "z_poisson": -4.0, "brody_z_poisson": -3.0}, "no_repulsion", "cluster even more"),
        ({"z_goe": -2.0, "z_poisson": 2.0, "brody_z_poisson": 2.0}, "insufficient", "excludes neither GOE nor Poisson"),
        (
            {"z_goe": -2.0, "z_poisson": 2.0, "brody_z_poisson": 2.0, "p_value": 1e-4},
            "intermediate",
            "the ratio can't tell",
        ),
    ],
)
def test_the_kind_and_its_reason(changes, kind, words):
    found, sentence = verdict(replace(GOE, **changes))
    assert found == kind
    assert words in sentence
    assert "is GOE" not in sentence


def test_the_sentence_has_its_numbers():
    assert verdict(replace(GOE, spectra=3, p_value=1e-4))[1] == (
        "intermediate (the ratio is consistent with GOE, the unfolded spacings aren't): spacing ratio 0.531 +- 0.012 "
        "(GOE .531, Poisson .386) from 600 levels of 3 spectra, z +0.1 from GOE and +11.0 from Poisson, "
        "Anderson-Darling p < 1e-4; at p<.01 so many levels show a ratio 0.053 from GOE's in 95 % of cases"
    )
    assert "Anderson-Darling" not in verdict(replace(GOE, p_value=None))[1]


def test_what_is_needed_is_named():
    assert insufficient(12, 12) == "insufficient levels (k<50): 12 kept, 50 needed"
    assert insufficient(1600, 40) == (
        "insufficient levels (k<50): 1600 kept over all spectra, worth 40 independent ones, 50 needed"
    )


def test_p_words():
    assert p_words(1e-4) == p_words(1e-4 + 4e-17) == "p < 1e-4"
    assert p_words(0.0123) == "p = 0.012"


def test_more_levels_show_less():
    assert detectable_difference(400) == pytest.approx(detectable_difference(100) / 2)
