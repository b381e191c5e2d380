"""The examples in the docstrings hold: each is a closed form."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "gradient_covariance", "finite_difference"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(f"lightning_rmt.curvature.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
