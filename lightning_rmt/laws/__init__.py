"""Limiting spectral laws of random matrices, one law a file. NumPy and SciPy only."""

from lightning_rmt.laws.block_semicircle import BlockSemicircle
from lightning_rmt.laws.law import Law
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.product_wigner import ProductWigner
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.sparse_wigner import SparseWigner

__all__ = [
    "BlockSemicircle",
    "Law",
    "PercolatedWigner",
    "ProductWigner",
    "ProductWishart",
    "Semicircle",
    "SparseWigner",
]
