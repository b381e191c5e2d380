from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_spectra import goe, spectrum_of
from mapped_levels import bulk, two_signs_map

from lightning_rmt import LevelStatistics, Reading, level_statistics
from lightning_rmt.levels import edge_statistics
from lightning_rmt.levels.spacings import spacing_ratios


def test_goe_repels():
    """T3: 600 levels of the bulk of one GOE matrix; the rate over many is in test_calibration."""
    reading = level_statistics(goe(1000, np.random.default_rng(0))[200:800])
    assert abs(reading.z_goe) < 4
    assert reading.p_value > 0.001
    assert reading.verdict_kind == "repel"
    assert reading.verdict.startswith("levels repel (consistent with GOE, excludes Poisson): spacing ratio")
    assert "600 levels" in reading.verdict
    assert "is GOE" not in reading.verdict
    assert reading.levels == 600
    assert reading.brody == pytest.approx(reading.brody_goe[0], abs=4 * reading.brody_goe[1])
    assert reading.number_variance[0] == pytest.approx(0.67, abs=0.2)
    assert reading.rigidity == pytest.approx(0.274, abs=0.06)
    assert reading.detectable == pytest.approx(4.221 * 0.308 / 598**0.5, rel=1e-3)


def test_independent_levels_do_not():
    """T4: 600 independent levels."""
    reading = level_statistics(np.sort(np.random.default_rng(1).uniform(1, 2, 600)))
    assert reading.z_goe < -8
    assert reading.verdict_kind == "no_repulsion"
    assert reading.verdict.startswith("no repulsion detected (consistent with Poisson or >= 4 independent blocks)")
    assert reading.p_value == 1e-4
    assert "p < 1e-4" in reading.verdict
    assert reading.brody == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("seed", range(8))
def test_two_blocks_are_intermediate(seed):
    """T5: two GOE blocks of 300 levels laid over each other."""
    rng = np.random.default_rng(seed)
    reading = level_statistics(np.sort(np.append(goe(300, rng), goe(300, rng))))
    assert reading.spacing_ratio == pytest.approx(0.423, abs=0.05)
    assert reading.verdict_kind == "intermediate"


def test_eight_blocks_read_as_independent_levels():
    rng = np.random.default_rng(0)
    reading = level_statistics(np.sort(np.concatenate([goe(100, rng) for _ in range(8)])))
    assert reading.spacing_ratio == pytest.approx(0.39, abs=0.04)


def test_equispaced_levels_are_more_regular():
    """T8: a lattice is not GOE."""
    reading = level_statistics(np.arange(1.0, 601.0))
    assert reading.spacing_ratio == pytest.approx(1, abs=1e-9)
    assert reading.verdict_kind == "regular"
    assert reading.verdict.startswith("more regular than GOE")


def test_clustered_levels():
    rng = np.random.default_rng(0)
    levels = np.sort((np.arange(200) + 1.0)[:, None] + 1e-3 * rng.uniform(size=(200, 3)), axis=None)
    reading = level_statistics(levels)
    assert reading.verdict_kind in ("no_repulsion", "intermediate")
    assert reading.verdict_kind != "repel"


def test_outliers_are_left_out():
    rng = np.random.default_rng(0)
    bulk_levels = goe(400, rng)
    reading = level_statistics(np.append(bulk_levels, 10 * 1.4 ** np.arange(10)))
    alone = level_statistics(bulk_levels)
    assert reading.outliers == 10
    assert reading.spacing_ratio == pytest.approx(alone.spacing_ratio, abs=1e-12)
    assert reading.p_value == pytest.approx(alone.p_value)
    kept = level_statistics(np.append(bulk_levels, 10 * 1.4 ** np.arange(10)), keep_outliers=True)
    assert kept.outliers == 0
    assert kept.levels == 410


@pytest.mark.parametrize("crystal", [1, 4])
def test_ritz_values_are_crystals_and_refused(crystal):
    """T1, T2: Poisson levels: one probe's Ritz values look nearly equispaced, those of four pooled look Poisson or worse."""
    spectrum = spectrum_of(np.sort(np.random.default_rng(0).uniform(size=4000)), 100, probes=crystal)
    pooled = np.sort(spectrum.nodes.ravel())
    middle = pooled[pooled.size // 10 : -pooled.size // 10]
    low, high = {1: (0.85, 0.95), 4: (0.13, 0.30)}[crystal]
    assert low < spacing_ratios(middle).mean() < high
    for argument in (spectrum, spectrum.runs[0], [spectrum]):
        with pytest.raises(TypeError, match=r"Ritz values are quadrature nodes.*levels= blocks"):
            level_statistics(argument)
    for side in ("high", "low"):
        edge = edge_statistics(spectrum, side, exact_products=True)
        assert edge.verdict_kind == "insufficient"
        assert edge.p_value is edge.z_goe is edge.brody is None
    assert Reading(0, 0, spectrum, "hessian", "rmt", 1.0, 1).level_statistics == {}


def test_ritz_values_in_a_bare_array_do_not_read_as_goe():
    """They can't be told from eigenvalues; one run's read as a crystal, those of four, pooled, as clusters."""
    spectrum = spectrum_of(np.sort(np.random.default_rng(0).uniform(size=4000)), 100, probes=4)
    assert level_statistics(spectrum.nodes[0]).verdict_kind == "regular"
    assert level_statistics(spectrum.nodes).verdict_kind == "regular"
    assert level_statistics(np.sort(spectrum.nodes.ravel())).verdict_kind == "no_repulsion"


@pytest.mark.parametrize(
    ("levels", "error", "words"),
    [
        ([1.0, np.nan, 2.0], ValueError, "1 of 3 eigenvalues are not finite"),
        ([1.0, np.inf], ValueError, "not finite"),
        ([2.0, 1.0, 3.0], ValueError, "ascending"),
        (np.arange(60.0)[::-1], ValueError, "ascending"),
        (np.arange(5) + 1j, TypeError, "complex"),
        (["a", "b"], TypeError, "real numbers"),
        (np.array([object(), object()]), TypeError, "real numbers"),
        (np.eye(4), ValueError, "pass its eigenvalues"),
        (np.random.default_rng(0).normal(size=(4, 4)), ValueError, "ascending"),
        (np.zeros((2, 2, 2)), ValueError, "shape"),
        (3.0, ValueError, "shape"),
        (np.zeros((0, 5)), ValueError, "no spectrum"),
        (np.arange(60, dtype=np.uint8)[::-1], ValueError, "ascending"),
        (np.eye(4).tolist(), ValueError, "pass its eigenvalues"),
        ([[1.0, 2.0], [2.0, 3.0]], ValueError, "pass its eigenvalues"),
        (np.add.outer(np.arange(9.0), np.arange(9.0)) + 1e-7 * np.tri(9), ValueError, "pass its eigenvalues"),
        ([np.arange(60.0), 3.0], ValueError, "spectrum 1: expected a vector"),
        ([np.arange(60.0), np.full(60, np.nan)], ValueError, "spectrum 1: 60 of 60 eigenvalues are not finite"),
        (None, TypeError, "real numbers"),
    ],
)
def test_what_is_no_spectrum_is_refused(levels, error, words):
    with pytest.raises(error, match=words):
        level_statistics(levels)


@pytest.mark.parametrize("noise", [-1.0, np.nan, np.inf])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match="noise"):
        level_statistics(np.arange(60.0), noise=noise)


@pytest.mark.parametrize(("name", "value"), [("norm", -1.0), ("norm", np.nan), ("size", 0), ("size", 59)])
def test_bad_norm_and_size(name, value):
    with pytest.raises(ValueError, match=name):
        level_statistics(np.arange(60.0), **{name: value})


def test_a_norm_below_the_levels_is_theirs():
    levels = np.sort(np.append(goe(100, np.random.default_rng(0)), np.full(30, 1e-14)))
    assert level_statistics(levels, norm=1e-9) == level_statistics(levels)
    assert level_statistics(levels).dropped == 30


@pytest.mark.parametrize(
    ("levels", "kept"),
    [
        ([], 0),
        ([1.0], 0),
        ([1.0, 2.0], 0),
        ([1, 2, 4], 0),
        ([-100, 100], 0),
        ([[], []], 0),
        (np.zeros(100), 0),
        (np.arange(1.0, 50.0), 49),
        (np.ones(100), 0),
    ],
)
def test_too_few_levels(levels, kept):
    reading = level_statistics(levels)
    assert reading.verdict_kind == "insufficient"
    assert reading.verdict == f"insufficient levels (k<50): {kept} kept, 50 needed"
    assert reading.levels == kept
    assert reading.p_value is reading.z_goe is reading.brody is None
    assert (reading.spacing_ratio is None) == (kept == 0)


def test_forty_copies_are_not_forty_times_the_levels():
    levels = goe(40, np.random.default_rng(0))
    reading = level_statistics([levels] * 40)
    assert reading.correlation == pytest.approx(1)
    assert reading.verdict_kind == "insufficient"
    assert reading.levels == 1600
    assert "1600 kept over all spectra, worth 40 independent ones, 50 needed" in reading.verdict


def test_pairs_of_degenerate_levels_are_refused():
    levels = np.repeat(np.sort(np.random.default_rng(0).uniform(1, 2, 100)), 2)
    reading = level_statistics(levels)
    assert reading.verdict_kind == "degenerate"
    assert reading.degenerate == 100
    assert reading.spacing_ratio is None


def test_several_spectra():
    rng = np.random.default_rng(0)
    rows = np.stack([goe(300, rng) for _ in range(40)])
    reading = level_statistics(rows)
    assert reading.spectra == 40
    assert reading.levels == 12000
    assert reading.spacing_ratio == pytest.approx(0.5327, abs=4 * 0.0029)
    assert reading.stderr == pytest.approx(0.308 / 11920**0.5, rel=0.1)
    assert level_statistics(list(rows)) == reading
    ragged = level_statistics([rows[0], rows[1][20:], rows[2][:-100]])
    assert ragged.levels == 300 + 280 + 200


def test_integers_and_float32_are_fine():
    levels = goe(200, np.random.default_rng(0))
    assert level_statistics(levels.astype(np.float32)).spacing_ratio == pytest.approx(
        level_statistics(levels).spacing_ratio, abs=1e-3
    )
    assert level_statistics(np.arange(1, 100)).verdict_kind == "regular"


@pytest.mark.parametrize("levels", [goe(200, np.random.default_rng(0)), np.zeros(3), np.arange(1.0, 600.0)])
def test_json_round_trip(levels):
    reading = level_statistics(levels)
    plain = json.loads(json.dumps(reading.to_dict(), allow_nan=False))
    assert LevelStatistics.from_dict(plain) == reading
    assert LevelStatistics.from_dict(plain | {"something_new": 1}) == reading
    del plain["verdict"]
    with pytest.raises(ValueError, match="verdict missing"):
        LevelStatistics.from_dict(plain)


NUMBERS = ("spacing_ratio", "stderr", "z_goe", "anderson_darling", "p_value", "brody", "spacing_variance")


def numbers(reading):
    return np.array([getattr(reading, name) for name in NUMBERS])


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 99))
def test_scaling_changes_nothing(scale, seed):
    """T23: scale."""
    levels = two_signs_map(80, np.random.default_rng(seed))
    first, second = level_statistics(levels, noise=1e-9), level_statistics(scale * levels, noise=scale * 1e-9)
    assert numbers(second) == pytest.approx(numbers(first), rel=1e-3, abs=1e-4)
    assert (first.levels, first.verdict_kind) == (second.levels, second.verdict_kind)


def test_scaling_and_shifting_a_long_run():
    """T23: the statistics over many spacings as well."""
    levels = goe(900, np.random.default_rng(0))[200:700]
    first = level_statistics(levels)
    for other in (level_statistics(1e6 * levels), level_statistics(levels + 0.1), level_statistics(-levels[::-1])):
        assert other.number_variance == pytest.approx(first.number_variance, rel=0.1)
        assert other.rigidity == pytest.approx(first.rigidity, rel=0.1)
        assert numbers(other) == pytest.approx(numbers(first), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_mirror_symmetry(seed):
    levels = two_signs_map(150, np.random.default_rng(seed)) + 0.3
    levels = np.sort(np.append(levels, np.zeros(20)))
    first, second = level_statistics(levels), level_statistics(-levels[::-1])
    assert numbers(second) == pytest.approx(numbers(first), rel=1e-3, abs=1e-4)
    assert first.dropped == second.dropped == 20


def test_a_shift_changes_nothing_while_levels_keep_both_signs():
    """T23: shift."""
    levels = bulk(200, np.random.default_rng(0))
    first, second = level_statistics(levels), level_statistics(levels + 0.3)
    assert numbers(second) == pytest.approx(numbers(first), rel=1e-6)


def test_a_shift_to_one_sign_leaves_the_ratio_and_nearly_the_rest():
    levels = bulk(200, np.random.default_rng(0))
    first, second = level_statistics(levels), level_statistics(levels + 5)
    assert second.spacing_ratio == pytest.approx(first.spacing_ratio, abs=1e-9)
    assert second.anderson_darling == pytest.approx(first.anderson_darling, abs=0.15)


def test_a_shift_is_no_symmetry_with_zeros():
    levels = np.sort(np.append(bulk(200, np.random.default_rng(0)), np.zeros(20)))
    assert level_statistics(levels).dropped == 20
    assert level_statistics(levels + 1e-15).dropped == 20
    shifted = level_statistics(levels + 0.5)
    assert shifted.dropped == 20  # as an atom: it is no run of levels wherever it is
    assert "coincide" in " ".join(shifted.notes)


def test_the_result_is_deterministic():
    levels = bulk(100, np.random.default_rng(0))
    state = np.random.get_state()[1].copy()
    assert level_statistics(levels) == level_statistics(levels)
    assert (np.random.get_state()[1] == state).all()
