"""The script of arXiv:2102.06740 at its small size, and that levels of another kind fail it."""

from __future__ import annotations

import appearance_of_rmt
import appearance_of_rmt_controls as controls
import numpy as np
import pytest
from claims import Claims


@pytest.mark.slow
def test_it_holds(tmp_path):
    assert appearance_of_rmt.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "appearance_of_rmt.md").read_text(encoding="utf-8")
    assert page.count("does not reproduce") >= 4
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_levels_that_are_no_goe_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controls, "goe", lambda n, rng: np.sort(rng.uniform(-1, 1, n)))
    claims = Claims("paper", "A paper", "Somebody", "About.", ["--quick", "--out", str(tmp_path)])
    controls.calibrate(claims)
    assert claims.finish() == 1
    assert "GOE: distance from Wigner" in capsys.readouterr().out.split("out of tolerance")[1]


def test_goe_levels_take_the_density_they_are_given():
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.standard_normal(300) ** 3) for _ in range(6)]
    made = controls.goe_of_density(spectra, rng)
    assert len(made) == 6
    quantiles = np.linspace(0.05, 0.95, 7)
    given, found = (np.quantile(np.concatenate(some), quantiles) for some in (spectra, made))
    np.testing.assert_allclose(found, given, rtol=0.05, atol=0.01)
