"""The search for the damping whose ratio is one, on ratios that are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rmt.optim.adjustment import FIRST_PRODUCTS, RootSearch, change, smoothed, trust_change


def found(ratio, damping):
    """Where the search ends, and how many ratios it took."""
    search = RootSearch((0.7, 1.3))
    for count in range(1, 200):
        following = search.following(damping, ratio(damping))
        if following is None:
            return damping, count
        damping = following
    raise AssertionError("no end")


@given(st.floats(-6, 3), st.floats(-3, 2), st.floats(0.25, 3))
def test_any_power_law(start, root, power):
    damping, count = found(lambda d: (10.0**root / d) ** power, 10.0**start)
    assert 0.65 <= (10.0**root / damping) ** power <= 1.35
    assert count <= FIRST_PRODUCTS


@given(st.floats(-6, -2))
def test_from_below_the_root_is_sharp(start):
    damping, _ = found(lambda d: 2 / (1 + d) ** 2, 10.0**start)
    assert damping == pytest.approx(math.sqrt(2) - 1, rel=0.05)


def test_of_several_it_is_the_largest():
    def ratio(d):  # 1 at .01 and at 1, flat between
        return 0.01 / d if d < 0.01 else (1.05 if d < 1 else 1 / d)

    assert found(ratio, 1e-5)[0] == pytest.approx(1, rel=0.05)


def test_a_ratio_that_changes_its_sign_on_the_way():
    # a step at the smallest dampings along which curvature of either sign nearly cancels
    def ratio(d):
        return {-6: -13.6, -5: -0.4}.get(round(math.log10(d)), 0.1 / d)

    assert found(ratio, 1e-6)[0] == pytest.approx(0.1, rel=0.05)


def test_negative_curvature_counts_by_its_size():
    assert found(lambda d: -1e-3 / d, 1e-6)[0] == pytest.approx(1e-3, rel=0.02)


def test_negative_curvature_that_is_always_small_says_nothing():
    search = RootSearch((0.7, 1.3))
    assert search.following(1.0, -0.5) == 10.0
    assert search.following(10.0, -0.05) is None


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_was_far_too_small(wild):
    assert found(lambda d: wild if d < 0.05 else 1 / d, 1e-6)[0] == pytest.approx(1, rel=0.05)
    assert change(wild, 2.0) == 2.0


def test_changes():
    band = (0.7, 1.3)
    ratios = (0.8, 1.29, 1.5, 9.0, 0.6, 0.1, -0.5, 0.0, -1.0, -1.5, -9.0)
    expected = (1, 1, 1.5, 2, 0.6, 0.5, 1, 1, 1, 1.5, 2)
    assert [change(ratio, 2.0, band) for ratio in ratios] == list(expected)
    assert smoothed(1.0, 4.0, 0.5) == 2.0
    assert smoothed(1.0, 4.0, 0.0) == 4.0


def test_trust():
    assert [trust_change(r, 2.0) for r in (-math.inf, math.nan, 0.1, 0.5, 0.9, 3.0)] == [2, 2, 2, 1, 0.5, 0.5]
