"""Limiting spectral laws of random matrices, one law a file. NumPy and SciPy only."""

from lightning_rmt.laws.block_semicircle import BlockSemicircle
from lightning_rmt.laws.bulk import NoFitError
from lightning_rmt.laws.fit import Fit
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.ranking import Ranking, rank_laws
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

__all__ = [
    "BlockSemicircle",
    "Fit",
    "Law",
    "MarchenkoPastur",
    "NoFitError",
    "PercolatedWigner",
    "ProductWigner",
    "ProductWishart",
    "Ranking",
    "RefinedWishartPlusWigner",
    "Semicircle",
    "SparseWigner",
    "WishartPlusWigner",
    "rank_laws",
]
