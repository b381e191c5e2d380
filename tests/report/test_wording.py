from __future__ import annotations

import math

import pytest

from lightning_rmt.report.wording import number, operator_words, outlier_words, typeset, with_error


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (10.4, 3, "10.4"),
        (1234.5, 3, "1230"),
        (12345.0, 3, "1.23e4"),
        (0.0123, 3, "0.0123"),
        (0.00045, 2, "4.5e-4"),
        (2.1e-7, 2, "2.1e-7"),
        (-0.5, 3, "-0.500"),
        (0.0, 3, "0"),
        (9.996, 3, "10.0"),
        (-3e300, 1, "-3e300"),
        (math.nan, 3, "nan"),
        (-math.inf, 3, "-inf"),
    ],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (63.17, 1.62, "63.2 ± 1.6"),
        (-1.8, 3.71, "-1.8 ± 3.7"),
        (1.5, 2e-8, "1.500 ± 2e-8"),
        (1.04e7, 2.1e5, "(1.040 ± 0.021)e7"),
        (6.78e-5, 2.4e-7, "(6.780 ± 0.024)e-5"),
        (0.0, 0.0, "0 ± 0"),
        (2.0, 0.0, "2.000 ± 0"),
        (0.0, 25.0, "0 ± 25"),
        (5.0, math.inf, "5.000"),
        (5.0, math.nan, "5.000"),
    ],
)
def test_with_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("plain", "set_"),
    [
        ("trace (6.780 ± 0.024)e-5", r"trace (6.780 ± 0.024)$\times10^{-5}$"),
        ("1.04e7", r"1.04$\times10^{7}$"),
        ("1e-5", "$10^{-5}$"),
        ("-2.04, 2.00", "−2.04, 2.00"),
        ("gap ×5.7, three", "gap ×5.7, three"),
    ],
)
def test_typeset(plain, set_):
    assert typeset(plain) == set_


def test_outlier_words_follow_the_verdict(known, reading_of, trained):
    import numpy as np

    assert outlier_words(trained.spectrum).endswith("9 outliers above (gap ×5.7)")
    assert outlier_words(known("negative").spectrum).endswith("9 outliers below (gap ×5.7)")
    assert outlier_words(known("semicircle").spectrum) == "no outliers"
    assert outlier_words(known("initial").spectrum).startswith("no outlier count: widest gap ×1.")
    assert outlier_words(known("all zero").spectrum) == "no outlier count"
    spiked = np.concatenate([np.linspace(-1, 1, 1000), [4.0]])
    assert outlier_words(reading_of(spiked, 60).spectrum) == ">= 1 outlier above, none below"


def test_operator_words():
    assert operator_words("ggn") == "Gauss-Newton matrix"
    assert operator_words("something new") == "something new"
