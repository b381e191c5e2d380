"""What may be passed as a noise scale, a damping or a spectrum, and what is refused with a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_rmt.spectra.spectrum import Spectrum


def number(value: float, name: str) -> float:
    """A finite number.

    Raises:
        ValueError: it isn't.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def not_negative(value: float, name: str, hint: str) -> float:
    """A finite number of at least zero.

    Raises:
        ValueError: it isn't; the message ends with the hint.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}; {hint}")
    return float(value)


def positive(value: float, name: str) -> float:
    """A finite number above zero.

    Raises:
        ValueError: it isn't.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return float(value)


def noise_scale_argument(noise: float, name: str = "noise") -> float:
    """The scale s of a GOE(s) noise matrix.

    Raises:
        ValueError: it is negative or not finite.
    """
    return not_negative(noise, name, "it is the scale s of a noise matrix whose entries have variance s^2 / n")


def spectrum_argument(spectrum: Any) -> Spectrum:
    """A measured spectrum.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(
            f"expected a lightning_rmt.Spectrum, got {type(spectrum).__name__}: measure one with "
            "estimate_spectrum(operator, ...), or take the reading's .spectrum"
        )
    return spectrum


def vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Finite numbers, shape (k,), perhaps none; a single number is one.

    Raises:
        ValueError: another shape, or numbers that aren't finite.
    """
    found = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if found.ndim != 1:
        raise ValueError(f"{name} must be a vector, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: {int((~np.isfinite(found)).sum())} of {found.size} are not finite")
    return found
