"""Moments and free cumulants against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from known_spectra import hessian_like, marchenko_pastur, power_law, semicircle, spectrum_of

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.spectra.spectrum import Spectrum


def test_moments_of_an_unresolved_bulk_are_those_of_the_tridiagonal_matrix():
    """T14."""
    spectrum = spectrum_of(semicircle(5000), 30)
    run = spectrum.runs[0]
    T = np.diag(run.alpha) + np.diag(run.beta[:-1], 1) + np.diag(run.beta[:-1], -1)
    for k in range(5):
        assert spectrum.moment(k) == pytest.approx(np.linalg.matrix_power(T, k)[0, 0], rel=1e-10, abs=1e-10)


def test_moments_are_unbiased():
    """T14."""
    eigenvalues = power_law(2000, 0.7)
    found = np.array([[spectrum_of(eigenvalues, 40, seed=s).moment(k) for k in (1, 2, 3, 4)] for s in range(60)])
    truth = [np.mean(eigenvalues**k) for k in (1, 2, 3, 4)]
    z = (found.mean(axis=0) - truth) / (found.std(axis=0) / 60**0.5)
    assert (np.abs(z) < 4).all()


def test_a_moment_beyond_the_quadrature_is_refused():
    spectrum = spectrum_of(semicircle(500), 10)
    spectrum.moment(19)
    with pytest.raises(ValueError, match="0 to 19"):
        spectrum.moment(20)
    with pytest.raises(ValueError, match="-1"):
        spectrum.moment(-1)
    assert spectrum_of([1.0, 2.0], 5).moment(20) == pytest.approx((1 + 2**20) / 2)


def test_free_cumulants_of_the_laws():
    """T15."""
    wigner = spectrum_of(semicircle(20000), 60).free_cumulants()
    assert wigner.skew.mean == pytest.approx(0, abs=0.1)
    assert wigner.kurtosis.mean == pytest.approx(0, abs=0.1)
    assert wigner.k2.mean == pytest.approx(1, abs=0.05)
    sample = spectrum_of(marchenko_pastur(20000), 60).free_cumulants()
    # All free cumulants of a Marchenko-Pastur law of mean 1 and ratio c: c^(j-1).
    assert sample.k1.mean == pytest.approx(1, abs=0.03)
    assert sample.k2.mean == pytest.approx(0.5, abs=0.03)
    assert sample.k3.mean == pytest.approx(0.25, abs=0.04)
    assert sample.skew.mean == pytest.approx(0.5**0.5, abs=0.06)
    assert sample.kurtosis.mean == pytest.approx(0.5, abs=0.12)


def test_free_cumulants_of_a_sparse_matrix():
    # The adjacency matrix of a random 4-regular graph over sqrt(4) (Kesten 1959, McKay 1981): m4 = 2 - 1/4, k4 = -1/4.
    x = np.linspace(-(3**0.5), 3**0.5, 40001)
    law = np.sqrt(np.clip(3 - x**2, 0, None)) / (4 - x**2)
    share = np.cumsum(law) / law.sum()
    eigenvalues = np.interp((np.arange(20000) + 0.5) / 20000, share, x)
    found = spectrum_of(eigenvalues, 60).free_cumulants()
    assert found.k2.mean == pytest.approx(1, abs=0.03)
    assert found.skew.mean == pytest.approx(0, abs=0.05)
    assert found.kurtosis.mean == pytest.approx(-0.25, abs=0.05)


def test_outliers_are_removed_and_counted():
    spiked = spectrum_of(np.append(marchenko_pastur(19991), 8 * 1.3 ** np.arange(9)), 100)
    found = spiked.free_cumulants()
    assert spiked.outliers.high.count == found.removed == 9
    assert found.skew.mean == pytest.approx(0.5**0.5, abs=0.06)
    # With the outliers in, nothing of the bulk is left to see.
    T = spiked.moment(4) - spiked.moment(2) ** 2
    assert T / spiked.moment(2) ** 2 > 10


@pytest.mark.parametrize(
    ("eigenvalues", "truth"),
    [
        (semicircle(2000), (0, 1, 0, 0, 0, 0)),
        (marchenko_pastur(2000), (1, 0.5, 0.25, 0.125, 0.5**0.5, 0.5)),
        (semicircle(2000) - 3, (-3, 1, 0, 0, 0, 0)),
    ],
    ids=["semicircle", "marchenko-pastur", "shifted"],
)
def test_errors_of_free_cumulants_are_calibrated(eigenvalues, truth):
    names = ("k1", "k2", "k3", "k4", "skew", "kurtosis")
    z = []
    for seed in range(100):
        found = spectrum_of(eigenvalues, 40, seed=seed).free_cumulants()
        pairs = [(getattr(found, name), t) for name, t in zip(names, truth, strict=True)]
        z.append([(estimate.mean - t) / estimate.stderr for estimate, t in pairs])
    z = np.array(z)
    assert (np.mean(np.abs(z) < 1, axis=0) > 0.5).all()
    assert (np.mean(np.abs(z) < 2, axis=0) > 0.86).all()
    assert (z.std(axis=0) > 0.7).all()


def test_everything_scales_with_the_operator():
    """T23: scale."""
    eigenvalues = hessian_like(1000, np.random.default_rng(0))
    base = spectrum_of(eigenvalues, 60, probes=2)
    x = np.linspace(-1, 60, 7)
    for c in (1e-8, 1e8):
        # Scaling the coefficients is scaling the operator, without another run's rounding.
        runs = tuple(Tridiagonal(c * run.alpha, c * run.beta, run.reorthogonalised) for run in base.runs)
        scaled = Spectrum(runs, base.size, base.products, base.noise)
        assert scaled.trace.mean == pytest.approx(c * base.trace.mean)
        assert scaled.trace.stderr == pytest.approx(c * base.trace.stderr)
        assert scaled.frobenius.mean == pytest.approx(c * base.frobenius.mean)
        assert scaled.frobenius.stderr == pytest.approx(c * base.frobenius.stderr, rel=1e-6)
        assert scaled.moment(3) == pytest.approx(c**3 * base.moment(3))
        assert scaled.density(c * x) == pytest.approx(base.density(x) / c)
        assert scaled.cdf(c * x) == pytest.approx(base.cdf(x))
        for mine, theirs in zip(scaled.cdf_band(c * x), base.cdf_band(x), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-9)
        assert scaled.quantile(0.98) == pytest.approx(c * base.quantile(0.98))
        assert scaled.quantile_bounds(0.98) == pytest.approx(tuple(c * q for q in base.quantile_bounds(0.98)), rel=1e-6)
        assert scaled.zero_mass == pytest.approx(base.zero_mass)
        assert scaled.zero_width == pytest.approx(c * base.zero_width, rel=1e-6)
        assert scaled.negative_mass == pytest.approx(base.negative_mass)
        assert scaled.free_cumulants().kurtosis.mean == pytest.approx(base.free_cumulants().kurtosis.mean, rel=1e-6)
        assert [level.value for level in scaled.top] == pytest.approx([c * level.value for level in base.top])
        assert scaled.outliers.high.gap_spacings == pytest.approx(base.outliers.high.gap_spacings, rel=1e-8)


@pytest.mark.parametrize("make", [semicircle, marchenko_pastur])
@pytest.mark.parametrize("shift", [5.0, 40.0])
def test_everything_shifts_with_the_operator(make, shift):
    """T23: shift, of all that doesn't speak of zero, as long as no level changes its sign.

    Levels at the upper end have exact weights only where they are positive, so across zero the estimates are others.
    """
    base = spectrum_of(np.append(make(4000), [4.5, 6.0, 9.0]) + 3.0, 100, probes=2)
    # Shifting the coefficients is shifting the operator, without another run's rounding.
    runs = tuple(Tridiagonal(run.alpha + shift, run.beta, run.reorthogonalised) for run in base.runs)
    shifted = Spectrum(runs, base.size, base.products, base.noise)
    x = np.linspace(0.513, 13.0, 101)
    n = base.size
    assert shifted.trace.mean == pytest.approx(base.trace.mean + n * shift)
    assert shifted.trace.stderr == pytest.approx(base.trace.stderr, rel=1e-6)
    second = base.frobenius.mean**2 + 2 * shift * base.trace.mean + n * shift**2
    assert shifted.frobenius.mean == pytest.approx(second**0.5)
    assert shifted.moment(2) == pytest.approx(base.moment(2) + 2 * shift * base.moment(1) + shift**2)
    assert shifted.density(x + shift) == pytest.approx(base.density(x), rel=1e-6, abs=1e-9)
    assert shifted.cdf(x + shift) == pytest.approx(base.cdf(x))
    for mine, theirs in zip(shifted.cdf_band(x + shift), base.cdf_band(x), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert shifted.quantile(0.98) == pytest.approx(base.quantile(0.98) + shift)
    assert shifted.quantile_bounds(0.98) == pytest.approx(
        tuple(q + shift for q in base.quantile_bounds(0.98)), rel=1e-6
    )
    for mine, theirs in ((shifted.lambda_max, base.lambda_max), (shifted.lambda_min, base.lambda_min)):
        assert mine.value == pytest.approx(theirs.value + shift)
    assert shifted.outliers.high.count == base.outliers.high.count == 3
    assert shifted.outliers.high.values == pytest.approx(base.outliers.high.values + shift)
    assert (shifted.bulk_edges.low, shifted.bulk_edges.high) == pytest.approx(
        (base.bulk_edges.low + shift, base.bulk_edges.high + shift)
    )
    mine, theirs = shifted.free_cumulants(), base.free_cumulants()
    assert mine.k1.mean == pytest.approx(theirs.k1.mean + shift)
    for name in ("k2", "k3", "k4", "skew", "kurtosis"):
        assert getattr(mine, name).mean == pytest.approx(getattr(theirs, name).mean, rel=1e-6, abs=1e-9)
        assert getattr(mine, name).stderr == pytest.approx(getattr(theirs, name).stderr, rel=1e-6)


@pytest.mark.parametrize("width", [1e-3, 1e-4, 1e-5])
def test_free_cumulants_of_a_narrow_bulk_far_from_zero(width):
    """Weight decay in the loss, say: powers about zero had its kurtosis as 34 +- 0 at a width of 1e-4."""
    base = spectrum_of(semicircle(2000), 60).free_cumulants()
    found = spectrum_of(1 + width * semicircle(2000), 60).free_cumulants()
    for mine, theirs in ((found.skew, base.skew), (found.kurtosis, base.kurtosis)):
        assert (mine.mean, mine.stderr) == pytest.approx((theirs.mean, theirs.stderr), rel=1e-3)
    assert found.k1.mean == pytest.approx(1 + width * base.k1.mean)


class NarrowBulk:
    """One level of 1 above a bulk of half-width 1e-4, which float32 resolves to a few parts of it."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, n=20_000):
        bulk = 1e-4 * (2 * np.random.default_rng(0).beta(1.5, 1.5, n - 1) - 1)
        self.values = torch.tensor(np.append(bulk, 1.0), dtype=torch.float32)
        self.size = n

    def matmat(self, V):
        return V * self.values


def test_a_bulk_that_is_narrow_beside_the_largest_eigenvalue_keeps_its_sampling_error():
    """Its nodes are within rounding of the largest of each other, but they are all of the trace's variance."""
    operator = NarrowBulk()
    truth = float(operator.values.double().sum())
    traces = [estimate_spectrum(operator, steps=60, seed=seed).trace for seed in range(30)]
    z = np.array([(trace.mean - truth) / trace.stderr for trace in traces])
    assert 0.6 < np.sqrt(np.mean(z**2)) < 1.5
    assert (np.abs(z) < 4).all()
