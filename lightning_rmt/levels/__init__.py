"""Level statistics of exact spectra: do neighbouring eigenvalues repel as those of the GOE do? NumPy and SciPy only.

Read ``cut`` (which eigenvalues are levels), ``unfolding`` (spacings in units of their local mean), ``spacings`` and
``long_range`` (the statistics), ``reference`` (what they are for GOE, simulated by ``null``), ``dependence`` (several
spectra of one block), ``verdict`` (the words), and ``statistics``, which ties them together. ``edge`` takes certified
levels from the end of a measured spectrum.
"""

from lightning_rmt.levels.edge import edge_statistics
from lightning_rmt.levels.statistics import LevelStatistics, level_statistics

__all__ = ["LevelStatistics", "edge_statistics", "level_statistics"]
