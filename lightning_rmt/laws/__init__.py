"""Limiting spectral laws of random matrices, one law a file. NumPy and SciPy only."""

from lightning_rmt.laws.bulk import NoFitError
from lightning_rmt.laws.fit import Fit
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.ranking import Ranking, rank_laws
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

__all__ = [
    "Fit",
    "Law",
    "MarchenkoPastur",
    "NoFitError",
    "Ranking",
    "RefinedWishartPlusWigner",
    "Semicircle",
    "WishartPlusWigner",
    "rank_laws",
]
