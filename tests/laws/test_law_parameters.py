"""Parameters by name, and laws in files."""

from __future__ import annotations

import pytest

from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.parameters import parameters_of, with_parameter
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

LAWS = [
    Semicircle(2.0, 0.3),
    MarchenkoPastur(0.5, 2.0),
    WishartPlusWigner(0.5, 0.2, 3.0),
    RefinedWishartPlusWigner(0.5, 0.2, 3.0),
    ProductWishart((1.0, 2.0, 0.5), 2.0),
    ProductWigner(0.5, 2.0),
    PercolatedWigner(0.5, 2.0),
    SparseWigner(3.0, 2.0),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_every_parameter_is_read_and_set_by_its_name(law):
    values = parameters_of(law)
    assert values
    for name, value in values.items():
        assert isinstance(value, float)
        assert with_parameter(law, name, value) == law
        other = with_parameter(law, name, 0.9 * value)
        assert parameters_of(other) == {**values, name: 0.9 * value}
        assert type(other) is type(law)


def test_the_numbers_of_a_tuple_have_places():
    assert list(parameters_of(ProductWishart((1.0, 2.0, 0.5)))) == ["dims[0]", "dims[1]", "dims[2]", "scale"]
    assert with_parameter(ProductWishart((1.0, 2.0, 0.5)), "dims[1]", 3.0).dims == (1.0, 3.0, 0.5)


def test_a_value_outside_the_family_is_refused():
    with pytest.raises(ValueError, match="positive"):
        with_parameter(MarchenkoPastur(0.5), "ratio", -1.0)
