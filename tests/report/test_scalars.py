from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_rmt.laws.ranking import QUICK
from lightning_rmt.levels.block import BlockLevels
from lightning_rmt.local_law import NoiseScale
from lightning_rmt.report.scalars import caveats, refusals, scalars, split, verdicts
from lightning_rmt.report.wording import law_tag

ALWAYS = {
    *("lambda_max", "lambda_max_residual", "lambda_min", "lambda_min_residual"),
    *("trace", "trace_stderr", "frobenius", "frobenius_stderr"),
    *(
        f"outliers/{what}_{side}"
        for what in ("count", "gap_index", "gap_ratio", "gap_spacings")
        for side in ("high", "low")
    ),
    *("bulk_edge_low", "bulk_edge_high", "q01", "q99"),
    *(f"{sign}_mass{bound}" for sign in ("zero", "negative") for bound in ("", "_low", "_high")),
    *("negative_mass_stderr", "free_skew", "free_skew_stderr", "free_kurtosis", "free_kurtosis_stderr"),
    *("sharpness_times_lr", "two_over_lr", "probe_seconds", "overhead", "products", "symmetry_error", "repeat_error"),
}


def test_values_of_a_known_spectrum(trained, exact_eigenvalues):
    got = {tag.removeprefix("rmt/"): value for tag, value in scalars(trained).items()}
    from_the_top = [*np.linspace(10.4, 4.0, 9), 0.7]
    assert [got[f"top/{i}"] for i in range(1, 11)] == pytest.approx(from_the_top, rel=1e-9)
    assert [got[f"bottom/{i}"] for i in (1, 2)] == pytest.approx([-0.3 / 3**0.9, -0.3 / 4**0.9], rel=1e-9)
    assert got["lambda_max"] == pytest.approx(10.4, rel=1e-12)
    assert got["lambda_max_residual"] < 1e-10
    assert got["outliers/count_high"] == 9
    assert got["outliers/gap_index_high"] == 9
    assert got["outliers/gap_ratio_high"] == pytest.approx(4.0 / 0.7, rel=1e-6)
    assert got["bulk_edge_high"] == pytest.approx(0.7, rel=1e-6)
    assert got["sharpness_times_lr"] == pytest.approx(10.4 * 0.11)
    assert got["two_over_lr"] == pytest.approx(2 / 0.11)
    assert (got["products"], got["probe_seconds"], got["symmetry_error"]) == (100, 1.5, 1e-7)


def test_sums_agree_with_the_matrix_within_their_errors(trained):
    truth = trained_truth()
    got = scalars(trained)
    assert abs(got["rmt/trace"] - truth.sum()) < 4 * got["rmt/trace_stderr"]
    assert abs(got["rmt/frobenius"] - np.linalg.norm(truth)) < 4 * got["rmt/frobenius_stderr"]


def trained_truth():
    from conftest import trained_eigenvalues

    return trained_eigenvalues()


def test_error_of_finite_differences(any_reading):
    assert "rmt/product_error" not in {**scalars(any_reading), **refusals(any_reading)}
    differences = replace(any_reading, product="finite_difference", product_error=2e-3)
    assert scalars(differences)["rmt/product_error"] == 2e-3


def test_every_tag_is_either_a_finite_number_or_a_sentence(any_reading):
    numbers, reasons = split(any_reading)
    assert all(math.isfinite(value) and type(value) is float for value in numbers.values())
    assert not numbers.keys() & reasons.keys()
    tags = {tag.removeprefix("rmt/") for tag in [*numbers, *reasons]}
    ends = {tag for tag in tags if tag.startswith(("top/", "bottom/"))}
    bounds = {f"{tag}_{side}" for tag in ("q01", "q99") if f"rmt/{tag}" in numbers for side in ("low", "high")}
    fits = {tag for tag in tags if tag.startswith("fit/")}  # of those laws that have a member for this bulk
    assert tags - ends - fits == ALWAYS | bounds
    assert {f"fit/{law_tag(family.__name__)}" for family in QUICK} <= fits
    for tag in ("q01", "q99", "zero_mass", "negative_mass"):
        if f"rmt/{tag}" in numbers:
            low, value, high = (numbers[f"rmt/{tag}{end}"] for end in ("_low", "", "_high"))
            assert low - 1e-12 <= value <= high + 1e-12, tag
    assert all(len(reason) > 10 for reason in reasons.values())


def test_levels_are_numbered_from_one_outwards_in_and_stop_where_certificates_do(reading_of):
    reading = reading_of(np.array([5.0, 4.0, 3.0, -2.0]))
    got = scalars(reading)
    assert [got[f"rmt/top/{i}"] for i in (1, 2, 3)] == pytest.approx([5.0, 4.0, 3.0])
    assert got["rmt/bottom/1"] == pytest.approx(-2.0)
    assert "rmt/top/4" not in got
    assert "only 3 eigenvalues" in refusals(reading)["rmt/top/4"]
    assert not any(tag.startswith("rmt/top/5") for tag in refusals(reading))


def test_a_refused_count_takes_its_edge_with_it_and_says_why(known):
    reading = known("initial")
    got, why = scalars(reading), refusals(reading)
    for tag in ("rmt/outliers/count_high", "rmt/bulk_edge_high"):
        assert tag not in got
        assert why[tag] == reading.spectrum.outliers.high.verdict
    assert got["rmt/outliers/gap_spacings_high"] < 5  # the near miss is logged all the same


def test_a_quantile_is_logged_only_where_its_bounds_are_close(trained, reading_of):
    low, high = trained.spectrum.quantile_bounds(0.99)
    assert high / low < 1.5
    assert scalars(trained)["rmt/q99"] == pytest.approx(np.quantile(trained_truth(), 0.99), rel=0.5)
    vague = reading_of(trained_truth(), steps=6)
    assert "rmt/q99" not in scalars(vague)
    assert "known only to lie between" in refusals(vague)["rmt/q99"]


def test_quantile_of_a_spectrum_with_more_than_that_share_of_zeros(reading_of):
    reading = reading_of(np.concatenate([np.zeros(990), np.linspace(1, 2, 10)]))
    assert scalars(reading)["rmt/q01"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "tag", "words"),
    [
        ({"learning_rate": None}, "two_over_lr", "no learning rate"),
        ({"learning_rate": None}, "sharpness_times_lr", "no learning rate"),
        ({"learning_rate": 0.0}, "two_over_lr", "is 0"),
        ({"curvature": "gradient_covariance"}, "sharpness_times_lr", "curvature of the loss"),
        ({"repeat_error": math.nan}, "repeat_error", "nan"),
        ({"seconds": math.inf}, "probe_seconds", "inf"),
    ],
)
def test_what_is_missing_or_not_finite_is_absent_with_its_reason(trained, change, tag, words):
    reading = replace(trained, **change)
    assert f"rmt/{tag}" not in scalars(reading)
    assert words in refusals(reading)[f"rmt/{tag}"]


def test_the_name_is_the_prefix(trained):
    reading = replace(trained, name="net/encoder")
    assert all(tag.startswith("net/encoder/") for tag in [*scalars(reading), *refusals(reading), *caveats(reading)])


def test_a_spectrum_of_zeros_is_said_to_be_one(reading_of):
    assert "every eigenvalue is zero" in caveats(reading_of(np.zeros(50)))["rmt/lambda_max"]
    assert "rmt/lambda_max" not in caveats(reading_of(np.linspace(0.0, 1.0, 50)))


def test_caveats_name_what_means_less_than_it_says(trained, known, reading_of):
    assert caveats(trained) == {}
    assert "not converged" in caveats(known("four steps"))["rmt/lambda_max"]
    gram = np.concatenate([np.zeros(20), [1.0, 2.0, 4.0]])  # lambda_min is 0 to rounding, which nothing certifies
    assert not reading_of(gram).spectrum.lambda_min.certified
    assert not any("lambda" in tag for tag in caveats(reading_of(gram)))
    assert "not converged" in caveats(reading_of(np.linspace(1e-9, 1.0, 400), steps=30))["rmt/lambda_min"]
    short = reading_of(trained_truth(), steps=40)
    assert scalars(short)["rmt/outliers/count_high"] == 9
    assert caveats(short)["rmt/outliers/count_high"].startswith("a lower bound")


# --- what the spectrum means ------------------------------------------------------------------------------------------


def blocks(levels, noise=0.0):
    return (BlockLevels("head", "the head", np.atleast_2d(np.sort(levels)), noise, 0.1),)


def test_level_statistics_are_logged_by_block(known):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((400, 400))
    reading = replace(known("trained"), levels=blocks(np.linalg.eigvalsh(matrix + matrix.T)))
    got, found = scalars(reading), reading.level_statistics["head"]
    tag = "rmt/goe/head/spacing_ratio"
    assert got[tag] == found.spacing_ratio == pytest.approx(0.5307, abs=0.06)
    assert got[f"{tag}_stderr"] == found.stderr
    assert got[f"{tag}_z"] == found.z_goe
    assert got[f"{tag}_z_poisson"] > 5
    assert got[f"{tag}_p_value"] == found.p_value
    assert got[f"{tag}_levels"] == 400
    assert verdicts(reading)["rmt/goe/head"] == found.verdict
    assert "levels repel" in found.verdict


def test_too_few_levels_are_refused_with_the_number_that_is_needed(known):
    reading = replace(known("trained"), levels=blocks(np.random.default_rng(0).uniform(1, 2, 20)))
    got, why = scalars(reading), refusals(reading)
    assert "rmt/goe/head/spacing_ratio_z" not in got
    assert "50 needed" in why["rmt/goe/head/spacing_ratio_z"]
    assert got["rmt/goe/head/spacing_ratio_levels"] == 20


def test_ritz_values_never_make_level_statistics(any_reading):
    assert not any(tag.startswith("rmt/goe/") for tag in scalars(any_reading))


def test_laws_are_logged_with_their_errors_and_floors(known):
    reading = known("semicircle")
    got = scalars(reading)
    assert got["rmt/fit/semicircle"] < 0.05
    assert got["rmt/fit/semicircle_floors"] == pytest.approx(reading.laws.fits[0].relative)
    assert "semicircle" in verdicts(reading)["rmt/fit"]
    assert "accepted" not in verdicts(reading)["rmt/fit"]
    assert "fit/product_wishart" in " ".join(refusals(reading))


def test_groups_of_parameters_have_their_own_numbers(known):
    reading = replace(known("trained"), blocks={"encoder": known("semicircle").spectrum})
    got = scalars(reading)
    assert got["rmt/blocks/encoder/lambda_max"] == reading.blocks["encoder"].lambda_max.value
    assert got["rmt/blocks/encoder/trace_stderr"] > 0
    assert got["rmt/blocks/encoder/outliers_high"] == 0
    assert got["rmt/lambda_max"] != got["rmt/blocks/encoder/lambda_max"]


NOISE = NoiseScale(0.05, 0.004, 256.0, 12.0, 4.0, anisotropy_stderr=2.0, along=0.1)


def test_what_the_local_law_says_has_errors(known):
    reading = replace(known("trained"), noise=NOISE, curvature_noise=NOISE)
    got = scalars(reading)
    assert got["rmt/noise_scale_stderr"] == 0.004
    assert got["rmt/noise_edge_stderr"] == 0.008
    assert got["rmt/anisotropy_stderr"] == 2.0
    assert got["rmt/local_law_damping"] == reading.local_law_damping()
    assert got["rmt/cleaned/1_stderr"] == reading.cleaned_outliers.stderr[0] > 0.1
    tag = "rmt/local_law_damping_stderr"
    assert tag in got or "bulk's edge" in refusals(reading)[tag]
    unknown = replace(NOISE, stderr=None)
    without = replace(reading, noise=unknown, curvature_noise=unknown)
    assert "rmt/cleaned/1" in scalars(without)
    assert "rmt/cleaned/1_stderr" not in scalars(without)


def test_the_dampings_error(reading_of):
    wide = reading_of(np.concatenate([np.linspace(0, 3, 497), [8.0, 12.0, 20.0]]), noise=NOISE, curvature_noise=NOISE)
    noisy = replace(NOISE, mean=0.5, stderr=0.04)
    reading = replace(wide, noise=noisy, curvature_noise=noisy)
    error = scalars(reading)["rmt/local_law_damping_stderr"]
    moved = replace(reading, noise=replace(noisy, mean=0.54), curvature_noise=replace(noisy, mean=0.54))
    assert error >= 0.9 * (moved.local_law_damping() - reading.local_law_damping()) > 0


def test_the_outlier_map_by_outlier(known, law):
    got = scalars(replace(known("trained"), batch_law=law))
    fit = law.fits[1]
    assert got["rmt/batch_law/2/theta"] == fit.theta[0].mean
    assert got["rmt/batch_law/2/theta_stderr"] == fit.theta[0].stderr
    assert got["rmt/batch_law/2/alpha"] == fit.alpha.mean
    assert got["rmt/batch_law/2/exponent"] == fit.exponent.mean
    assert got["rmt/batch_law/2/r_squared"] == fit.r_squared
    assert got["rmt/batch_law/2/anisotropy"] == fit.anisotropy.mean
    flat = replace(law, eigenvalues=4.0 + 0.05 * np.log(law.batch_sizes)[:, None], sample_noise=None)
    reading = replace(known("trained"), batch_law=flat)
    for tag, words in (("exponent", "doesn't tell it"), ("anisotropy", "wasn't measured")):
        assert f"rmt/batch_law/1/{tag}" not in scalars(reading)
        assert f"rmt/batch_law/1/{tag}_stderr" not in scalars(reading)
        assert words in refusals(reading)[f"rmt/batch_law/1/{tag}"]


def test_a_light_reading_means_nothing_more_than_its_eigenvalues(known):
    reading = replace(known("trained"), speed="light")
    assert verdicts(reading) == {}
    assert not any("/fit/" in tag or "/goe/" in tag for tag in scalars(reading))
