"""The outermost eigenvalues of an operator with their eigenvectors: Ritz vectors of a Lanczos run whose basis is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rmt.krylov.lanczos import SymmetricOperator, lanczos_lockstep, product_noise, shards_of, start_vector
from lightning_rmt.krylov.ritz_vectors import ritz_vectors
from lightning_rmt.krylov.tridiagonal import Tridiagonal

#: A Ritz pair is taken for an eigenpair while its residual is at most this share of its value.
ACCEPTED_RESIDUAL = 0.3
#: Steps from one look to the next whether the operator has nothing more to show.
LOOK_EVERY = 8


@dataclass(frozen=True, eq=False)
class EigenPairs:
    """The eigenpairs of largest magnitude, largest first.

    Attributes:
        values: shape (k,), float64, in the operator's units, of either sign.
        vectors: shape (k, n), orthonormal rows, in the operator's dtype and on its device.
        residuals: shape (k,), ``|H y - theta y|`` with the rounding of the product: an eigenvalue lies within this of each
            value. The vector's angle to its eigenvector is at most the residual over the distance to the next eigenvalue.
        run: the Lanczos run that they are from, a random probe like any other; None where they come from elsewhere.
    """

    values: NDArray[np.float64]
    vectors: Tensor
    residuals: NDArray[np.float64]
    run: Tridiagonal | None = None

    def __post_init__(self) -> None:
        for name in ("values", "residuals"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        k = self.values.size
        if self.values.shape != (k,) or self.residuals.shape != (k,) or self.vectors.ndim != 2:
            raise ValueError(
                "eigenpairs are values (k,), vectors (k, n) and residuals (k,), got shapes "
                f"{self.values.shape}, {tuple(self.vectors.shape)} and {self.residuals.shape}"
            )
        if self.vectors.shape[0] != k:
            raise ValueError(f"there are {k} values and {self.vectors.shape[0]} vectors: one row for each value")
        if not (np.isfinite(self.values).all() and np.isfinite(self.residuals).all()):
            raise ValueError("values or residuals of the eigenpairs are not finite")
        if (np.diff(np.abs(self.values)) > 0).any():
            raise ValueError("eigenpairs go from the largest magnitude to the smallest; sort them")


def top_eigenpairs(
    operator: SymmetricOperator,
    count: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> EigenPairs:
    """Finds the eigenpairs of largest magnitude by Lanczos from one random vector.

    Takes ``steps`` products and as many vectors of memory, then one matrix product for the Ritz vectors. A random start is
    what makes the run a probe of the whole spectrum too (`EigenPairs.run`), at no further cost. Of a degenerate eigenvalue
    it sees one vector: the others come with rounding, late or never.

    Args:
        operator: anything with ``size``, ``device``, ``dtype`` and ``matmat``. Over several processes with ``shards`` each
            gets its part of the vectors, shape (k, local_size).
        count: pairs wanted, at least 1.
        steps: products, at least ``count``; None: ``2 count + 10``. At most n are taken.
        seed: of the start vector; the same on all ranks.
        on_step: called with the number of products queued so far.

    Returns:
        Up to ``count`` pairs: fewer where the next one's residual is above 0.3 of its magnitude, so that it says little
        about any eigenvector.

    Raises:
        ValueError: ``count`` or ``steps`` is too small, or a product was NaN or infinite.

    Example:
        >>> import torch
        >>> class Diagonal:
        ...     size, device, dtype = 3, torch.device("cpu"), torch.float64
        ...     def matmat(self, V):
        ...         return V * torch.tensor([1.0, -7.0, 5.0], dtype=torch.float64)
        >>> top_eigenpairs(Diagonal(), 2).values.round(6)
        array([-7.,  5.])
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    steps = 2 * count + 10 if steps is None else steps
    if steps < count:
        raise ValueError(f"{count} pairs need at least as many Lanczos steps, got {steps}")
    bases: list[Tensor] = []
    (run,) = lanczos_lockstep(
        operator,
        [start_vector(operator, seed)],
        steps,
        bases=["full"],
        stop=lambda runs: runs[0].exhausted,
        look_every=LOOK_EVERY,
        on_step=on_step,
        on_basis=bases.append,
    )
    order = np.argsort(-np.abs(run.nodes), kind="stable")[:count]
    residuals = run.residuals[order] + product_noise(operator) * float(np.abs(run.nodes).max())
    magnitudes = np.abs(run.nodes[order])
    accepted = (residuals <= ACCEPTED_RESIDUAL * magnitudes) & (magnitudes > 0)
    kept = order.size if accepted.all() else int(np.argmin(accepted))
    order, residuals = order[:kept], residuals[:kept]
    vectors = ritz_vectors(run, bases[0], order.tolist(), operator.device)
    # one all-reduce where vectors are spread over processes
    squares = shards_of(operator).total(torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).square())
    return EigenPairs(run.nodes[order], vectors / squares.sqrt().to(vectors.dtype)[:, None], residuals, run)
