"""Curvature of any torch loss as symmetric operators on flat vectors: one operator, one file.

Read ``hessian`` first. ``gauss_newton``, ``gradient_covariance`` and ``finite_difference`` are the other
operators and ``distributed`` sums any of them over ranks; ``difference_checks`` says what finite differences
are worth, ``parameters`` how vectors lie, ``batches`` what a batch weighs, ``evaluation`` under which modes a
loss runs.
"""
