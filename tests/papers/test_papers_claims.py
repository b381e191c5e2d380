"""The frame of the papers' scripts: a number out of its tolerance is a failure, and so is a negative claim that holds."""

from __future__ import annotations

import math

import pytest
from claims import Claims, number


@pytest.fixture
def claims(tmp_path):
    return Claims("paper", "A paper", "Somebody 2020", "What it is about.", ["--out", str(tmp_path)])


HOLDING = {
    "near, absolute": lambda c: c.near("(1)", "x", 1.04, 1.0, within=0.05),
    "near, relative": lambda c: c.near("(1)", "x", -104.0, -100.0, relative=0.05),
    "between": lambda c: c.between("(1)", "x", 2.0, 1.0, 3.0),
    "above": lambda c: c.between("(1)", "x", 2.0, low=1.0),
    "below": lambda c: c.between("(1)", "x", 2.0, high=3.0),
    "true": lambda c: c.true("(1)", "x", "yes", "yes", True),
    "negative": lambda c: c.negative("(1)", "x", "claimed", "refuted", True),
}
FAILING = {
    "near, absolute": lambda c: c.near("(1)", "x", 1.06, 1.0, within=0.05),
    "near, relative": lambda c: c.near("(1)", "x", -106.0, -100.0, relative=0.05),
    "near, no number": lambda c: c.near("(1)", "x", math.nan, 1.0, within=0.05),
    "between": lambda c: c.between("(1)", "x", 4.0, 1.0, 3.0),
    "above": lambda c: c.between("(1)", "x", 0.0, low=1.0),
    "below": lambda c: c.between("(1)", "x", 4.0, high=3.0),
    "between, no number": lambda c: c.between("(1)", "x", math.nan, high=3.0),
    "true": lambda c: c.true("(1)", "x", "yes", "no", False),
    "negative": lambda c: c.negative("(1)", "x", "claimed", "holds after all", False),
}


@pytest.mark.parametrize("name", HOLDING)
def test_what_holds(claims, name, tmp_path):
    assert HOLDING[name](claims)
    assert claims.finish() == 0
    page = (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert "FAILS" not in page
    assert ("does not reproduce" in page) == (name == "negative")


@pytest.mark.parametrize("name", FAILING)
def test_one_number_that_fails_is_the_exit_status(claims, name, tmp_path, capsys):
    claims.near("(1)", "another", 1.0, 1.0, within=0.1)
    assert not FAILING[name](claims)
    claims.near("(1)", "a third", 1.0, 1.0, within=0.1)
    assert claims.finish() == 1
    assert "out of tolerance: x" in capsys.readouterr().out
    assert "FAILS" in (tmp_path / "paper.md").read_text(encoding="utf-8")


def test_what_is_only_shown_fails_nothing(claims):
    claims.show("(1)", "x", "1", "2")
    assert claims.finish() == 0


def test_the_standard_error_is_no_tolerance(claims):
    assert not claims.near("(1)", "x", 1.2, 1.0, within=0.1, stderr=0.5)


@pytest.mark.parametrize("tolerances", [{}, {"within": 1.0, "relative": 0.1}])
def test_exactly_one_tolerance(claims, tolerances):
    with pytest.raises(ValueError, match="exactly one"):
        claims.near("(1)", "x", 1.0, 1.0, **tolerances)


def test_numbers_with_their_errors():
    assert number(0.52571, 0.0028) == "0.5257 ± 0.0028"
    assert number(12.3456) == "12.35"
    assert number(12.3456, math.nan) == "12.35"
