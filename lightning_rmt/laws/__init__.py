"""Limiting spectral laws of random matrices, one law a file. NumPy and SciPy only."""

from lightning_rmt.laws.law import Law
from lightning_rmt.laws.product_wishart import ProductWishart
from lightning_rmt.laws.semicircle import Semicircle

__all__ = ["Law", "ProductWishart", "Semicircle"]
