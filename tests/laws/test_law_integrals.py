"""What every law gets from its density: quantiles and moments across atoms, poles and gaps."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt.laws import (
    BlockSemicircle,
    PercolatedWigner,
    ProductWigner,
    ProductWishart,
    Semicircle,
    SparseWigner,
)

LAWS = [
    Semicircle(2.0, 1.0),
    ProductWishart((1, 0.5, 0.5)),
    ProductWishart((1, 1, 1)),
    ProductWigner(0.3),
    ProductWigner(1.0),
    PercolatedWigner(0.3),
    SparseWigner(2.0),
    BlockSemicircle(0.5, 1.0, 1.0, 4.0),
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_quantiles_invert_the_distribution_function(law):
    shares = np.linspace(0, 1, 41)
    x = law.quantile(shares)
    assert (np.diff(x) >= 0).all()
    assert (law.cdf(x + 1e-9) >= shares - 1e-6).all()
    assert (law.cdf(x - 1e-9) <= shares + 1e-6 + 2e-4 * (np.abs(x) < 1e-6)).all()  # poles rise within 1e-9


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_distribution_function_rises_from_0_to_1_and_jumps_at_the_atom(law):
    low, high = law.edges
    x = np.linspace(low - 1, high + 1, 501)
    assert (np.diff(law.cdf(x)) >= 0).all()
    assert law.cdf([low - 1e-6 - (law.atom > 0), high + 1e-6]) == pytest.approx([0, 1], abs=1e-9)
    jump = law.cdf(law.atom_location) - law.cdf(law.atom_location - 1e-12)
    assert jump == pytest.approx(law.atom, abs=2e-3)
    assert law.moment(0) == pytest.approx(1)
