"""Wasserstein-1 distances and their floor."""

from __future__ import annotations

import numpy as np
import pytest
from measured_laws import measured
from scipy.stats import wasserstein_distance

from lightning_rmt.laws.distance import comparison, law_distance, resolution_floor, wasserstein
from lightning_rmt.laws.marchenko_pastur import MarchenkoPastur
from lightning_rmt.laws.percolated_wigner import PercolatedWigner
from lightning_rmt.laws.semicircle import Semicircle


def distance(law, bulk):
    return law_distance(law, bulk, comparison(law, bulk))


def test_a_line_that_crosses_a_step():
    one = np.ones(1)
    assert wasserstein(one, 0 * one, -one, one) == pytest.approx(0.5)
    assert wasserstein(one, 0 * one, one, one) == 1
    assert wasserstein(2 * one, one, 0 * one, one) == pytest.approx(1)
    assert wasserstein(one, one, one, one) == 0


@pytest.mark.parametrize(
    ("truth", "law"),
    [
        (Semicircle(2.0), Semicircle(2.0)),
        (MarchenkoPastur(0.5), Semicircle(1.4, 1.0)),
        (PercolatedWigner(0.6), PercolatedWigner(0.5)),
        (MarchenkoPastur(3.0), MarchenkoPastur(2.5)),
    ],
    ids=repr,
)
def test_it_is_the_distance_to_the_quantiles(truth, law):
    bulk = measured(truth, 2000, 40).bulk
    nodes, weights = bulk.pooled(law.atom > 0)
    points = law.quantile((np.arange(200000) + 0.5) / 200000)
    assert distance(law, bulk)[0] == pytest.approx(wasserstein_distance(points, nodes, None, weights), abs=2e-4)


def test_t12_the_distance_to_the_truth_halves_with_twice_the_steps():
    """In units of the width, at one start vector; sampling is a tenth of it at this size."""
    law = Semicircle(2.0)
    found = [distance(law, measured(law, 100000, steps).bulk)[0] / 4 for steps in (25, 50, 100)]
    assert found[2] < 5e-3
    assert found[1] < 9e-3
    assert 0.35 < found[1] / found[0] < 0.65
    assert 0.35 < found[2] / found[1] < 0.75


def test_every_probe_has_its_distance():
    law = Semicircle(2.0)
    mean, each = distance(law, measured(law, 2000, 40, probes=3).bulk)
    assert each.shape == (3,)
    assert mean <= each.mean()


def test_the_floor():
    """Its two parts: a third of the width over the steps, and sampling that falls like the root of size and probes."""
    law = Semicircle(2.0)
    bulk = measured(law, 2000, 40).bulk
    assert resolution_floor(bulk, True, 0.0) == pytest.approx(0.31 * 4 / 40, rel=0.1)
    sampling = {}
    for n, probes in ((2000, 1), (8000, 1), (2000, 4)):
        bulk = measured(law, n, 40, probes).bulk
        sampling[n, probes] = np.sqrt(resolution_floor(bulk, True, 1.0) ** 2 - resolution_floor(bulk, True, 0.0) ** 2)
    assert sampling[2000, 1] == pytest.approx(0.41 * 4 / 2000**0.5, rel=0.3)
    assert sampling[8000, 1] == pytest.approx(sampling[2000, 1] / 2, rel=0.1)
    assert 0.4 < sampling[2000, 4] / sampling[2000, 1] < 0.8


def test_a_fit_takes_part_of_the_sampling_error():
    """Where only the scale is free the mean's error stays; so the floor of a centered law is higher."""
    spectrum = measured(Semicircle(2.0), 1000, 40)
    fit = Semicircle.fit(spectrum)
    frame = float(np.sqrt(spectrum.free_cumulants().k2.mean))
    least, most = (resolution_floor(spectrum.bulk, True, left) / frame for left in (0.0, 1.0))
    left = np.sqrt(fit.floor**2 - least**2) / np.sqrt(most**2 - least**2)
    assert 0.5 < left < 0.75
