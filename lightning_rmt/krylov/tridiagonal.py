"""What a Lanczos run leaves behind: a tridiagonal matrix, read as a Gauss quadrature of the spectral measure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class NonFiniteError(ValueError):
    """A product was NaN or infinite."""


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """The Jacobi matrix of one Lanczos run, with its Ritz values, weights and residuals.

    The eigenvalues of T (Ritz values) are the nodes, and the squared first components of its eigenvectors the weights,
    of the Gauss quadrature for the spectral measure that the start vector sees (Golub and Meurant 2010, chapter 6). A
    node is *not* an eigenvalue of the operator unless its residual says so.

    Attributes:
        alpha: diagonal of T, shape (m,), float64, in the operator's units.
        beta: shape (m,), float64; ``beta[:-1]`` is T's off-diagonal and ``beta[-1]`` the norm of the last residual
            vector, exactly 0 where the run ended in an invariant subspace.
        reorthogonalised: False for a three-vector run, whose Ritz values may hold copies ("ghosts") of converged
            eigenvalues. The quadrature is right either way (Druskin and Knizhnerman 1991); counting is not.
    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    reorthogonalised: bool = True

    def __post_init__(self) -> None:
        alpha = np.ascontiguousarray(self.alpha, dtype=np.float64)
        beta = np.ascontiguousarray(self.beta, dtype=np.float64)
        if alpha.ndim != 1 or alpha.shape != beta.shape or alpha.size == 0:
            raise ValueError(
                f"alpha and beta must be vectors of one length of at least 1, got shapes {alpha.shape} and {beta.shape}"
            )
        if not (np.isfinite(alpha).all() and np.isfinite(beta).all()):
            raise NonFiniteError("Lanczos coefficients are not finite: the operator returned NaN or infinity")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "beta", beta)

    @property
    def steps(self) -> int:
        """Number of Lanczos steps, m."""
        return self.alpha.size

    @property
    def exhausted(self) -> bool:
        """Whether the Krylov space became invariant: every Ritz value is then an eigenvalue."""
        return self.beta[-1] == 0.0

    @cached_property
    def _eigh(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # Dense eigh: SciPy's tridiagonal driver (stemr) fails on graded matrices, and m is at most a few hundred.
        off = self.beta[:-1]
        values, vectors = np.linalg.eigh(np.diag(self.alpha) + np.diag(off, 1) + np.diag(off, -1))
        return values, vectors

    @property
    def nodes(self) -> NDArray[np.float64]:
        """Ritz values, ascending, shape (m,)."""
        return self._eigh[0]

    @property
    def vectors(self) -> NDArray[np.float64]:
        """T's eigenvectors as columns, shape (m, m): the Ritz vectors in terms of the basis."""
        return self._eigh[1]

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Quadrature weights, shape (m,), summing to 1."""
        return self._eigh[1][0] ** 2

    @cached_property
    def residuals(self) -> NDArray[np.float64]:
        """Residual norms ``|H y - theta y| = beta_m |s_mi|``, shape (m,): an eigenvalue lies within this of each node."""
        return np.asarray(self.beta[-1] * np.abs(self._eigh[1][-1]))
