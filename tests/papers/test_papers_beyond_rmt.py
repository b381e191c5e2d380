"""The paper on products and percolation at its small size: all that it asserts holds, and what it uses can be wrong."""

from __future__ import annotations

import beyond_rmt as script
import beyond_rmt_ensembles
import numpy as np
import pytest
from beyond_rmt_ensembles import FAMILIES, PercolatedWishart, mass
from beyond_rmt_zeros import exact_zeros
from claims import Claims
from misfit import kolmogorov, measured

from lightning_rmt.laws import MarchenkoPastur, PercolatedWigner, ProductWigner, Semicircle


@pytest.mark.slow
def test_all_that_the_script_asserts_holds(tmp_path):
    assert script.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "beyond_rmt.md").read_text(encoding="utf-8")
    assert "FAILS" not in page
    assert page.count("does not reproduce") == 3
    for name in ("ensembles", "bulk", "misfit", "zeros"):
        assert (tmp_path / f"beyond_rmt_{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_percolated_wishart_is_its_simulation(ratio):
    law = PercolatedWishart(0.4, ratio, 1.5)
    assert law.atom == pytest.approx(1 - 0.4 * min(1.0, 1 / ratio))
    assert kolmogorov(law.rvs(1000, np.random.default_rng(0)), law) < 0.012
    assert mass(law) == pytest.approx(1 - law.atom, abs=0.01)
    assert law.moment(1) == pytest.approx(0.4 * MarchenkoPastur(ratio, 1.5).moment(1))


def test_percolation_keeps_a_share():
    with pytest.raises(ValueError, match="share"):
        PercolatedWishart(1.2, 1.0, 1.0)


@pytest.mark.parametrize("law", [Semicircle(1.0), MarchenkoPastur(0.5), PercolatedWigner(0.4)], ids=repr)
def test_the_nearest_member_says_whether_its_family_is_right(law):
    bulk = measured(law.rvs(600, np.random.default_rng(0)), steps=60).bulk
    families = {family.name: family for family in FAMILIES}
    found = {name: families[name].fit(bulk, 80) for name in ("semicircle", "Marchenko-Pastur", "percolated Wigner")}
    right = {name: type(one.law) is type(law) for name, one in found.items()}
    assert sum(right.values()) == 1
    for name, one in found.items():
        if right[name]:
            assert one.relative < 1.5
        elif not (name == "percolated Wigner" and isinstance(law, Semicircle)):  # which has it as a member
            assert one.relative > 2


def test_products_with_another_dimension_are_seen(tmp_path, monkeypatch, capsys):
    claims = Claims("paper", "A paper", "Somebody", "About.", ["--quick", "--out", str(tmp_path)])

    class Wrong(ProductWigner):
        """A ratio of dimensions that is a tenth too large."""

        def rvs(self, size, rng):
            return ProductWigner(1.1 * self.ratio, self.scale).rvs(size, rng)

    monkeypatch.setattr(beyond_rmt_ensembles, "ProductWigner", Wrong)
    beyond_rmt_ensembles.products(claims)
    assert claims.finish() == 1
    failed = capsys.readouterr().out.split("out of tolerance")[1]
    assert "its KS distance" in failed
    assert "zeros, product Wigner, c = 0.3" in failed
    assert "product Wishart" not in failed


def test_only_rounding_counts_as_an_exact_zero():
    assert exact_zeros(np.array([1e-17, 1e-14, 1e-9, 1e-3, 1.0])) == pytest.approx(0.4)
