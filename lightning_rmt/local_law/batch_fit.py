"""How outliers grow as batches shrink: the outlier map of batch Hessians, fitted.

For ``H_b = A + s(b) X`` the subordination function places the outlier of an eigenvalue theta of A at
(Baskerville, Keating, Mezzadri, Najnudel and Granziol 2022, arXiv:2205.08601; here to second order in 1/theta)

    lambda(b) = theta + x_b alpha (1/theta + beta / theta^2),    x_b = s(b)^2 = 1/b - 1/N,                        (1)

alpha the variance of the noise of one sample (its second free cumulant) and beta the mean of the bulk of A; ``1/N`` is the
correction for drawing b of N samples without replacement.

*It often fails, and then says so.* Noise of real batches isn't alike in all directions: on a digits network alpha
from (1) was 44 to 59 times the variance that all directions have on average, and the inflation fell like
``b^-.54`` to ``b^-.9`` instead of ``b^-1``. Hence the free exponent, R^2 and the anisotropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.arguments import number, positive
from lightning_rmt.spectra.moments import Estimate

#: Distinct batch sizes that the free exponent needs.
LEAST_SIZES = 3
#: The variance of an outlier over batches is taken as ``x_b`` plus this share of its mean: even the full data set, without
#: any noise, is to have finite weight.
LEAST_VARIANCE = 0.1
#: The free exponent is looked for from here to there. At 0 the map would be a logarithm, far above 1 a step.
EXPONENTS = 0.01, 4.0
#: Evaluations of the model per fit. Outliers that the map fits take some fifty.
EVALUATIONS = 500


@dataclass(frozen=True)
class OutlierBatchFit:
    """The map (1), fitted; errors by the jackknife over batches, or over the groups that they were given in.

    Attributes:
        theta: eigenvalues of the true matrix, one per outlier, in the operator's units.
        alpha: noise variance of one sample along the outliers, in the operator's units squared; negative where outliers
            shrink as the noise grows, which no noise of this kind does.
        beta: mean of the bulk, in the operator's units; with an error of 0 where it was given, or is taken for 0 since a
            single outlier can't tell it.
        exponent: q in ``s(b) = b^-q``, from a second fit in which it is free; 1/2 for independent samples. At an end of
            `EXPONENTS` the outliers don't tell it.
        r_squared: share of the variance that the mean outliers of each batch size have over the sizes, each about its own
            mean, that (1) explains: it judges the map, not the scatter of batches of one size.
        anisotropy: alpha over the noise variance of one sample in all directions; None where that wasn't given.
            Much above 1 the noise is concentrated on the outliers, and isotropic rules underrate it there.
        dataset_size: N.
        r_squared_stderr: standard error of ``r_squared``.
    """

    theta: tuple[Estimate, ...]
    alpha: Estimate
    beta: Estimate
    exponent: Estimate
    r_squared: float
    anisotropy: Estimate | None
    dataset_size: float
    r_squared_stderr: float = math.nan

    def predict(self, batch_sizes: ArrayLike) -> NDArray[np.float64]:
        """Outliers at these batch sizes, shape (sizes, outliers)."""
        x = 1 / np.atleast_1d(np.asarray(batch_sizes, dtype=np.float64)) - 1 / self.dataset_size
        theta = np.array([one.mean for one in self.theta])
        slope = self.alpha.mean * (1 / theta + self.beta.mean / theta**2)
        return np.asarray(theta + x[:, None] * slope)


def outlier_batch_fit(
    batch_sizes: ArrayLike,
    eigenvalues: ArrayLike,
    dataset_size: float = math.inf,
    *,
    sample_noise: float | None = None,
    sample_noise_stderr: float = 0.0,
    bulk_mean: float | None = None,
    groups: ArrayLike | None = None,
) -> OutlierBatchFit:
    """Fits the outlier map to outliers measured at several batch sizes.

    Args:
        batch_sizes: samples per batch, one number per row of ``eigenvalues``; at least three distinct ones. Repeat a size
            for several batches of it.
        eigenvalues: outliers of each batch's matrix, matched by rank, shape (rows, outliers), in the operator's units.
        dataset_size: N, from which the batches are drawn without replacement; infinite where they never repeat.
        sample_noise: noise scale of a single sample in all directions, ``s(b) / sqrt(1/b - 1/N)``; gives the anisotropy.
        sample_noise_stderr: its standard error, independent of the outliers'; part of the anisotropy's.
        bulk_mean: beta, where it is known: the mean of the bulk of a spectrum measured on many samples. Without it, alpha
            and beta have to be told apart by outliers of very different size, and alpha is badly known.
        groups: a label per row. Batches that share samples belong into one group; groups that share none, and are alike in
            their batch sizes, are what the jackknife leaves out one at a time. None: every batch has its own samples.

    Raises:
        ValueError: the shapes don't fit, there are fewer than three batch sizes or no outliers, a number isn't finite, a
            batch is larger than the data set, or an outlier changes its sign between batches.
    """
    sizes, levels = np.asarray(batch_sizes, dtype=np.float64), np.asarray(eigenvalues, dtype=np.float64)
    _check(sizes, levels, dataset_size)
    noise = None if sample_noise is None else positive(sample_noise, "sample_noise")
    known = None if bulk_mean is None else number(bulk_mean, "bulk_mean")
    labels = np.arange(sizes.size) if groups is None else np.asarray(groups)
    if labels.shape != sizes.shape:
        raise ValueError(f"expected one group per row of eigenvalues, got shapes {labels.shape} and {sizes.shape}")

    def estimates(rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        return _Inflation(sizes[rows], levels[rows], dataset_size, known).fit()

    whole = estimates(np.ones(sizes.size, dtype=bool))
    left_out = [labels != label for label in np.unique(labels)]
    errors = np.full(whole.size, math.nan)
    if len(left_out) > 1 and all(np.unique(sizes[rows]).size >= LEAST_SIZES for rows in left_out):
        parts = np.array([estimates(rows) for rows in left_out])
        errors = np.sqrt((len(left_out) - 1) * np.mean((parts - parts.mean(axis=0)) ** 2, axis=0))
    *theta, alpha, beta, exponent, r_squared = (
        Estimate(float(value), float(error)) for value, error in zip(whole, errors, strict=True)
    )
    return OutlierBatchFit(
        theta=tuple(theta),
        alpha=alpha,
        beta=beta,
        exponent=exponent,
        r_squared=r_squared.mean,
        anisotropy=None if noise is None else _ratio(alpha, noise, sample_noise_stderr),
        dataset_size=float(dataset_size),
        r_squared_stderr=r_squared.stderr,
    )


def _ratio(alpha: Estimate, noise: float, error: float) -> Estimate:
    """Alpha over the square of a noise scale, by the delta method."""
    ratio = alpha.mean / noise**2
    return Estimate(ratio, math.hypot(alpha.stderr / noise**2, 2 * ratio * error / noise))


def _check(sizes: NDArray[np.float64], levels: NDArray[np.float64], dataset_size: float) -> None:
    if sizes.ndim != 1 or levels.ndim != 2 or levels.shape[0] != sizes.size or levels.shape[1] == 0:
        raise ValueError(
            "expected one batch size per row of eigenvalues, shapes (rows,) and (rows, outliers), with at least one "
            f"outlier; got {sizes.shape} and {levels.shape}"
        )
    if not (np.isfinite(sizes).all() and np.isfinite(levels).all()):
        raise ValueError("batch sizes and eigenvalues must be finite; leave out batches whose outliers aren't known")
    if not ((sizes >= 1).all() and dataset_size >= sizes.max()):
        raise ValueError(
            f"batch sizes go from 1 to the size of the data set, got {sizes.min():g} to {sizes.max():g} and {dataset_size:g}"
        )
    if np.unique(sizes).size < LEAST_SIZES:
        raise ValueError(
            f"a fit with a free exponent needs {LEAST_SIZES} distinct batch sizes, got {np.unique(sizes).size}: any two "
            "points lie on a curve of this kind"
        )
    if not ((levels > 0).all(axis=0) | (levels < 0).all(axis=0)).all():
        raise ValueError(
            "an outlier has the same sign, and isn't 0, in all batches; leave out those that don't stand apart"
        )


class _Inflation:
    """Least squares for (1) in units of the largest outlier and of the smallest batch's noise."""

    def __init__(
        self, sizes: NDArray[np.float64], levels: NDArray[np.float64], dataset_size: float, beta: float | None
    ) -> None:
        self.unit, self.smallest = float(np.abs(levels).max()), float(sizes.min())
        self.levels, self.count = levels / self.unit, levels.shape[1]
        self.relative, self.whole = sizes / self.smallest, dataset_size / self.smallest
        x = self.growth(0.5)
        self.root_weights = 1 / np.sqrt(x + LEAST_VARIANCE * x.mean())[:, None]
        # one slope tells alpha or beta, not both
        self.beta = 0.0 if beta is None and self.count == 1 else None if beta is None else beta / self.unit

    def growth(self, exponent: float) -> NDArray[np.float64]:
        """``x_b`` with this exponent, in units of the smallest batch's ``b^(-2q)``."""
        exponent = float(np.clip(exponent, *EXPONENTS))
        return np.asarray(self.relative ** (-2 * exponent) - self.whole ** (-2 * exponent))

    def fit(self) -> NDArray[np.float64]:
        """Theta (outliers), alpha, beta, the exponent of a second fit, in the operator's units, and R^2."""
        if self.count == 1:
            fixed, exponent = self._line(0.5)[0], self._exponent()
        else:
            fixed = self._solve(self._start(), 0.5)
            exponent = float(np.clip(self._solve(np.append(fixed, 0.5), None)[-1], *EXPONENTS))
        theta, alpha = fixed[: self.count], fixed[self.count]
        beta = fixed[self.count + 1] / alpha if self.beta is None else self.beta
        units = [alpha * self.unit**2 * self.smallest, beta * self.unit, exponent, self._r_squared(fixed)]
        return np.concatenate([theta * self.unit, units])

    def _line(self, exponent: float) -> tuple[NDArray[np.float64], float]:
        """Theta and alpha of a single outlier with this exponent, and the sum of squares: with beta known, a line in x."""
        x = self.growth(exponent)
        design = np.stack([np.ones(x.size), x], axis=1) * self.root_weights
        (theta, slope), *_ = np.linalg.lstsq(design, self.levels[:, 0] * self.root_weights[:, 0], rcond=None)
        alpha = slope / (1 / theta + (self.beta or 0.0) / theta**2)
        residual = (self.levels[:, 0] - theta - slope * x) * self.root_weights[:, 0]
        return np.array([theta, alpha]), float(residual @ residual)

    def _exponent(self) -> float:
        """The best one of a single outlier: all else follows from it in closed form."""
        from scipy.optimize import minimize_scalar  # SciPy is slow to import

        grid = np.geomspace(*EXPONENTS, 25)
        best = int(np.argmin([self._line(q)[1] for q in grid]))
        if best in (0, grid.size - 1):
            return float(grid[best])
        found = minimize_scalar(
            lambda q: self._line(q)[1],
            bounds=(grid[best - 1], grid[best + 1]),
            method="bounded",
            options={"xatol": 1e-6},
        )
        return float(found.x)

    def _r_squared(self, parameters: NDArray[np.float64]) -> float:
        def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.array([values[self.relative == size].mean(axis=0) for size in np.unique(self.relative)])

        levels = means(self.levels)
        spread = float(np.sum((levels - levels.mean(axis=0)) ** 2))
        residual = float(np.sum((means(self._model(parameters, 0.5)) - levels) ** 2))
        return 1 - residual / spread if spread > 0 else math.nan

    def _model(self, parameters: NDArray[np.float64], exponent: float | None) -> NDArray[np.float64]:
        theta, alpha = parameters[: self.count], parameters[self.count]
        gamma = parameters[self.count + 1] if self.beta is None else alpha * self.beta
        x = self.growth(parameters[-1] if exponent is None else exponent)
        return np.asarray(theta + x[:, None] * (alpha / theta + gamma / theta**2))

    def _start(self) -> NDArray[np.float64]:
        """A line per outlier, and alpha from the slopes."""
        x = self.growth(0.5)
        design = np.stack([np.ones(x.size), x], axis=1) * self.root_weights
        (theta, slope), *_ = np.linalg.lstsq(design, self.levels * self.root_weights, rcond=None)
        mean = self.levels.mean(axis=0)
        theta = np.sign(mean) * np.maximum(np.sign(mean) * theta, 0.1 * np.abs(mean))
        alpha = float((slope / theta).sum() / (theta**-2).sum())
        return np.concatenate([theta, [alpha], [0.0] if self.beta is None else []])

    def _solve(self, start: NDArray[np.float64], exponent: float | None) -> NDArray[np.float64]:
        """Theta, alpha, alpha beta unless beta is known, and the exponent unless it is given.

        Twice: the second time each outlier is weighted by its own scatter.
        """
        from scipy.optimize import least_squares  # SciPy is slow to import

        def residuals(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.asarray((self._model(parameters, exponent) - self.levels) * self.root_weights)

        scale = np.ones(self.count)
        for _ in range(2):
            found = least_squares(
                lambda parameters, scale=scale: (residuals(parameters) / scale).ravel(),
                start,
                method="lm",
                xtol=1e-10,
                ftol=1e-12,
                max_nfev=EVALUATIONS,
            )
            start = found.x
            scatter = np.sqrt(np.mean(residuals(start) ** 2, axis=0))
            scale = np.maximum(scatter, max(1e-3 * float(scatter.max()), 1e-12))
        return np.asarray(start)
