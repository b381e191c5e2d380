"""Limiting spectral laws of random matrices, one law a file. NumPy and SciPy only."""

from lightning_rmt.laws.law import Law
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.refined_wishart_plus_wigner import RefinedWishartPlusWigner
from lightning_rmt.laws.semicircle import Semicircle
from lightning_rmt.laws.wishart_plus_wigner import WishartPlusWigner

__all__ = ["Law", "MarchenkoPastur", "RefinedWishartPlusWigner", "Semicircle", "WishartPlusWigner"]
