"""A Kronecker-factored optimizer from dampings that are decades apart: with the guard all runs end alike."""

from __future__ import annotations

import math

import pytest
from kronecker_harness import train

from lightning_rmt import DampingController

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS, RATE = 300, 1.0


def losses(starts=STARTS, **options):
    found = []
    for start in starts:
        control = None if options.get("fixed") else DampingController(mode="control", **options)
        found.append(train("autoencoder", start, STEPS, RATE, controller=control)[0])
    return found


@pytest.fixture(scope="module")
def guarded():
    return losses(guard_steps="every")


@pytest.mark.slow
def test_six_decades_of_starts_end_alike(guarded):
    assert max(guarded) < 1.5 * min(guarded)
    assert max(guarded) < 0.03


@pytest.mark.slow
def test_most_of_the_same_starts_diverge_when_they_are_kept():
    assert losses(STARTS[:4], fixed=True) == [math.inf] * 4


@pytest.mark.slow
def test_without_the_guard_the_first_test_would_fail(guarded):
    found = losses(guard=None)
    assert max(found) > 1.5 * min(found)
    assert min(found) > 3 * max(guarded)  # 0.07 is what a constant output gets


@pytest.mark.slow
def test_a_classifier_that_comes_near_interpolation_stays_finite():
    # the batch that it is measured on shows hardly any curvature there; that of the step's own batch does
    found = [
        train("classifier", start, 200, 0.3, controller=DampingController(mode="control", guard_steps="every"))[0]
        for start in (1e-6, 1e-2, 1.0)
    ]
    assert max(found) < 1.0  # 2.3 at the start
