"""What may be passed as eigenvalues, and what is refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.levels import RitzLevels
from lightning_rmt.spectra.spectrum import Spectrum

_RITZ = (
    "Ritz values are quadrature nodes, not eigenvalues: their spacings are an artefact of the number of steps (ratios from "
    ".04 to .97 for any matrix). Level statistics need exact eigenvalues: enable levels= blocks of the monitor, pass "
    "eigvalsh of a whole block in float64, or take the certified levels at one end with "
    "lightning_rmt.levels.edge_statistics(spectrum, side)"
)

_MATRIX = "level_statistics got a symmetric matrix: pass its eigenvalues (numpy.linalg.eigvalsh)"


def spectra_from(eigenvalues: ArrayLike | Sequence[ArrayLike]) -> tuple[list[NDArray[np.float64]], float]:
    """One or several spectra as float64 vectors, with the machine epsilon of the dtype that they came in.

    Raises:
        TypeError: Ritz values, complex numbers, or no numbers at all.
        ValueError: a matrix, unsorted or non-finite values, or another shape.
    """
    if isinstance(eigenvalues, Spectrum | Tridiagonal | RitzLevels):
        raise TypeError(f"level_statistics got a {type(eigenvalues).__name__}. {_RITZ}")
    parts: Sequence[Any] = eigenvalues if isinstance(eigenvalues, list | tuple) else ()
    if any(isinstance(part, Spectrum | Tridiagonal | RitzLevels) for part in parts):
        raise TypeError(f"level_statistics got a list of Ritz values. {_RITZ}")
    if any(np.ndim(part) > 0 for part in parts):
        if len({np.shape(part) for part in parts}) == 1 and _is_matrix(np.asarray(parts)):
            raise ValueError(_MATRIX)
        checked = [_vector(part, f"spectrum {i}") for i, part in enumerate(parts)]
    else:
        whole = np.asarray(eigenvalues)
        if _is_matrix(whole):
            raise ValueError(_MATRIX)
        rows: Any = whole if whole.ndim == 2 else [whole]
        checked = [_vector(row, f"spectrum {i}" if whole.ndim == 2 else "eigenvalues") for i, row in enumerate(rows)]
    if not checked:
        raise ValueError("level_statistics got no spectrum")
    return [values for values, _ in checked], max(eps for _, eps in checked)


def _is_matrix(whole: NDArray[Any]) -> bool:
    """Whether this is symmetric, up to the rounding of float32."""
    if whole.ndim != 2 or not whole.shape[0] == whole.shape[1] > 1 or whole.dtype.kind not in "fiu":
        return False
    plain = whole.astype(np.float64)
    if not np.isfinite(plain).all():
        return False
    largest = float(np.abs(plain).max())
    return largest == 0 or bool((np.abs(plain / largest - (plain / largest).T) <= 1e-5).all())


def _vector(part: ArrayLike, name: str) -> tuple[NDArray[np.float64], float]:
    values = np.asarray(part)
    if values.dtype.kind == "c":
        raise TypeError(
            f"{name}: complex numbers aren't the eigenvalues of a symmetric matrix; use eigvalsh, not eigvals"
        )
    if values.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name}: expected a vector of eigenvalues (or several), got shape {values.shape}")
    eps = float(np.finfo(values.dtype).eps) if values.dtype.kind == "f" else 0.0
    values = values.astype(np.float64)  # before any difference: those of integers wrap around
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {int((~np.isfinite(values)).sum())} of {values.size} eigenvalues are not finite")
    if (np.diff(values) < 0).any():
        raise ValueError(
            f"{name}: expected ascending eigenvalues, as eigvalsh gives them. Unsorted ones aren't sorted here, since they "
            "might be something else (a matrix's rows, or values in the order of an iteration)"
        )
    return values, max(eps, float(np.finfo(np.float64).eps))
