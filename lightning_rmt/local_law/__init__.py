"""Local laws: what noise does to outliers and to a damping, and what to do about it.

NumPy and SciPy only, but for the measurement of the noise itself (``noise_scale``), which takes operators.

Read ``damping`` first (noise eats damping), then ``resolvent`` (which part of a spectrum enters), ``cleaning`` (outliers),
``joint`` (noise in the gradient too) and ``multiplicative`` (Gauss-Newton matrices). ``batch_fit`` is the outlier map over
batch sizes, ``weighted`` cleans Kronecker factors, ``shrinkage`` and ``learner`` are the rules to compare with.

``noise`` is everywhere the scale s of a GOE(s) noise matrix, whose off-diagonal entries have the variance ``s^2 / n``.
"""

from lightning_rmt.local_law.batch_fit import OutlierBatchFit, outlier_batch_fit
from lightning_rmt.local_law.batch_law import BatchLaw
from lightning_rmt.local_law.cleaning import Cleaned, clean
from lightning_rmt.local_law.damping import (
    damping_for,
    effective_damping,
    noise_edge,
    self_consistent_damping,
    self_consistent_damping_error,
    smallest_damping,
)
from lightning_rmt.local_law.errors import NoDampingError
from lightning_rmt.local_law.joint import (
    JointDamping,
    expected_curvature,
    ggn_expected_curvature,
    ggn_joint_damping,
    joint_damping,
)
from lightning_rmt.local_law.learner import DampingLearner, curvature_variance
from lightning_rmt.local_law.multiplicative import ggn_clean, ggn_damping_for, ggn_effective_damping
from lightning_rmt.local_law.noise import NoiseScale, noise_scale
from lightning_rmt.local_law.shrinkage import Shrinkage, ledoit_wolf, linear_shrinkage
from lightning_rmt.local_law.vector_measure import VectorMeasure
from lightning_rmt.local_law.weighted import MovingAverageWeights, clean_weighted

__all__ = [
    "BatchLaw",
    "Cleaned",
    "DampingLearner",
    "JointDamping",
    "MovingAverageWeights",
    "NoDampingError",
    "NoiseScale",
    "OutlierBatchFit",
    "Shrinkage",
    "VectorMeasure",
    "clean",
    "clean_weighted",
    "curvature_variance",
    "damping_for",
    "effective_damping",
    "expected_curvature",
    "ggn_clean",
    "ggn_damping_for",
    "ggn_effective_damping",
    "ggn_expected_curvature",
    "ggn_joint_damping",
    "joint_damping",
    "ledoit_wolf",
    "linear_shrinkage",
    "noise_edge",
    "noise_scale",
    "outlier_batch_fit",
    "self_consistent_damping",
    "self_consistent_damping_error",
    "smallest_damping",
]
