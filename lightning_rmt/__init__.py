"""lightning_rmt: see the curvature of the loss that a PyTorch Lightning run is training on.

``Trainer(callbacks=[SpectrumMonitor()])`` watches a run; ``Hessian`` and ``estimate_spectrum`` do the same for any torch
loss. Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rmt.callbacks.kronecker_diagnostics import KroneckerDiagnostics as KroneckerDiagnostics
    from lightning_rmt.callbacks.local_law_damping import LocalLawDamping as LocalLawDamping
    from lightning_rmt.callbacks.spectrum_monitor import SpectrumMonitor as SpectrumMonitor
    from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian as FiniteDifferenceHessian
    from lightning_rmt.curvature.gauss_newton import GaussNewton as GaussNewton
    from lightning_rmt.curvature.gradient_covariance import GradientCovariance as GradientCovariance
    from lightning_rmt.curvature.hessian import Hessian as Hessian
    from lightning_rmt.laws.ranking import rank_laws as rank_laws
    from lightning_rmt.levels.edge import edge_statistics as edge_statistics
    from lightning_rmt.levels.statistics import LevelStatistics as LevelStatistics
    from lightning_rmt.levels.statistics import level_statistics as level_statistics
    from lightning_rmt.optim.controller import DampingController as DampingController
    from lightning_rmt.optim.spectral_preconditioner import SpectralPreconditioner as SpectralPreconditioner
    from lightning_rmt.probe import estimate_spectrum as estimate_spectrum
    from lightning_rmt.reading import Reading as Reading
    from lightning_rmt.spectra.levels import Level as Level
    from lightning_rmt.spectra.moments import Estimate as Estimate
    from lightning_rmt.spectra.spectrum import Spectrum as Spectrum

__version__ = "0.1.0"

_HOME = {
    "SpectrumMonitor": "callbacks.spectrum_monitor",
    "LocalLawDamping": "callbacks.local_law_damping",
    "KroneckerDiagnostics": "callbacks.kronecker_diagnostics",
    "SpectralPreconditioner": "optim.spectral_preconditioner",
    "Hessian": "curvature.hessian",
    "FiniteDifferenceHessian": "curvature.finite_difference",
    "GaussNewton": "curvature.gauss_newton",
    "GradientCovariance": "curvature.gradient_covariance",
    "estimate_spectrum": "probe",
    "Reading": "reading",
    "Spectrum": "spectra.spectrum",
    "Estimate": "spectra.spectrum",
    "Level": "spectra.spectrum",
    "DampingController": "optim.controller",
    "edge_statistics": "levels.edge",
    "rank_laws": "laws.ranking",
    "level_statistics": "levels.statistics",
    "LevelStatistics": "levels.statistics",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
