"""Damping for any optimizer. Torch only: knows no Lightning, and is fed by a spectrum.

Read ``controller`` first (what happens around a step), then ``taken_step`` (what is measured), ``adjustment`` (what follows
from it), ``targets`` (where an optimizer keeps its damping) and ``snapshot`` (how a step is undone).
"""

from lightning_rmt.optim.controller import DampingController
from lightning_rmt.optim.errors import NoCalibrationError
from lightning_rmt.optim.report import DampingReport

__all__ = ["DampingController", "DampingReport", "NoCalibrationError"]
