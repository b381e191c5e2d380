"""Level statistics of exact spectra: do neighbouring eigenvalues repel as those of the GOE do? NumPy and SciPy only.

Read ``cut`` (which eigenvalues are levels), ``unfolding`` (spacings in units of their local mean), ``spacings`` and
``long_range`` (the statistics), ``null`` (what they are for GOE), ``dependence`` (several spectra of one block),
``verdict`` (the words), and ``statistics``, which ties them together. ``edge`` takes certified levels from the end of a
measured spectrum.
"""

from lightning_rmt.levels.statistics import LevelStatistics, level_statistics

__all__ = ["LevelStatistics", "level_statistics"]
