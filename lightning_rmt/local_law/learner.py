"""The damping learner of arXiv:2011.08181, as published."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lightning_rmt.local_law.arguments import not_negative


@dataclass(frozen=True)
class DampingLearner:
    """Damping from the variance of the batches' curvature (Granziol et al. 2020, as in the authors' training scripts).

    Every update measures ``v = mean_b |H_b z|^2 - |mean_b H_b z|^2`` along one random unit vector z. The first one sets
    ``damping = minimum + v``, later ones ``damping = .7 damping + .3 (minimum + v)``; the learning rate is multiplied by
    ``1 + damping``. That is shrinkage towards the identity (`linear_shrinkage` with target 1) where the curvature is small
    against 1, smoothed over time.

    As itself, with what is known of it: v has the units of a squared curvature, so that c times the loss gives ``c^2``
    times the damping, and the variance over B batches is (B - 1)/B of the true one. The local-law rules have neither flaw.

    Attributes:
        minimum: the damping that the user set.
        damping: the current one, None before the first update.
        keep: how much of the old damping an update keeps.

    Raises:
        ValueError: a damping is negative or not finite, or ``keep`` isn't a share.

    Example:
        >>> learner = DampingLearner(minimum=0.1).update(0.2)
        >>> round(learner.damping, 6), round(learner.update(0.0).damping, 6)
        (0.3, 0.24)
    """

    minimum: float
    damping: float | None = None
    keep: float = 0.7

    def __post_init__(self) -> None:
        not_negative(self.minimum, "minimum", "it is the smallest damping")
        if self.damping is not None:
            not_negative(self.damping, "damping", "it is added to the curvature")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep is a share between 0 and 1, got {self.keep}")

    def update(self, variance: float) -> DampingLearner:
        """The learner after one more measurement.

        Args:
            variance: v, see `curvature_variance`.

        Raises:
            ValueError: it is negative or not finite.
        """
        aim = self.minimum + not_negative(variance, "variance", "it is a variance of products with batch Hessians")
        return replace(self, damping=aim if self.damping is None else self.keep * self.damping + (1 - self.keep) * aim)

    @property
    def learning_rate_factor(self) -> float:
        """``1 + damping``; 1 before the first update."""
        return 1 + (self.damping or 0.0)


def curvature_variance(products: ArrayLike) -> float:
    """``mean_b |H_b z|^2 - |mean_b H_b z|^2`` over batches, for a unit vector z.

    Args:
        products: ``H_b z`` per batch, shape (batches, n), at least two.

    Raises:
        ValueError: another shape, fewer batches, or numbers that aren't finite.
    """
    rows = np.asarray(products, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(
            f"expected one product per row for at least two batches, shape (batches, n), got shape {rows.shape}: one batch "
            "has no variance"
        )
    if not np.isfinite(rows).all():
        raise ValueError("products with batch Hessians must be finite; a NaN or infinity would stay in the damping")
    # the same number as a difference of squares, without cancelling
    return float(np.mean(np.sum((rows - rows.mean(axis=0)) ** 2, axis=1)))
