"""Level statistics of exact spectra: one spectrum, or several of one block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.levels import reference
from lightning_rmt.levels.arguments import spectra_from
from lightning_rmt.levels.cut import SHORTEST_RUN, Cut, cut_levels
from lightning_rmt.levels.dependence import combine_p_values, effective_number, index_correlation
from lightning_rmt.levels.long_range import number_variance, rigidity
from lightning_rmt.levels.spacings import (
    GOE_RATIO,
    GOE_RATIO_SD,
    POISSON_RATIO,
    POISSON_RATIO_SD,
    anderson_darling,
    brody_exponent,
    ratio_variance,
    spacing_ratios,
)
from lightning_rmt.levels.unfolding import (
    SHORTEST_OF_SEVERAL,
    WIDE,
    decades,
    largest_unevenness,
    long_enough,
    unevenness,
    unfold,
    unfold_trend,
    without_zero,
)
from lightning_rmt.levels.verdict import (
    FEWEST_LEVELS,
    LARGEST_DEGENERATE,
    Evidence,
    VerdictKind,
    detectable_difference,
    insufficient,
    verdict,
)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class LevelStatistics:
    """How neighbouring eigenvalues are spaced. A number that can't be had honestly is None, and ``notes`` say why.

    Attributes:
        spacing_ratio: mean of ``min(s, s') / max(s, s')`` over neighbouring spacings: .5307 for large GOE matrices, .3863
            for independent levels.
        stderr: its standard error as estimated from these ratios, their correlation with their neighbours and between
            spectra included.
        z_goe: ``(spacing_ratio - .5307) / (.308 / sqrt(m))``, m the effective number of ratios; None below 50 levels.
            Where the density varies over four decades GOE levels have -.57, -.34 and -.16 on average for k = 50, 100 and
            400 (power law, 400 spectra each): neighbouring spacings aren't of one mean there.
        z_poisson: ``(spacing_ratio - .3863) / (.320 / sqrt(m))``.
        anderson_darling: distance of the unfolded spacings from Wigner's surmise; the median over several spectra.
        p_value: probability of such a distance or more for GOE levels that went through the same procedure, simulated;
            between 1e-4, which stands for "p < 1e-4", and 1. Several spectra: Cauchy combination, which sees less of a
            small difference that all of them share than ``brody`` does (28 batches of a softmax regression: p = .04, and
            an exponent of .844 where GOE has .958 +- .014). None where the density is too uneven to be unfolded, with the
            reason in ``notes``; so then are the references of ``brody``, and what reaches over many spacings.
        brody: Brody's exponent by maximum likelihood. GOE has .957, not 1; independent levels 0.
        brody_goe: mean and standard deviation of ``brody`` for as many GOE levels.
        brody_poisson: the same for independent levels.
        spacing_variance: variance of the unfolded spacings (mean 1): .286 for GOE, 1 for independent levels.
        number_variance: variance of the number of levels in 3 and in 10 mean spacings, from 400 levels in a run on: .67 and
            .91 for GOE. The second is the most sensitive of all to an unfolding that doesn't fit: 1.3 for GOE levels in
            three heaps over six decades.
        rigidity: Delta_3 over 15 mean spacings, from 400 levels in a run on: .274 for GOE, 1 for independent levels.
        levels: levels kept, over all spectra.
        spectra: spectra pooled.
        outliers: eigenvalues left out since they stand apart at either end, by the rule of `Spectrum.outliers`.
        dropped: levels left out: at zero, or where neighbours are too near for the noise.
        unused: levels left out because what was dropped leaves them in runs of fewer than 20.
        degenerate: levels collapsed into a neighbour.
        noise_to_spacing: how far noise moves a level, as a share of the median spacing kept (the worst spectrum).
        correlation: between the ratios of the same rank in different spectra, from 0 to 1.
        effective_ratios: independent ratios that are worth as much as these.
        detectable: smallest difference of the ratio from GOE's that is found at p < .01 in 95 % of the cases.
        source: ``"exact"``: whole spectra; ``"edge_high"``, ``"edge_low"``: certified levels from one end.
        verdict_kind: see `VerdictKind`.
        verdict: one sentence for the user, with its numbers.
        notes: sentences for the user: what was left out, and why.
    """

    spacing_ratio: float | None
    stderr: float | None
    z_goe: float | None
    z_poisson: float | None
    anderson_darling: float | None
    p_value: float | None
    brody: float | None
    brody_goe: tuple[float, float] | None
    brody_poisson: tuple[float, float] | None
    spacing_variance: float | None
    number_variance: tuple[float, float] | None
    rigidity: float | None
    levels: int
    spectra: int
    outliers: int
    dropped: int
    unused: int
    degenerate: int
    noise_to_spacing: float | None
    correlation: float
    effective_ratios: float
    detectable: float | None
    source: str
    verdict_kind: VerdictKind
    verdict: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, strings and lists, for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LevelStatistics:
        """Builds the statistics from what `to_dict` gave; unknown members are ignored.

        Raises:
            ValueError: members are missing.
        """
        known = {f.name for f in fields(cls)}
        missing = known - {"notes"} - set(plain)
        if missing:
            raise ValueError(f"these are not saved level statistics: {', '.join(sorted(missing))} missing")
        members: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in plain.items() if key in known
        }
        return cls(**members)


def level_statistics(
    eigenvalues: ArrayLike | Sequence[ArrayLike],
    *,
    noise: float | None = None,
    size: int | None = None,
    norm: float | None = None,
    keep_outliers: bool = False,
    source: str = "exact",
) -> LevelStatistics:
    """How the eigenvalues of a symmetric matrix are spaced: as GOE levels, as independent ones, or otherwise.

    The eigenvalues have to be *all* eigenvalues in some interval, exact: of a whole matrix, or of a coordinate block such
    as one layer. What can't be detected here: random projections and sketches ``Q' H Q`` (their levels are GOE for every
    H), a spectrum thinned out, eigenvalues that were computed in float32 and stored in float64 (pass ``noise`` then), and
    Ritz values in a bare array (one run's read as more regular than GOE, those of several pooled as no repulsion).

    Levels that noise could have arranged are left out first (`cut_levels`), and no spacing reaches across the hole.
    Shifting the spectrum changes which levels are near zero; scaling changes nothing.

    Args:
        eigenvalues: ascending, shape (n,); or several spectra of one block: shape (B, n), or a sequence of vectors.
        noise: norm of the error of the operator or its products, in the eigenvalues' units, as measured. None: nothing but
            the rounding of ``eigvalsh`` in the dtype of the array.
        size: dimension of the operator, where these aren't all eigenvalues.
        norm: its spectral norm, likewise; where a level is larger, that is taken.
        keep_outliers: don't look for outliers: the caller has removed them, or wants them in.
        source: kept in the result.

    Raises:
        TypeError: a `Spectrum` or other Ritz values, complex numbers, or no numbers.
        ValueError: a matrix, or values that aren't ascending or finite; a negative noise or norm; a size below the number
            of eigenvalues.

    Example:
        >>> levels = np.linalg.eigvalsh((lambda a: a + a.T)(np.random.default_rng(0).normal(size=(400, 400))))
        >>> level_statistics(levels).verdict_kind
        'repel'
    """
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is a norm, finite and not negative, got {noise}")
    if norm is not None and not (math.isfinite(norm) and norm >= 0):
        raise ValueError(f"norm is finite and not negative, got {norm}")
    spectra, eps = spectra_from(eigenvalues)
    if size is not None and size < max(levels.size for levels in spectra):
        most = max(levels.size for levels in spectra)
        raise ValueError(f"size is the dimension of the whole operator, got {size} with {most} eigenvalues")
    cuts = [cut_levels(levels, noise or 0.0, eps, size, norm, keep_outliers) for levels in spectra]
    ratios = [[spacing_ratios(run.levels) for run in cut.runs] for cut in cuts]
    used = [np.concatenate(parts) for parts in ratios if parts]
    ranks = [np.concatenate([run.ranks[1:-1] for run in cut.runs]) for cut in cuts if cut.runs]
    correlation = index_correlation(used, ranks)
    effective = effective_number([part.size for part in used], correlation)
    levels, degenerate = sum(cut.kept for cut in cuts), sum(cut.degenerate for cut in cuts)
    notes = _notes(cuts)

    ratio = stderr = None
    if effective > 0:
        ratio = float(np.concatenate(used).mean())
        stderr = math.sqrt(ratio_variance([part for parts in ratios for part in parts]) / effective)

    numbers: dict[str, Any] = {}
    kind: VerdictKind = "insufficient"
    ratios_in_all = sum(part.size for part in used)
    worth = levels * effective / ratios_in_all if ratios_in_all else 0.0  # in independent levels
    if degenerate > LARGEST_DEGENERATE * max(levels, 1) and levels >= FEWEST_LEVELS:
        kind = "degenerate"
        words = f"no statistics: {degenerate} of {levels + degenerate} levels coincide with a neighbour (2 % allowed)"
        ratio = stderr = None
    elif worth < FEWEST_LEVELS - 0.5 or ratio is None or stderr is None:
        words = insufficient(levels, round(worth) if correlation > 0 else levels)
    else:
        z_goe = (ratio - GOE_RATIO) / (GOE_RATIO_SD / math.sqrt(effective))
        z_poisson = (ratio - POISSON_RATIO) / (POISSON_RATIO_SD / math.sqrt(effective))
        numbers, more = _distribution(cuts, effective)
        notes += more
        poisson = numbers.get("brody_poisson")
        evidence = Evidence(
            spacing_ratio=ratio,
            stderr=stderr,
            z_goe=z_goe,
            z_poisson=z_poisson,
            brody_z_poisson=None if poisson is None else (numbers["brody"] - poisson[0]) / poisson[1],
            p_value=numbers.get("p_value"),
            levels=levels,
            spectra=len(spectra),
            effective_ratios=effective,
            brody=numbers.get("brody"),
            brody_goe=numbers.get("brody_goe"),
            outliers_counted=all(cut.outliers_counted for cut in cuts),
        )
        kind, words = verdict(evidence)
        numbers |= {"z_goe": z_goe, "z_poisson": z_poisson, "detectable": detectable_difference(effective)}
    shares = [cut.noise_to_spacing for cut in cuts if cut.noise_to_spacing is not None]
    absent = dict.fromkeys(f.name for f in fields(LevelStatistics))
    values: dict[str, Any] = {
        **absent,
        **numbers,
        "spacing_ratio": ratio,
        "stderr": stderr,
        "levels": levels,
        "spectra": len(spectra),
        "outliers": sum(cut.outliers for cut in cuts),
        "dropped": sum(cut.zeros + cut.crowded for cut in cuts),
        "unused": sum(cut.unused for cut in cuts),
        "degenerate": degenerate,
        "noise_to_spacing": max(shares, default=None),
        "correlation": correlation,
        "effective_ratios": effective,
        "source": source,
        "verdict_kind": kind,
        "verdict": words,
        "notes": notes,
    }
    return LevelStatistics(**values)


def _notes(cuts: Sequence[Cut]) -> tuple[str, ...]:
    zeros, crowded = sum(cut.zeros for cut in cuts), sum(cut.crowded for cut in cuts)
    unused, degenerate = sum(cut.unused for cut in cuts), sum(cut.degenerate for cut in cuts)
    notes = []
    if zeros:
        notes.append(f"{zeros} levels within {max(cut.tau for cut in cuts):.2g} of zero dropped: below the noise floor")
    if outliers := sum(cut.outliers for cut in cuts):
        notes.append(f"{outliers} outliers left out: they stand apart, and have no common mean spacing with the rest")
    if crowded:
        notes.append(
            f"{crowded} levels dropped that coincide, or where spacings are below 30 times what noise moves them by"
        )
    if unused:
        notes.append(f"{unused} levels not used: in runs of fewer than {SHORTEST_RUN} between dropped ones")
    if degenerate:
        notes.append(f"{degenerate} levels collapsed into a neighbour that noise can't tell from them")
    return tuple(notes)


def _distribution(cuts: Sequence[Cut], effective: float) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Statistics of the unfolded spacings, and why some are missing."""
    runs = [long_enough(part for run in cut.runs for part in without_zero(run.levels)) for cut in cuts]
    spectra = [(np.concatenate([unfold(run) for run in kept]), sum(run.size for run in kept)) for kept in runs if kept]
    notes = []
    unfolded, kept_levels = sum(k for _, k in spectra), sum(cut.kept for cut in cuts)
    if unfolded < kept_levels:
        notes.append(
            f"{kept_levels - unfolded} levels are in the ratio but not in the distribution of spacings: in one of several "
            f"runs, or on one side of zero, of fewer than {SHORTEST_OF_SEVERAL}"
        )
    if not spectra:
        return {}, tuple(notes)
    everything = np.concatenate([spacings for spacings, _ in spectra])
    distances = [anderson_darling(spacings) for spacings, _ in spectra]
    found: dict[str, Any] = {
        "brody": brody_exponent(everything),
        "spacing_variance": float(everything.var()),
        "anderson_darling": float(np.median(distances)),
    }
    if refusal := _not_unfolded([kept for kept in runs if kept]):
        return found, (*notes, refusal)
    tested = [(distance, k) for distance, (_, k) in zip(distances, spectra, strict=True) if reference.in_table(k)]
    if tested:
        p = combine_p_values([reference.p_value(distance, k) for distance, k in tested])
        found["p_value"] = max(reference.SMALLEST_P, p)
        typical = round(float(np.mean([k for _, k in tested])))
        share = math.sqrt(typical / (effective * unfolded / kept_levels))  # of one spectrum's standard deviation
        for name, key in (("brody", "brody_goe"), ("brody_poisson", "brody_poisson")):
            known = reference.moments(name, typical)
            found[key] = (known.mean, known.sd * share)
    else:
        notes.append(
            f"no p-value: its null is known for {reference.SIZES[0]} to {reference.SIZES[-1]} levels in a spectrum"
        )
    long = [run for kept in runs for run in kept if run.size >= reference.LONG_RANGE_LEVELS]
    if long:
        found |= _long_range(long)
    else:
        notes.append(f"no number variance or rigidity: they need {reference.LONG_RANGE_LEVELS} consecutive levels")
    return found, tuple(notes)


def _not_unfolded(spectra: Sequence[Sequence[Vector]]) -> str | None:
    """Why the unfolded spacings can't be compared with the null, if they can't: typically over the spectra."""
    width = float(np.median([max(decades(run) for run in runs) for runs in spectra]))
    off = float(np.median([unevenness(runs) for runs in spectra]))
    allowed = float(np.median([largest_unevenness(runs) for runs in spectra]))
    if width <= WIDE or off <= allowed:
        return None
    return (
        f"no p-value: the mean spacing varies over {width:.1f} decades, and the fit to it is off by {off:.0%} over 21 "
        f"spacings ({allowed:.0%} allowed), which the unfolding may have done as well as the levels; the ratio needs none"
    )


def _long_range(runs: Sequence[Vector]) -> dict[str, Any]:
    positions = [np.append(0.0, np.cumsum(unfold_trend(run))) for run in runs]
    lengths = reference.NUMBER_VARIANCE_LENGTHS
    variances = [[number_variance(each, length) for length in lengths] for each in positions]
    stiff = [rigidity(each, reference.RIGIDITY_LENGTH) for each in positions]
    return {"number_variance": tuple(np.mean(variances, axis=0).tolist()), "rigidity": float(np.mean(stiff))}
