"""The script of arXiv:2205.08601 at its small size, and that wrong numbers fail it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import universal_characteristics
import universal_characteristics_synthetic as synthetic
from claims import Claims


@pytest.fixture
def claims(tmp_path):
    return Claims("paper", "A paper", "Somebody", "About.", ["--quick", "--out", str(tmp_path)])


@pytest.mark.slow
def test_it_holds(tmp_path):
    assert universal_characteristics.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "universal_characteristics.md").read_text(encoding="utf-8")
    assert page.count("does not reproduce") >= 5
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_noise_of_batches_and_a_wrong_one(claims, monkeypatch):
    synthetic.noise_of_batches(claims)
    assert claims.finish() == 0

    def five_per_cent_too_large(*args, **kwargs):
        found = right(*args, **kwargs)
        return replace(found, mean=1.05 * found.mean)

    right = synthetic.noise_scale
    monkeypatch.setattr(synthetic, "noise_scale", five_per_cent_too_large)
    synthetic.noise_of_batches(claims)
    assert claims.finish() == 1


def test_a_law_with_the_wrong_noise_fails(claims, monkeypatch):
    """The matrices keep noise of .5, the rules are told .55."""
    goe = synthetic.goe
    monkeypatch.setattr(synthetic, "SIGMA", 0.55)
    monkeypatch.setattr(synthetic, "goe", lambda n, rng: goe(n, rng) / 1.1)
    synthetic.damping(claims)
    assert claims.finish() == 1
