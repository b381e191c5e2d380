"""The outlier map over batch sizes as one probe measured it: the outliers of growing batches, and a fit for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.local_law.batch_fit import EXPONENTS, OutlierBatchFit, outlier_batch_fit
from lightning_rmt.spectra.moments import Estimate


@dataclass(frozen=True, eq=False)
class BatchLaw:
    """Outliers of the curvature on batches of several sizes, and how they grow as batches shrink.

    The batches are nested in groups: each group is a set of samples of its own, whole, in halves, in quarters, and so on.
    All sizes then see the same samples, so that what these have in common moves theta and not alpha; the error bars are the
    jackknife's over groups, which share no samples.

    Attributes:
        batch_sizes: samples, shape (rows,).
        eigenvalues: the largest ones, largest first, shape (rows, outliers), in the operator's units.
        groups: a label per row, shape (rows,).
        dataset_size: samples that the batches are drawn from; infinite where nobody knows.
        bulk_mean: of the spectrum on all of the samples, outliers left out.
        sample_noise: noise scale of one sample in all directions (see `outlier_batch_fit`); None where it wasn't measured.
        products: operator products that it took; one on a part of the samples counts as that part.
    """

    batch_sizes: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    groups: NDArray[np.int64]
    dataset_size: float
    bulk_mean: float
    sample_noise: Estimate | None
    products: float

    @cached_property
    def fits(self) -> tuple[OutlierBatchFit, ...]:
        """One fit for each outlier, largest first: alpha needn't be alike along them.

        Raises:
            ValueError: as `outlier_batch_fit`.
        """
        noise = self.sample_noise
        return tuple(
            outlier_batch_fit(
                self.batch_sizes,
                column[:, None],
                self.dataset_size,
                sample_noise=None if noise is None else noise.mean,
                sample_noise_stderr=0.0 if noise is None else noise.stderr,
                bulk_mean=self.bulk_mean,
                groups=self.groups,
            )
            for column in self.eigenvalues.T
        )

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Batch sizes, ascending; the mean outliers there, shape (sizes, outliers), and their standard errors.

        The errors are the scatter of the groups' means.
        """
        sizes, labels = np.unique(self.batch_sizes), np.unique(self.groups)
        found = np.array([[self._mean(size, label) for label in labels] for size in sizes])
        return sizes, found.mean(axis=1), found.std(axis=1, ddof=1) / np.sqrt(labels.size)

    def _mean(self, size: float, label: int) -> NDArray[np.float64]:
        return np.asarray(self.eigenvalues[(self.batch_sizes == size) & (self.groups == label)].mean(axis=0))

    def isotropic(self, index: int, batch_sizes: ArrayLike) -> NDArray[np.float64] | None:
        """Where noise that is alike in all directions would put an outlier at these batch sizes, shape (sizes,).

        None where the noise wasn't measured.
        """
        if self.sample_noise is None:
            return None
        theta = self.fits[index].theta[0].mean
        x = 1 / np.atleast_1d(np.asarray(batch_sizes, dtype=np.float64)) - 1 / self.dataset_size
        return np.asarray(theta + x * self.sample_noise.mean**2 * (1 / theta + self.bulk_mean / theta**2))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        noise = self.sample_noise
        return {
            "batch_sizes": self.batch_sizes.tolist(),
            "eigenvalues": self.eigenvalues.tolist(),
            "groups": self.groups.tolist(),
            "dataset_size": self.dataset_size,
            "bulk_mean": self.bulk_mean,
            "sample_noise": None if noise is None else [noise.mean, noise.stderr],
            "products": self.products,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchLaw:
        """From what `to_dict` gave."""
        noise = values["sample_noise"]
        return cls(
            np.array(values["batch_sizes"], dtype=np.float64),
            np.array(values["eigenvalues"], dtype=np.float64),
            np.array(values["groups"], dtype=np.int64),
            float(values["dataset_size"]),
            float(values["bulk_mean"]),
            None if noise is None else Estimate(*noise),
            float(values["products"]),
        )


def tells_exponent(fit: OutlierBatchFit) -> bool:
    """Whether the outliers of a fit tell an exponent: it didn't run to an end of where it is looked for."""
    return EXPONENTS[0] < fit.exponent.mean < EXPONENTS[1]
