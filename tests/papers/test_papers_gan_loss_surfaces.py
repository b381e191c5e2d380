"""The GAN's paper at its small size: all that it asserts holds, and its law and its reading of blocks can be wrong."""

from __future__ import annotations

import math

import gan_loss_surfaces as script
import gan_loss_surfaces_law
import numpy as np
import pytest
import torch
from claims import Claims
from gan_loss_surfaces_law import couplings, quartic, read_blocks, simulate, simulated_pair, touching_shift
from misfit import Dense, kolmogorov, misfit, nearest, without_largest

from lightning_rmt import estimate_spectrum
from lightning_rmt.laws import BlockSemicircle


def blocks_of(matrix, size):
    parts = (matrix, matrix[:size, :size].contiguous(), matrix[size:, size:].contiguous())
    return [estimate_spectrum(Dense(part), steps=60, probes=4, seed=0) for part in parts]


@pytest.mark.slow
def test_all_that_the_script_asserts_holds(tmp_path):
    assert script.main(["--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gan_loss_surfaces.md").read_text(encoding="utf-8")
    assert "FAILS" not in page
    assert page.count("does not reproduce") >= 6
    for name in ("law", "spectrum", "over_time"):
        assert (tmp_path / f"gan_loss_surfaces_{name}.png").stat().st_size > 5000


def test_the_blocks_of_a_simulated_pair_say_what_it_was_made_of():
    found = read_blocks(*blocks_of(simulated_pair(400, 0.4, 1.0, 1.5, 1.0, 0.3, seed=0), 160), outliers=True)
    assert (math.sqrt(found.b2), math.sqrt(found.b12)) == pytest.approx((1.0, 1.5), rel=0.1)
    assert (found.x1, found.x) == pytest.approx((1.0, 0.3), abs=0.15)
    assert found.coupling == pytest.approx(1.0, abs=4 * found.coupling_error)


def test_a_pair_coupled_more_than_its_generator_shows_it():
    matrix = simulated_pair(400, 0.4, 1.0, 1.5, 1.0, 0.0, seed=0)
    matrix[:160, 160:] *= 3
    matrix[160:, :160] *= 3
    spectra = blocks_of(matrix, 160)
    found = read_blocks(*spectra, outliers=True)
    assert found.coupling == pytest.approx(9.0, abs=4 * found.coupling_error)
    assert misfit(found.law, spectra[0].bulk, found.x).relative > 2


def test_only_the_quartic_with_this_sign_has_the_law_as_a_root():
    parameters = (0.5, 1.0, 1.0, 1.0)
    height = float(BlockSemicircle(*parameters).density(-0.5)) * np.pi / 2
    assert np.abs(quartic(-0.5, *parameters, 1.0).imag - height).min() < 1e-9
    assert np.abs(quartic(-0.5, *parameters, -1.0).imag - height).min() > 0.01


def test_a_law_with_another_constant_is_seen(tmp_path, monkeypatch, capsys):
    claims = Claims("paper", "A paper", "Somebody", "About.", ["--quick", "--out", str(tmp_path)])
    simulate(claims, 400)
    assert claims.finish() == 0

    class Wrong(BlockSemicircle):
        """b a tenth too small."""

        def rvs(self, size, rng):
            return BlockSemicircle(self.fraction, self.coupling / 0.9, self.block, self.shift).rvs(size, rng)

    monkeypatch.setattr(gan_loss_surfaces_law, "BlockSemicircle", Wrong)
    simulate(claims, 400)
    assert claims.finish() == 1
    assert "KS distance of the law" in capsys.readouterr().out.split("out of tolerance")[1]


def test_the_models_couplings_and_where_supports_touch():
    assert couplings(p=2, q=2, sigma_z=1.0, kappa=0.5) == (4 * 3 * 16, 1.0)
    shift = touching_shift(0.5, 1.0, 1.0)
    assert len(BlockSemicircle(0.5, 1.0, 1.0, shift - 1e-3).support) == 1
    assert len(BlockSemicircle(0.5, 1.0, 1.0, shift + 1e-3).support) == 2


def test_the_nearest_member_is_the_one_that_was_shifted():
    law = BlockSemicircle(0.5, 1.0, 1.0, 1.0)
    levels = law.rvs(400, np.random.default_rng(0)) - 0.5
    spectrum = estimate_spectrum(Dense(torch.diag(torch.from_numpy(levels))), steps=50, probes=1, seed=0)
    found = nearest(
        lambda b: BlockSemicircle(0.5, b, 1.0, 1.0), [(0.7, 0.0)], spectrum.bulk, shifted=True, evaluations=60
    )
    assert found.shift == pytest.approx(0.5, abs=0.1)
    assert found.relative < 1.5 < misfit(law, spectrum.bulk).relative


def test_largest_eigenvalues_are_taken_out_and_nothing_else():
    levels = np.geomspace(1e-3, 10, 300)  # nothing to count as outliers
    spectrum = estimate_spectrum(Dense(torch.diag(torch.from_numpy(levels))), steps=60, probes=1, seed=0)
    assert not spectrum.outliers.high.count
    rest = without_largest(spectrum, 5)
    nodes, weights = rest.pooled()
    assert rest.size == 295
    assert nodes.max() == pytest.approx(levels[294], rel=1e-6)
    assert weights.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="certified"):
        without_largest(spectrum, 290)


def test_kolmogorov_counts_the_step_at_an_atom():
    from lightning_rmt.laws import PercolatedWigner

    law = PercolatedWigner(0.5)
    levels = law.rvs(1000, np.random.default_rng(0))
    assert kolmogorov(levels, law) < 0.01
    assert kolmogorov(levels, PercolatedWigner(0.4)) > 0.04
