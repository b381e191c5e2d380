"""The light record of a reading that a run keeps in memory and in its checkpoints: plain Python values only.

Checkpoints are read back with ``weights_only=True``, which refuses NumPy arrays and scalars (even ``np.float64``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.reading import Reading
from lightning_rmt.report.scalars import TOP
from lightning_rmt.spectra.moments import Estimate
from lightning_rmt.spectra.spectrum import Spectrum

BINS_PER_DECADE = 12
DECADES = 5
"""Decades of eigenvalue that an entry resolves below its largest one; the rest is pooled into its bin at zero."""
NO_MASS = -12.0
"""What stands for the log10 of a mass of 1e-12 or less, since JSON has no -inf."""


def bin_edge(k: int) -> float:
    """Lower edge of the k-th bin on the positive axis; the same for all readings of all runs, so that entries align."""
    return float(10.0 ** (k / BINS_PER_DECADE))


@dataclass(frozen=True)
class LogMasses:
    """Mass of the spectral measure per bin of a fixed logarithmic grid, as log10.

    Bin k > 0 spans ``bin_edge(k)`` to ``bin_edge(k + 1)`` in magnitude, on either side of zero.

    Attributes:
        lowest_bin: everything below ``bin_edge(lowest_bin)`` in magnitude is pooled.
        zero: log10 of the pooled mass.
        positive: log10 masses of the bins lowest_bin, lowest_bin + 1, ... of the positive axis.
        negative: those of the negative axis, by rising magnitude.
    """

    lowest_bin: int
    zero: float
    positive: tuple[float, ...]
    negative: tuple[float, ...]

    @classmethod
    def of(cls, spectrum: Spectrum) -> LogMasses:
        """The masses of ``spectrum``, from differences of its CDF."""
        reach = max(abs(spectrum.lambda_max.value), abs(spectrum.lambda_min.value)) or 1.0
        highest = math.floor(math.log10(reach) * BINS_PER_DECADE) + 1
        count = DECADES * BINS_PER_DECADE
        lowest = highest - count
        edges = np.array([bin_edge(lowest + i) for i in range(count + 1)])
        cdf = spectrum.cdf(np.concatenate([-edges[::-1], edges]))
        cdf[0], cdf[-1] = 0.0, 1.0  # the outermost bins keep what smoothing puts beyond them
        masses = np.diff(cdf)
        return cls(
            lowest_bin=lowest,
            zero=_log10(masses[count : count + 1])[0],
            positive=_log10(masses[count + 1 :]),
            negative=_log10(masses[:count][::-1]),
        )

    def scale(self, share: float = 0.3) -> float:
        """Magnitude within which ``share`` of the mass lies, what is pooled at zero left out; a bin's edge.

        An axis that is linear up to here shows the bulk, also where most eigenvalues are zero.
        """
        sides = np.zeros((2, max(len(self.positive), len(self.negative))))
        for side, logs in zip(sides, (self.positive, self.negative), strict=True):
            side[: len(logs)] = [_mass(value) for value in logs]
        upto = np.cumsum(sides.sum(axis=0))
        inside = int(np.searchsorted(upto, share * upto[-1], side="right")) if upto[-1] > 0.0 else 0
        return bin_edge(self.lowest_bin + inside)

    def pooled(self, lowest: int, highest: int) -> NDArray[np.float64]:
        """Masses (not logs) on the bins from -highest to highest, with all below bin ``lowest`` pooled at zero.

        Returns:
            shape (2 * (highest - lowest) + 1,), float64: negative bins from the outermost in, zero, positive bins outwards.
        """
        if lowest < self.lowest_bin:
            raise ValueError(f"this entry pools all bins below {self.lowest_bin}; bin {lowest} can't be had from it")
        sides, zero = [], _mass(self.zero)
        for logs in (self.negative, self.positive):
            mass = np.array([_mass(value) for value in logs])
            inside = lowest - self.lowest_bin
            zero += mass[:inside].sum()
            side = np.zeros(highest - lowest)
            kept = mass[inside : inside + side.size]
            side[: kept.size] = kept
            sides.append(side)
        return np.concatenate([sides[0][::-1], [zero], sides[1]])


@dataclass(frozen=True)
class HistoryEntry:
    """What the pictures over time need of one reading.

    Attributes:
        step: the reading's step.
        learning_rate: None where there is none.
        curvature: ``"hessian"``, ``"ggn"`` or ``"gradient_covariance"``.
        lambda_max: largest Ritz value; None where a light reading didn't certify it.
        lambda_max_residual: an eigenvalue lies within this of it.
        lambda_min: smallest Ritz value; None where a light reading didn't certify it.
        lambda_min_residual: an eigenvalue lies within this of it.
        top: certified eigenvalues from the largest down, at most 40.
        bottom: certified eigenvalues from the smallest up, at most 40.
        outliers_high: outliers above the bulk, None where no count was given.
        outliers_low: outliers below the bulk, None where no count was given.
        bulk_edge_high: None where the bulk has no edge.
        bulk_edge_low: None where the bulk has no edge.
        trace: estimate of the trace, None in a light reading.
        trace_stderr: its standard error, None where it has none.
        seconds: wall-clock time of the probe.
        products: operator products spent.
        masses: the spectral measure on a fixed logarithmic grid, None in a light reading.
        speed: ``"full"`` or ``"light"``.
        free_skew: of the bulk, with its standard error; None in a light reading, or where the bulk has no width.
        free_kurtosis: likewise.
        spacing_ratios: scope, mean spacing ratio and its standard error, where there are any.
        preconditioned: the optimizer in whose metric the eigenvalues are, None for the plain coordinates.
        stability_limit: of lambda_max in that metric; None where there is none.
        sharpness_limit: of lambda_max times the learning rate in the plain coordinates; None where there is none.
    """

    step: int
    learning_rate: float | None
    curvature: str
    lambda_max: float | None
    lambda_max_residual: float | None
    lambda_min: float | None
    lambda_min_residual: float | None
    top: tuple[float, ...]
    bottom: tuple[float, ...]
    outliers_high: int | None
    outliers_low: int | None
    bulk_edge_high: float | None
    bulk_edge_low: float | None
    trace: float | None
    trace_stderr: float | None
    seconds: float
    products: int
    masses: LogMasses | None
    speed: str = "full"
    free_skew: tuple[float, float] | None = None
    free_kurtosis: tuple[float, float] | None = None
    spacing_ratios: tuple[tuple[str, float, float], ...] = ()
    preconditioned: str | None = None
    stability_limit: float | None = None
    sharpness_limit: float | None = 2.0

    @classmethod
    def from_reading(cls, reading: Reading) -> HistoryEntry:
        """The entry of ``reading``."""
        spectrum, full = reading.spectrum, not reading.light
        high = spectrum.outliers.high if full else None
        low = spectrum.outliers.low if full else None
        edges = spectrum.bulk_edges if full else None
        largest = spectrum.lambda_max if full or spectrum.lambda_max.certified else None
        smallest = spectrum.lambda_min if full or spectrum.lambda_min.certified else None
        return cls(
            step=int(reading.step),
            learning_rate=_float(reading.learning_rate),
            curvature=str(reading.curvature),
            lambda_max=None if largest is None else float(largest.value),
            lambda_max_residual=None if largest is None else float(largest.residual),
            lambda_min=None if smallest is None else float(smallest.value),
            lambda_min_residual=None if smallest is None else float(smallest.residual),
            top=tuple(float(level.value) for level in spectrum.top[: 4 * TOP]),
            bottom=tuple(float(level.value) for level in spectrum.bottom[: 4 * TOP]),
            outliers_high=None if high is None or high.count is None else int(high.count),
            outliers_low=None if low is None or low.count is None else int(low.count),
            bulk_edge_high=None if edges is None else _float(edges.high),
            bulk_edge_low=None if edges is None else _float(edges.low),
            trace=float(spectrum.trace.mean) if full else None,
            trace_stderr=_float(spectrum.trace.stderr) if full else None,
            seconds=float(reading.seconds),
            products=int(spectrum.products),
            masses=LogMasses.of(spectrum) if full else None,
            speed=reading.speed,
            free_skew=_pair(spectrum.free_cumulants().skew) if full else None,
            free_kurtosis=_pair(spectrum.free_cumulants().kurtosis) if full else None,
            spacing_ratios=tuple(
                (scope, float(found.spacing_ratio), float(found.stderr))
                for scope, found in reading.level_statistics.items()
                if found.spacing_ratio is not None and found.stderr is not None
            ),
            preconditioned=reading.preconditioned,
            stability_limit=_float(reading.stability_limit),
            sharpness_limit=_float(reading.sharpness_limit),
        )

    @property
    def two_over_lr(self) -> float | None:
        """Gradient descent's stability limit, None without a learning rate or where the curvature isn't the loss's."""
        if not self.learning_rate or self.curvature == "gradient_covariance" or self.preconditioned is not None:
            return None
        return 2.0 / self.learning_rate

    @property
    def limit(self) -> float | None:
        """The stability limit of lambda_max for the optimizer in use; None where there is none for these eigenvalues."""
        if self.preconditioned is not None:
            return self.stability_limit
        if self.two_over_lr is None or self.sharpness_limit is None:
            return None
        return 0.5 * self.sharpness_limit * self.two_over_lr

    @property
    def limit_name(self) -> str:
        """What a legend calls it."""
        if self.preconditioned is not None:
            return f"{self.preconditioned}'s limit"
        return f"{self.sharpness_limit or 2.0:.3g}/lr"

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, floats, ints, strings and None: fit for JSON and for a checkpoint."""
        values = asdict(self)
        if self.masses is not None:
            values["masses"] = {key: list(v) if isinstance(v, tuple) else v for key, v in values["masses"].items()}
        values["spacing_ratios"] = [list(entry) for entry in self.spacing_ratios]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HistoryEntry:
        """What `to_dict` gave. Unknown keys, as a later version may write them, are ignored.

        Raises:
            ValueError: a key is missing.
        """
        names = [field.name for field in fields(cls)]
        if missing := [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]:
            raise ValueError(f"not a history entry: {', '.join(missing)} missing")
        known: dict[str, Any] = {name: _as_stored(values[name]) for name in names if name in values}
        if known["masses"] is None:
            return cls(**known)
        masses: dict[str, Any] = {field.name: _as_stored(values["masses"][field.name]) for field in fields(LogMasses)}
        return cls(**{**known, "masses": LogMasses(**masses)})


def _as_stored(value: Any) -> Any:
    return tuple(_as_stored(item) for item in value) if isinstance(value, list) else value


def _pair(estimate: Estimate) -> tuple[float, float] | None:
    mean, error = _float(estimate.mean), _float(estimate.stderr)
    return None if mean is None or error is None else (mean, error)


def _float(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _log10(masses: NDArray[np.float64]) -> tuple[float, ...]:
    # Three decimals (0.2 % of a mass) are far below what a colour shows, and keep the JSON short.
    return tuple(round(float(value), 3) for value in np.log10(np.maximum(masses, 10.0**NO_MASS)))


def _mass(log10: float) -> float:
    return 0.0 if log10 <= NO_MASS else 10.0**log10
