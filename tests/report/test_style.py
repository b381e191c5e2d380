from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt.report.style import EigenvalueAxis, new_figure

AXES = [
    EigenvalueAxis.spanning(-0.3, 10.4, 0.003),
    EigenvalueAxis.spanning(-2.0, 2.0, 1.4),
    EigenvalueAxis.spanning(-1e-6, 1e-5, 1e-8),
    EigenvalueAxis.spanning(0.0, 3e6, 20.0),
    EigenvalueAxis.symlog(-0.2, 40.0, 0.01, linear_decades=0.4),
    EigenvalueAxis.spanning(-3e4, 3e4, 3.0),
]


@pytest.mark.parametrize("axis", AXES)
def test_positions_are_those_of_matplotlibs_scale(axis):
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axis.apply(axes)
    x = axis.samples(201)
    theirs = axes.transData.transform(np.column_stack([x, np.zeros_like(x)]))[:, 0]
    assert np.diff(theirs) == pytest.approx(np.full(200, (theirs[-1] - theirs[0]) / 200), rel=1e-6)  # evenly spaced
    assert (x[0], x[-1]) == pytest.approx((axis.low, axis.high))
    assert axis.value(axis.position(x)) == pytest.approx(x, rel=1e-9, abs=1e-12 * axis.high)


def test_a_compact_spectrum_gets_a_linear_axis_and_a_wide_one_a_symlog_axis():
    assert EigenvalueAxis.spanning(-2.0, 2.0, 1.4).is_linear
    assert EigenvalueAxis.spanning(5.0, 6.0, 6.0).is_linear
    wide = EigenvalueAxis.spanning(-0.3, 10.4, 0.03)
    assert wide.linear_to == 0.01


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_the_linear_part_scales_with_the_spectrum(scale):
    axis = EigenvalueAxis.spanning(-0.3 * scale, 10.0 * scale, 0.03 * scale)
    assert axis.linear_to == pytest.approx(0.01 * scale)
    assert axis.low < -0.3 * scale
    assert axis.high > 10.0 * scale


def test_a_bulk_of_no_width_does_not_stretch_the_axis_without_end():
    assert EigenvalueAxis.spanning(0.0, 10.0, 0.0).linear_to == pytest.approx(1e-3)


def test_all_zero():
    axis = EigenvalueAxis.spanning(0.0, 0.0, 0.0)
    assert axis.low < 0 < axis.high


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("which", ["x", "y"])
def test_ticks_are_few_and_inside(axis, which):
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axis.apply(axes, which)
    ticks = (axes.xaxis if which == "x" else axes.yaxis).get_majorticklocs()
    inside = [tick for tick in ticks if axis.low <= tick <= axis.high]
    assert 3 <= len(inside) <= 10
    if not axis.is_linear:
        assert 0.0 in ticks
