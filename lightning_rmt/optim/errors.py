"""Why a calibration was skipped."""

from __future__ import annotations


class NoCalibrationError(RuntimeError):
    """This step says nothing about the damping; the message says why. Training goes on with the damping as it is."""


class NoMoveError(NoCalibrationError):
    """The step was too short to change a weight."""
