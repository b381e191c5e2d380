"""Level statistics of exact spectra: do neighbouring eigenvalues repel as those of the GOE do? NumPy and SciPy only."""
