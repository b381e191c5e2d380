"""A reading as scalars: the tags that every logger gets, and a sentence for each one that isn't there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from lightning_rmt.local_law.batch_law import tells_exponent
from lightning_rmt.reading import Reading
from lightning_rmt.report.wording import law_tag, law_words, number
from lightning_rmt.spectra.moments import Estimate

TOP = 10
"""Certified eigenvalues logged from either end: ``top/1`` is the largest, ``bottom/1`` the smallest."""
WIDEST_BRACKET = 1.5
"""Largest ratio of a quantile's Chebyshev-Markov-Stieltjes bounds at which the quantile is logged."""


class _Item(NamedTuple):
    tag: str
    value: float | None
    reason: str  # why it's absent, where value is None or not finite


def scalars(reading: Reading) -> dict[str, float]:
    """Every number of the reading that can be had honestly, by tag (``<name>/lambda_max``, ...); all finite.

    Eigenvalues, edges, quantiles and the trace are in the operator's units (loss per squared parameter; in an optimizer's
    metric, one over the learning rate's); masses, ``sharpness_times_lr`` and ``preconditioned/sharpness_over_limit`` are
    dimensionless; ``probe_seconds`` is in seconds. ``<tag>_residual`` bounds the distance to an exact eigenvalue,
    ``<tag>_stderr`` is one standard error, ``<tag>_low`` and ``<tag>_high`` are bounds at two of them.
    What is missing here is in `refusals`.
    """
    return split(reading)[0]


def refusals(reading: Reading) -> dict[str, str]:
    """The tags that `scalars` leaves out at this reading, each with the reason as a sentence."""
    return split(reading)[1]


def split(reading: Reading) -> tuple[dict[str, float], dict[str, str]]:
    """`scalars` and `refusals` in one go: a quantile's bounds take about 0.1 s."""
    numbers, reasons = {}, {}
    for tag, value, reason in _items(reading):
        if value is not None and math.isfinite(value):
            numbers[tag] = float(value)
        else:
            reasons[tag] = reason if value is None else f"it came out as {value}"
    return numbers, reasons


def caveats(reading: Reading) -> dict[str, str]:
    """The tags that `scalars` does log, but that mean less than their name says: a count that is a lower bound, say."""
    spectrum, found = reading.spectrum, {}
    if reading.light:  # which logs certified values only
        return {}
    for end, level in (("max", spectrum.lambda_max), ("min", spectrum.lambda_min)):
        if not spectrum.converged(level):
            found[f"{reading.name}/lambda_{end}"] = (
                f"not converged: an eigenvalue lies within {number(level.residual)} of it, and it need not be the "
                "outermost; more Lanczos steps settle it"
            )
    if spectrum.lambda_max.value == spectrum.lambda_min.value == 0.0:
        found[f"{reading.name}/lambda_max"] = (
            "every eigenvalue is zero: the loss is linear in these parameters, or a function of its own detaches what its "
            'backward returns; product="finite_difference" tells which'
        )
    for side, outliers in (("high", spectrum.outliers.high), ("low", spectrum.outliers.low)):
        if outliers.count is not None and outliers.at_least:
            found[f"{reading.name}/outliers/count_{side}"] = f"a lower bound: {outliers.verdict}"
    return found


def verdicts(reading: Reading) -> dict[str, str]:
    """What the statistics mean, in words: by scope of level statistics, and the laws under ``fit``."""
    if reading.light:
        return {}
    found = {f"{reading.name}/goe/{scope}": f.verdict for scope, f in reading.level_statistics.items()}
    return {**found, f"{reading.name}/fit": law_words(reading.laws)}


def _items(reading: Reading) -> Iterator[_Item]:
    full = (_ends, _sums, _outliers, _bulk, _levels, _laws, _groups, _noise, _batch_law, _preconditioner, _run)
    parts = (_certified_ends, _preconditioner, _run) if reading.light else full
    for part in parts:
        for tag, value, reason in part(reading):
            yield _Item(f"{reading.name}/{tag}", value, reason)


def _certified_ends(reading: Reading) -> Iterator[_Item]:
    """All that a light reading says of the spectrum."""
    spectrum = reading.spectrum
    for end, level in (("max", spectrum.lambda_max), ("min", spectrum.lambda_min)):
        if level.certified:
            yield _Item(f"lambda_{end}", level.value, "")
            yield _Item(f"lambda_{end}_residual", level.residual, "")
        elif end == "max":
            yield _Item("lambda_max", None, f"not certified within the {spectrum.products} products of a light reading")
    for side, levels in (("top", spectrum.top), ("bottom", spectrum.bottom)):
        for i, level in enumerate(levels[:TOP], start=1):
            yield _Item(f"{side}/{i}", level.value, "")


def _ends(reading: Reading) -> Iterator[_Item]:
    spectrum = reading.spectrum
    for end, level in (("max", spectrum.lambda_max), ("min", spectrum.lambda_min)):
        yield _Item(f"lambda_{end}", level.value, "")
        yield _Item(f"lambda_{end}_residual", level.residual, "")
    for side, levels in (("top", spectrum.top), ("bottom", spectrum.bottom)):
        for i, level in enumerate(levels[:TOP], start=1):
            yield _Item(f"{side}/{i}", level.value, "")
        if len(levels) < TOP:
            reason = f"only {len(levels)} eigenvalues are certified at this end; more Lanczos steps certify more"
            yield _Item(f"{side}/{len(levels) + 1}", None, reason)


def _sums(reading: Reading) -> Iterator[_Item]:
    for tag, estimate in (("trace", reading.spectrum.trace), ("frobenius", reading.spectrum.frobenius)):
        yield _Item(tag, estimate.mean, "")
        yield _Item(f"{tag}_stderr", estimate.stderr, "")


def _outliers(reading: Reading) -> Iterator[_Item]:
    for side, outliers in (("high", reading.spectrum.outliers.high), ("low", reading.spectrum.outliers.low)):
        yield _Item(f"outliers/count_{side}", outliers.count, outliers.verdict)
        for tag in ("gap_index", "gap_ratio", "gap_spacings"):
            yield _Item(
                f"outliers/{tag}_{side}", getattr(outliers, tag), "no certified eigenvalues to find a gap among"
            )


def _bulk(reading: Reading) -> Iterator[_Item]:
    spectrum = reading.spectrum
    for side, edge, outliers in (
        ("low", spectrum.bulk_edges.low, spectrum.outliers.low),
        ("high", spectrum.bulk_edges.high, spectrum.outliers.high),
    ):
        reason = (
            "the largest eigenvalue of the bulk isn't certified" if outliers.count is not None else outliers.verdict
        )
        yield _Item(f"bulk_edge_{side}", edge, reason)
    for tag, p in (("q99", 0.99), ("q01", 0.01)):
        low, high = spectrum.quantile_bounds(p)
        sharp = _bracket_ratio(low, high, spectrum.zero_width) <= WIDEST_BRACKET
        reason = (
            f"known only to lie between {number(low)} and {number(high)}; it is logged once the bounds' ratio is at "
            f"most {WIDEST_BRACKET}, and more Lanczos steps narrow them"
        )
        yield _Item(tag, spectrum.quantile(p) if sharp else None, reason)
        if sharp:
            yield _Item(f"{tag}_low", low, "")
            yield _Item(f"{tag}_high", high, "")
    for tag in ("zero_mass", "negative_mass"):
        low, high = getattr(spectrum, f"{tag}_bounds")
        yield _Item(tag, getattr(spectrum, tag), "")
        yield _Item(f"{tag}_low", low, "")
        yield _Item(f"{tag}_high", high, "")
    yield _Item("negative_mass_stderr", spectrum.negative_mass_stderr, "")
    cumulants = spectrum.free_cumulants()
    for tag, estimate in (("free_skew", cumulants.skew), ("free_kurtosis", cumulants.kurtosis)):
        for suffix, value in (("", estimate.mean), ("_stderr", estimate.stderr)):
            yield _Item(f"{tag}{suffix}", None if math.isnan(value) else value, "the bulk has no width")


def _levels(reading: Reading) -> Iterator[_Item]:
    """Level statistics of every scope; z is the distance from the GOE's ratio in standard errors."""
    for scope, found in reading.level_statistics.items():
        tag = f"goe/{scope}/spacing_ratio"
        yield _Item(tag, found.spacing_ratio, found.verdict)
        yield _Item(f"{tag}_stderr", found.stderr, found.verdict)
        yield _Item(f"{tag}_z", found.z_goe, found.verdict)
        yield _Item(f"{tag}_z_poisson", found.z_poisson, found.verdict)
        reason = next((note for note in found.notes if note.startswith("no p-value")), found.verdict)
        yield _Item(f"{tag}_p_value", found.p_value, reason)
        yield _Item(f"{tag}_levels", found.levels, "")
        yield _Item(f"goe/{scope}/dropped", found.dropped, "")


def _laws(reading: Reading) -> Iterator[_Item]:
    """Distance of the bulk to the nearest member of every family, in standard deviations of the bulk."""
    for fit in reading.laws.fits:
        tag = f"fit/{law_tag(type(fit.law).__name__)}"
        yield _Item(tag, fit.distance, "")
        yield _Item(f"{tag}_stderr", fit.stderr, "its error can't be had")
        yield _Item(f"{tag}_floors", fit.relative, "the distance has no floor")
    for name, reason in reading.laws.refused:
        yield _Item(f"fit/{law_tag(name)}", None, f"no fit: {reason}")


def _groups(reading: Reading) -> Iterator[_Item]:
    """What a group of parameters has of its own."""
    for group, spectrum in reading.blocks.items():
        for end, level in (("max", spectrum.lambda_max), ("min", spectrum.lambda_min)):
            yield _Item(f"blocks/{group}/lambda_{end}", level.value, "")
            yield _Item(f"blocks/{group}/lambda_{end}_residual", level.residual, "")
        yield _Item(f"blocks/{group}/trace", spectrum.trace.mean, "")
        yield _Item(f"blocks/{group}/trace_stderr", spectrum.trace.stderr, "")
        for side, outliers in (("high", spectrum.outliers.high), ("low", spectrum.outliers.low)):
            yield _Item(f"blocks/{group}/outliers_{side}", outliers.count, outliers.verdict)


def _noise(reading: Reading) -> Iterator[_Item]:
    """The noise of one training batch's curvature, and what the local law makes of it."""
    noise, cleaned = reading.noise, reading.cleaned_outliers
    if noise is None or cleaned is None:  # not asked for, or a note says why
        return
    yield _Item("noise_scale", noise.mean, "")
    yield _Item("noise_edge", noise.edge, "")
    if noise.stderr is not None:
        yield _Item("noise_scale_stderr", noise.stderr, "")
        yield _Item("noise_edge_stderr", 2 * noise.stderr, "")
    yield _Item("anisotropy", noise.anisotropy, "no eigenvalue is certified whose direction's noise could be compared")
    if noise.anisotropy_stderr is not None:
        yield _Item("anisotropy_stderr", noise.anisotropy_stderr, "")
    gap = reading.wigner_gap()
    words = "no outlier is told from the noise, or its own noise wasn't measured"
    if gap == math.inf:
        gap, words = (
            None,
            "the noise in the outliers' directions is larger than they are: the local law can't be trusted",
        )
    yield _Item("wigner_gap", gap, words)
    try:
        damping, error, reason = reading.local_law_damping(), reading.local_law_damping_error(), ""
    except ValueError as refused:
        damping, error, reason = None, math.nan, str(refused)
    yield _Item("local_law_damping", damping, reason)
    if damping is not None:
        reason = "the damping is the smallest one above the bulk's edge, whose error isn't known"
        yield _Item("local_law_damping_stderr", None if math.isnan(error) else error, reason)
    for i, (curvature, error) in enumerate(zip(cleaned.curvature[:TOP], cleaned.stderr, strict=False), start=1):
        told = not math.isnan(curvature)
        yield _Item(f"cleaned/{i}", curvature if told else None, "it can't be told from noise")
        if told:
            yield _Item(f"cleaned/{i}_stderr", error, "")


def _batch_law(reading: Reading) -> Iterator[_Item]:
    """How the outliers grow as batches shrink."""
    law = reading.batch_law
    if law is None:  # not asked for, or a note says why
        return
    for i, fit in enumerate(law.fits, start=1):
        told = tells_exponent(fit)
        r_squared = Estimate(fit.r_squared, fit.r_squared_stderr)
        no_noise = "the noise in all directions wasn't measured, which the outlier's is compared with"
        for tag, estimate, reason in (
            ("theta", fit.theta[0], ""),
            ("alpha", fit.alpha, ""),
            ("exponent", fit.exponent if told else None, "the outlier's growth doesn't tell it"),
            ("r_squared", r_squared, ""),
            ("anisotropy", fit.anisotropy, no_noise),
        ):
            yield _Item(f"batch_law/{i}/{tag}", None if estimate is None else estimate.mean, reason)
            if estimate is not None:
                yield _Item(f"batch_law/{i}/{tag}_stderr", estimate.stderr, "")


def _preconditioner(reading: Reading) -> Iterator[_Item]:
    for tag, value in reading.preconditioner.items():
        yield _Item(f"preconditioner/{tag}", value, "")


def _bracket_ratio(low: float, high: float, zero_width: float) -> float:
    """Ratio of the bounds' magnitudes; 1 where both are zero to rounding, infinite where they differ in sign."""
    if low == high or max(abs(low), abs(high)) <= zero_width:
        return 1.0
    if low * high <= 0.0:
        return math.inf
    small, large = sorted((abs(low), abs(high)))
    return large / small


def _edge_of_stability(reading: Reading) -> Iterator[_Item]:
    """Of the optimizer in whose metric the spectrum is."""
    if reading.preconditioned is None:
        return
    yield _Item("preconditioned/limit", reading.stability_limit, "every learning rate is 0")
    sharpness = reading.sharpness_over_limit
    if sharpness is not None:  # else the limit says why, or, in a light reading, lambda_max does
        yield _Item("preconditioned/sharpness_over_limit", sharpness.value, "")
        yield _Item("preconditioned/sharpness_over_limit_residual", sharpness.residual, "")


def _run(reading: Reading) -> Iterator[_Item]:
    learning_rate = reading.learning_rate
    # Gradient descent's stability limit speaks of the loss's curvature; the gradients' covariance isn't that.
    curvature = reading.curvature != "gradient_covariance" and reading.preconditioned is None
    if reading.preconditioned is not None:
        reason = "the limit 2 is one of the plain coordinates; preconditioned/limit is that of the optimizer's metric"
    elif not curvature:
        reason = "the limit 2 holds for the curvature of the loss, not for the gradients' covariance"
    elif learning_rate is None:
        reason = "no learning rate was found"
    else:
        reason = "the learning rate is 0"
    sharpness = reading.sharpness_times_lr if curvature else None
    if not reading.light or reading.spectrum.lambda_max.certified:
        yield _Item("sharpness_times_lr", sharpness, reason)
    yield _Item("two_over_lr", 2.0 / learning_rate if curvature and learning_rate else None, reason)
    yield from _edge_of_stability(reading)
    yield _Item("probe_seconds", reading.seconds, "")
    yield _Item("overhead", reading.overhead, "too few steps of the training were timed so far for a share of its time")
    yield _Item("products", reading.spectrum.products, "")
    for tag in ("symmetry_error", "repeat_error"):
        if getattr(reading, tag) is not None:  # tested once, which needs no sentence later
            yield _Item(tag, getattr(reading, tag), "")
    if reading.product != "exact":  # else there is no such number, which needs no sentence
        yield _Item("product_error", reading.product_error, "not measured at this reading")
