"""Ritz vectors of a Lanczos run, from its basis while that is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_rmt.krylov.tridiagonal import Tridiagonal


def ritz_vectors(run: Tridiagonal, basis: Tensor, nodes: Sequence[int], device: torch.device) -> Tensor:
    """Approximate eigenvectors: combinations of the basis, each within ``residual / gap`` of an eigenvector.

    Args:
        run: with Ritz values that the run's residuals bound.
        basis: its vectors as rows, shape (at least ``run.steps``, n), or this process's parts of them; in any dtype, on the
            device or the host.
        nodes: places in ``run.nodes``.
        device: where they are wanted.

    Returns:
        Orthonormal to the basis's own orthogonality, shape (len(nodes), n).
    """
    coefficients = torch.from_numpy(np.ascontiguousarray(run.vectors[:, list(nodes)].T)).to(basis.device, basis.dtype)
    return (coefficients @ basis[: run.steps]).to(device)
