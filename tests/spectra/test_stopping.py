from __future__ import annotations

import numpy as np
import pytest
import torch
from known_spectra import power_law, semicircle
from test_outliers_of_networks import hessian_at, mlp, trained

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.spectra.stopping import CertifiedEnds, Settled


class Diagonal:
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, values):
        self.values = torch.as_tensor(np.asarray(values), dtype=self.dtype)
        self.size = len(self.values)

    def matmat(self, V):
        return V * self.values


NOISE = 4.4e-15


@pytest.fixture(scope="module")
def digits_network():
    """64-64-64-10, 8970 parameters, after 100 steps: nine outliers."""
    return hessian_at(trained(lambda: mlp(64, 64, 64, 10), steps=(100,)), 100)


@pytest.mark.parametrize("seed", range(3))
def test_certifies_the_outliers_of_a_trained_network_in_a_fifth_of_a_run(digits_network, seed):
    H = digits_network
    light = estimate_spectrum(H, steps=100, seed=seed, until=CertifiedEnds(H.size, H.noise, top=9))
    truth = estimate_spectrum(H, steps=100, seed=seed + 10).top
    assert light.products <= 20
    assert len(light.top) == 9
    assert light.lambda_max.certified
    for level, exact in zip(light.top, truth, strict=False):
        assert level.value == pytest.approx(exact.value, rel=2 * H.noise)


def test_the_largest_alone_takes_fewer_and_negative_ones_can_be_asked_for(digits_network):
    H = digits_network
    one = estimate_spectrum(H, steps=100, until=CertifiedEnds(H.size, H.noise))
    both = estimate_spectrum(H, steps=100, until=CertifiedEnds(H.size, H.noise, top=9, bottom=1))
    assert one.products < 19 < both.products
    assert one.lambda_max.certified
    assert both.lambda_min.certified
    assert estimate_spectrum(H, steps=one.products - 1).lambda_max.certified  # the first step at which it could end,
    assert not estimate_spectrum(H, steps=one.products - 2).lambda_max.certified  # and one to confirm it


def test_what_is_not_there_is_looked_for_to_the_ceiling():
    operator = Diagonal(-np.arange(1.0, 200.0))
    spectrum = estimate_spectrum(operator, steps=60, until=CertifiedEnds(operator.size, NOISE))
    assert spectrum.products == 60


def test_a_full_probe_ends_where_the_count_has_settled(digits_network):
    H = digits_network
    short = estimate_spectrum(H, steps=200, until=Settled(H.size, H.noise))
    whole = estimate_spectrum(H, steps=200)
    assert 100 <= short.products <= 110
    for side in ("high", "low"):
        one, other = getattr(short.outliers, side), getattr(whole.outliers, side)
        assert (one.kind, one.count) == (other.kind, other.count)
        assert not one.at_least
    assert short.outliers.high.count == 9
    assert short.bulk_edges.high == pytest.approx(whole.bulk_edges.high, rel=1e-6)


def test_it_ends_before_a_hundred_steps_where_no_wider_gap_can_be_hidden():
    operator = Diagonal(np.concatenate([np.geomspace(5e4, 2e4, 9), np.geomspace(1e3, 1e-3, 120)]))
    spectrum = estimate_spectrum(operator, steps=100, until=Settled(operator.size, NOISE))
    assert 50 <= spectrum.products <= 80
    assert (spectrum.outliers.high.count, spectrum.outliers.high.at_least) == (9, False)


@pytest.mark.parametrize("eigenvalues", [power_law(3000, 1.0), semicircle(4000)], ids=["refusal", "edge"])
def test_a_refusal_or_an_edge_is_not_believed_before_a_hundred_steps(eigenvalues):
    operator = Diagonal(eigenvalues)
    assert estimate_spectrum(operator, steps=100, until=Settled(operator.size, NOISE)).products == 100
    assert 100 <= estimate_spectrum(operator, steps=200, until=Settled(operator.size, NOISE)).products <= 120


def test_a_count_that_was_not_there_at_the_look_before_has_not_settled():
    operator = Diagonal(np.concatenate([np.linspace(20, 30, 9), power_law(3000, 1.0)]))
    rule = Settled(operator.size, NOISE)
    whole = estimate_spectrum(operator, steps=110).runs[0]
    cut = {m: (Tridiagonal(whole.alpha[:m], whole.beta[:m]),) for m in (100, 110)}
    assert not rule(cut[100])  # the first look has nothing to compare with
    assert rule(cut[110])
    bare = (Tridiagonal(np.arange(40.0), np.ones(40)),)
    assert not rule(bare)
    assert not rule(cut[100])
    assert rule(cut[110])


@pytest.mark.parametrize("confirm", [0, 1, 4])
def test_certificates_must_hold_for_some_steps_more(confirm, digits_network):
    H = digits_network
    ends = [
        estimate_spectrum(H, steps=60, until=CertifiedEnds(H.size, H.noise, top=3, confirm=c)).products
        for c in (0, confirm)
    ]
    assert ends[1] - ends[0] == confirm


def test_runs_without_a_basis_have_no_counts_to_settle():
    operator = Diagonal(np.concatenate([np.linspace(20, 30, 9), power_law(3000, 1.0)]))
    rule = Settled(operator.size, NOISE)
    assert estimate_spectrum(operator, steps=60, basis="none", until=rule).products == 60


def test_a_small_operator_ends_when_it_is_seen_whole():
    spectrum = estimate_spectrum(Diagonal([1.0, 2.0, 5.0] * 100), steps=50)
    assert spectrum.products == 8  # three are enough; a look comes every eight
    np.testing.assert_allclose(spectrum.nodes[0], [1.0, 2.0, 5.0])
