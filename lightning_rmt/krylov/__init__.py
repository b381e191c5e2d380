"""Lanczos: the recurrence, its reductions, and what it leaves behind.

Read ``tridiagonal`` (what a run is), ``reductions`` (inner products that stay accurate in float32) and ``lanczos``
(the run itself), in this order.
"""
