"""What a Lanczos run says about a spectrum, with its errors. NumPy and SciPy only.

Read ``levels`` (which Ritz values are eigenvalues), ``quadrature`` (the measure, with exact weights where they are known),
``moments`` (trace, Frobenius norm, free cumulants and their errors), ``band`` (rigorous bounds on the distribution
function), ``outliers`` and ``bulk_edge`` (what stands apart, or why nobody can say), ``density``, ``masses``, and
``spectrum``, which ties them together.
"""
