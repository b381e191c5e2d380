"""Curvature of any torch loss as symmetric operators on flat vectors: one operator, one file.

Read ``hessian`` first; ``parameters`` says how vectors lie, ``evaluation`` under which modes a loss runs.
"""
