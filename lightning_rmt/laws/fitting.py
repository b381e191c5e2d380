"""Fits a family of laws to a measured spectrum by its free cumulants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_rmt.laws.bulk import NoFitError
from lightning_rmt.laws.cumulants import Frame, MeasuredMoments, measured_moments
from lightning_rmt.laws.distance import Comparison, comparison, law_distance, resolution_floor
from lightning_rmt.laws.exclusion import Bounds, exclusion_z, spectrum_bounds
from lightning_rmt.laws.fit import EXCLUDED, Fit
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.parameters import parameters_of, with_parameter
from lightning_rmt.spectra.bulk import Bulk
from lightning_rmt.spectra.moments import Estimate
from lightning_rmt.spectra.spectrum import Spectrum

#: Derivatives by the measured values are differences over so many standard errors to either side.
NUDGE = 0.1
#: Those of the law by its parameters are over a whole one: beyond an edge a law changes with the next edge only.
LAW_NUDGE = 1.0
#: Shares of a parameter at which members on the way to its limit at zero are tried.
LIMIT_SHARES = (0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03, 0.01)
#: Points at which the sampling error of a distribution function is taken, at most.
POINTS = 150


@dataclass(frozen=True, eq=False)
class Measured:
    """A spectrum and what all fits to it share.

    Raises:
        NoFitError: on first use, where the bulk can't be fitted by any law.
    """

    spectrum: Spectrum

    @cached_property
    def moments(self) -> MeasuredMoments:
        """Of the bulk."""
        return measured_moments(self.spectrum.bulk)

    @cached_property
    def bounds(self) -> Bounds:
        """On the distribution function."""
        return spectrum_bounds(self.spectrum)


def fit_law(family: type[Law], measured: Measured) -> Fit:
    """Fits one family: the member with the bulk's free cumulants, its distance, and all errors.

    Errors are those over start vectors, by the delta method: the parameters and the distance are functions of means over
    the eigenvalues, whose covariance one probe knows (``Bulk.covariance``). How the matrix itself would differ in another
    draw of its law isn't in them; for matrices with many independent entries that is less, of order 1/n.

    Args:
        family: the class of laws.
        measured: what is fitted.

    Raises:
        NoFitError: no member of the family has these cumulants, or the bulk can't be fitted by any law.
    """
    moments = measured.moments
    bulk = moments.bulk
    law = family.from_bulk(moments.moments())
    try:
        at = comparison(law, bulk)
        distance = law_distance(law, bulk, at)
    except ValueError as error:  # a member with a spike that can't be integrated
        raise NoFitError(str(error)) from error
    nodes, weights = bulk.pooled(at.zeros)
    frame = Frame(float(weights @ nodes), math.sqrt(float(weights @ (nodes - weights @ nodes) ** 2)))
    distance /= frame.unit

    values = parameters_of(law)
    jacobian = _jacobian(family, law, moments)
    covariance = bulk.covariance(lambda x: jacobian @ moments.influences(x))
    errors = np.sqrt(np.diag(covariance).clip(0))
    responses = [_responses(law, name, error, at, frame) for name, error in zip(values, errors, strict=True)]

    middle = (at.x[:-1] + at.x[1:]) / 2
    moved = np.array([np.interp(measured.bounds.x, middle, response) for response, _ in responses])
    uncertain = np.sqrt(np.einsum("ix,ij,jx->x", moved, np.nan_to_num(covariance), moved).clip(0))

    z = exclusion_z(law, bulk, measured.bounds, uncertain)
    if z > EXCLUDED:
        z = min([z, *_towards_limits(law, covariance, moved, bulk, measured.bounds)])

    left = _sampling_left(moments, at, jacobian, [response for response, _ in responses])
    stderr = _distance_error(law, moments, at, distance, frame, jacobian, [response for response, _ in responses])
    return Fit(
        law=law,
        distance=distance,
        stderr=stderr,
        floor=resolution_floor(bulk, at.zeros, left) / frame.unit,
        exclusion_z=z,
        kurtosis_z=_kurtosis_z(law, moments, at, frame, jacobian, np.array([r[1] for r in responses])),
        removed_outliers=int(bulk.outliers.size),
        removed_outlier_mass=bulk.removed_mass,
        removed_zero_mass=0.0 if at.zeros else bulk.zero_mass,
        parameters={name: Estimate(v, float(e)) for (name, v), e in zip(values.items(), errors, strict=True)},
        steps=max(run.steps for run in measured.spectrum.runs),
        size=measured.spectrum.size,
        probes=len(measured.spectrum.runs),
    )


def _jacobian(family: type[Law], law: Law, moments: MeasuredMoments) -> NDArray[np.float64]:
    """How the parameters move with the measured values, shape (parameters, 5); NaN where the family ends at both sides."""
    names = list(parameters_of(law))
    steps = NUDGE * np.sqrt(np.diag(moments.bulk.covariance(moments.influences)).clip(0))
    jacobian = np.zeros((len(names), steps.size))
    for column, step in enumerate(steps):
        if step == 0:
            continue
        ends = []
        for sign in (-1, 0, 1):
            values = moments.values.copy()
            values[column] += sign * step
            try:
                found = parameters_of(family.from_bulk(moments.moments(values)))
            except ValueError:
                continue
            if list(found) == names:
                ends.append((sign * step, np.array(list(found.values()))))
        jacobian[:, column] = np.nan
        if len(ends) > 1:
            (first, low), (last, high) = ends[0], ends[-1]
            jacobian[:, column] = (high - low) / (last - first)
    return jacobian


def _responses(law: Law, name: str, error: float, at: Comparison, frame: Frame) -> tuple[NDArray[np.float64], float]:
    """How the law's distribution function on the cells and its scaled fourth free cumulant move with a parameter."""
    value = parameters_of(law)[name]
    ends = []
    for sign in (-1, 0, 1):
        if not error > 0:  # not random, or unknown
            break
        try:
            near = with_parameter(law, name, value + sign * LAW_NUDGE * error)
            shares = np.mean(at.law_at(near), axis=0)
        except ValueError:
            continue
        if (near.atom > 0) == (law.atom > 0):
            ends.append((sign * LAW_NUDGE * error, shares, _fourth(near, frame)))
    if len(ends) < 2:
        return np.zeros(at.cells.size), 0.0
    (first, low, low4), (last, high, high4) = ends[0], ends[-1]
    return (high - low) / (last - first), (high4 - low4) / (last - first)


def _towards_limits(
    law: Law,
    covariance: NDArray[np.float64],
    moved: NDArray[np.float64],
    bulk: Bulk,
    bounds: Bounds,
) -> list[float]:
    """Exclusion of the members on the way to a parameter's limit at zero, the way being paid for like any other move.

    A law moves with such a parameter like its root, so that no derivative at the fitted member says where the others are:
    the zeros of a covariance part are smeared over ``sqrt(8 energy)`` by the Wigner part. The other parameters
    follow as their errors are correlated.
    """
    found = []
    values = parameters_of(law)
    for place, name in enumerate(values):
        variance = covariance[place, place]
        if name not in law.limits or not (np.isfinite(covariance).all() and variance > 0):
            continue
        along = covariance[place] / variance
        rest = covariance - np.outer(along, along) * variance
        errors = np.sqrt(np.einsum("ix,ij,jx->x", moved, rest, moved).clip(0))
        for share in LIMIT_SHARES:
            step = values[name] * (share - 1)
            if step**2 > EXCLUDED**2 * variance:
                continue
            try:
                member: Law = law
                for (other, value), slope in zip(values.items(), along, strict=True):
                    member = with_parameter(member, other, value + slope * step)
                found.append(math.hypot(exclusion_z(member, bulk, bounds, errors), step / math.sqrt(variance)))
            except ValueError:
                continue
    return found


def _distance_error(
    law: Law,
    moments: MeasuredMoments,
    at: Comparison,
    distance: float,
    frame: Frame,
    jacobian: NDArray[np.float64],
    responses: list[NDArray[np.float64]],
) -> float:
    """Standard error of the distance, also over several probes: the spread of theirs isn't that of their mean's.

    The distance is ``int |F - F_law| / sd``. Mass at lambda moves F beyond lambda by itself, F_law through
    the parameters, and the standard deviation; where F crosses F_law the sign stays as it is.
    """
    bulk = moments.bulk
    step = at.step_at(*bulk.pooled(at.zeros))
    signed = np.sign(step - np.mean(at.law_at(law), axis=0)) * at.cells
    beyond = np.append(np.cumsum(signed[::-1])[::-1], 0.0)
    through = np.array([signed @ response for response in responses]) @ np.nan_to_num(jacobian)

    def influence(x: NDArray[np.float64]) -> NDArray[np.float64]:
        own = np.interp(x, at.x, beyond) / frame.unit - distance / 2 * ((x - frame.center) / frame.unit) ** 2
        own = own if at.zeros else np.where(bulk.is_zero(x), 0.0, own / (1 - bulk.zero_mass))
        return np.asarray(own - through @ moments.influences(x) / frame.unit)[None, :]

    return math.sqrt(max(float(bulk.covariance(influence)[0, 0]), 0.0))


def _sampling_left(
    moments: MeasuredMoments, at: Comparison, jacobian: NDArray[np.float64], responses: list[NDArray[np.float64]]
) -> float:
    """Share of the sampling error of the distribution function that a fit leaves, by the delta method.

    About 0.6 where mean and variance are fitted, 0.9 where the mean is given, 1 where the fit makes the error larger: a
    law whose parameters are uncertain isn't forgiven a distance for it.
    """
    bulk = moments.bulk
    places = np.unique(np.linspace(0, at.cells.size - 1, min(POINTS, at.cells.size)).round().astype(int))
    x, lengths = at.x[places], np.diff(at.x[np.append(places, at.cells.size)])
    moved = np.array([response[places] for response in responses]).T @ np.nan_to_num(jacobian)

    def own(y: NDArray[np.float64]) -> NDArray[np.float64]:
        below = (y <= x[:, None]).astype(np.float64)
        if at.zeros:
            return below
        zero, share = bulk.is_zero(y), bulk.mean(lambda z: (z <= x[:, None]) & ~bulk.is_zero(z))
        return np.where(zero, 0.0, (below - share[:, None] / (1 - bulk.zero_mass)) / (1 - bulk.zero_mass))

    def error(functions: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> float:
        return float(np.sqrt(np.diag(bulk.covariance(functions)).clip(0)) @ lengths)

    whole = error(own)
    return min(1.0, error(lambda y: own(y) - moved @ moments.influences(y)) / whole) if whole > 0 else 1.0


def _fourth(law: Law, frame: Frame) -> float:
    """Fourth free cumulant of the measure that a law is compared as, in units of the bulk's standard deviation."""
    x, weights = law._quadrature
    powers = frame.powers(x) @ weights + law.atom * frame.powers(np.array([law.atom_location]))[:, 0]
    return frame.cumulants(powers).k4 / frame.unit**4


def _kurtosis_z(
    law: Law,
    moments: MeasuredMoments,
    at: Comparison,
    frame: Frame,
    jacobian: NDArray[np.float64],
    responses: NDArray[np.float64],
) -> float | None:
    """Fourth free cumulant of the law less that of the bulk, in standard errors of the difference."""

    def measured(values: NDArray[np.float64]) -> float:
        of = moments.moments(values)
        return (of.whole if at.zeros else of.continuous).k4 / frame.unit**4

    steps = NUDGE * np.sqrt(np.diag(moments.bulk.covariance(moments.influences)).clip(0))
    gradient = np.zeros(steps.size)
    for column in np.flatnonzero(steps):
        nudge = np.zeros(steps.size)
        nudge[column] = steps[column]
        difference = measured(moments.values + nudge) - measured(moments.values - nudge)
        gradient[column] = difference / (2 * steps[column])
    total = responses @ jacobian - gradient
    both = moments.bulk.covariance(lambda x: np.stack([gradient, total]) @ moments.influences(x))
    own, difference = np.sqrt(np.diag(both).clip(0))
    # a law that was fitted to it has no error in the difference but that of the derivatives
    if not difference > 1e-3 * own:
        return None
    return float((_fourth(law, frame) - measured(moments.values)) / difference)
