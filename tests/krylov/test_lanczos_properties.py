"""What must hold of every Lanczos run, whatever the spectrum: shapes, dtypes, scales and lengths of run drawn at random.

Errors are measured in units of `rounding_noise(dtype)`, twenty times the machine epsilon, of the largest eigenvalue. That
covers the rounding of a product and of an inner product of 300 terms (about sqrt(300) = 17 epsilon); a run is allowed twice
as much. What a broken recurrence shows is larger by many orders of magnitude, as the controls at the end see.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_rmt.krylov.lanczos import lanczos, rounding_noise, start_vector
from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.spectra.levels import noise_floor
from lightning_rmt.spectra.spectrum import Spectrum

TWICE = 2.0  # the allowance, in units of `rounding_noise`
FUZZ = settings(derandomize=True, deadline=None, max_examples=150)

SPECTRA = {
    "uniform": lambda n, rng: rng.uniform(-1, 1, n),
    "semicircle": lambda n, rng: 2 * rng.beta(1.5, 1.5, n) - 1,
    "negative": lambda n, rng: -rng.chisquare(3, n),
    "clustered": lambda n, rng: (
        rng.choice(rng.uniform(-1, 1, rng.integers(1, 5)), n) + 10 ** rng.uniform(-14, -2) * rng.standard_normal(n)
    ),
    "degenerate": lambda n, rng: rng.choice(rng.uniform(-1, 1, rng.integers(1, 8)), n),
    "one value": lambda n, rng: np.full(n, rng.uniform(-1, 1)),
    "zero": lambda n, rng: np.zeros(n),
    "rank-deficient": lambda n, rng: np.where(np.arange(n) < rng.integers(0, n + 1), rng.uniform(-1, 1, n), 0.0),
    "graded": lambda n, rng: 10 ** rng.uniform(-12, 0, n),
    "graded, both signs": lambda n, rng: 10 ** rng.uniform(-12, 0, n) * rng.choice([-1, 1], n),
    "power law": lambda n, rng: np.arange(1.0, n + 1) ** -rng.uniform(0.3, 3),
    "outliers": lambda n, rng: np.where(rng.random(n) < 0.05, rng.uniform(2, 50, n), rng.chisquare(3, n) / 3),
}


class Diagonal:
    """An operator with these eigenvalues, which it keeps exactly; remembers the vectors that it was given."""

    def __init__(self, eigenvalues, dtype):
        self.values = torch.as_tensor(eigenvalues, dtype=dtype)
        self.size, self.dtype, self.device = len(eigenvalues), dtype, torch.device("cpu")
        self.seen = []

    @property
    def eigenvalues(self):
        return np.sort(self.values.double().numpy())

    @property
    def matrix(self):
        return np.diag(self.values.double().numpy())

    def matmat(self, V):
        self.seen.append(V.clone())
        return V * self.values


class Dense(Diagonal):
    """The same, turned: products round, and the eigenvalues are those of the rounded matrix."""

    def __init__(self, eigenvalues, dtype):
        super().__init__(eigenvalues, dtype)
        Q = np.linalg.qr(np.random.default_rng(self.size).standard_normal((self.size, self.size)))[0]
        rounded = torch.as_tensor((Q * eigenvalues) @ Q.T, dtype=dtype)
        self.dense = rounded.tril() + rounded.tril(-1).mT

    @property
    def eigenvalues(self):
        return np.linalg.eigvalsh(self.matrix)

    @property
    def matrix(self):
        return self.dense.double().numpy()

    def matmat(self, V):
        self.seen.append(V.clone())
        return V @ self.dense


@dataclass(frozen=True)
class Setting:
    """All that a run depends on. Its repr, which a failure shows, is enough to repeat it."""

    spectrum: str
    size: int
    seed: int
    steps: int
    dtype: torch.dtype = torch.float64
    decade: int = 0
    sign: int = 1
    dense: bool = False
    reorthogonalise: bool = True

    def operator(self, factor=1.0):
        eigenvalues = SPECTRA[self.spectrum](self.size, np.random.default_rng(self.seed))
        made = Dense if self.dense else Diagonal
        return made(self.sign * eigenvalues * 10.0**self.decade * factor, self.dtype)

    def run(self, factor=1.0):
        operator = self.operator(factor)
        start = start_vector(operator, self.seed % 1000)
        before = start.clone()
        run = lanczos(operator, start, self.steps, reorthogonalise=self.reorthogonalise)
        assert torch.equal(start, before)
        return Run(operator, start, run)


@dataclass(frozen=True)
class Run:
    """A run with its vectors, and how far it is from what is true of exact runs, in units of rounding noise."""

    operator: Diagonal
    start: torch.Tensor
    tridiagonal: Tridiagonal

    @property
    def noise(self):
        return rounding_noise(self.operator.dtype)

    @cached_property
    def eigenvalues(self):
        return self.operator.eigenvalues

    @property
    def scale(self):
        return float(np.abs(self.eigenvalues).max()) or 1.0

    @cached_property
    def basis(self):
        """Rows are the vectors that the operator was given, as long as they count."""
        return torch.cat(self.operator.seen).double().numpy()[: self.tridiagonal.steps]

    def lack_of_orthogonality(self):
        return np.abs(self.basis @ self.basis.T - np.eye(len(self.basis))).max() / self.noise

    def remainder(self):
        """``A Q - Q T``, row by row (our vectors are rows), without its last row, and that last row."""
        t = self.tridiagonal
        T = np.diag(t.alpha) + np.diag(t.beta[:-1], 1) + np.diag(t.beta[:-1], -1)
        rows = self.basis @ self.operator.matrix - T @ self.basis
        return rows[:-1], rows[-1]

    def error_of_the_recurrence(self):
        inner, last = self.remainder()
        error = np.append(np.linalg.norm(inner, axis=1), abs(np.linalg.norm(last) - self.tridiagonal.beta[-1]))
        return error.max() / (self.noise * self.scale)

    def distance(self, values):
        """From each value to the nearest eigenvalue."""
        return np.abs(np.asarray(values)[:, None] - self.eigenvalues[None]).min(1)

    def spectrum(self):
        return Spectrum((self.tridiagonal,), self.operator.size, self.tridiagonal.steps, self.noise)


@st.composite
def settings_of_runs(draw, reorthogonalise=None, decades=(-20, -5, 0, 3, 20), dtypes=(torch.float32, torch.float64)):
    size = draw(st.one_of(st.integers(1, 12), st.integers(1, 300)))
    return Setting(
        spectrum=draw(st.sampled_from(sorted(SPECTRA))),
        size=size,
        seed=draw(st.integers(0, 2**31)),
        steps=draw(st.integers(1, size + 5)),
        dtype=draw(st.sampled_from(dtypes)),
        decade=draw(st.sampled_from(decades)),
        sign=draw(st.sampled_from([1, -1])),
        dense=draw(st.booleans()) if size <= 80 else False,
        reorthogonalise=draw(st.booleans()) if reorthogonalise is None else reorthogonalise,
    )


@FUZZ
@given(settings_of_runs())
def test_coefficients_weights_and_length(setting):
    run = setting.run().tridiagonal
    assert run.steps == min(setting.steps, setting.size) or (run.steps < setting.steps and run.exhausted)
    assert np.isfinite([run.alpha, run.beta]).all()
    assert (run.beta >= 0).all()
    assert (run.beta[:-1] > 0).all()
    assert (run.weights >= 0).all()
    assert run.weights.sum() == pytest.approx(1, abs=1e-13)
    assert (np.diff(run.nodes) >= 0).all()
    assert (run.residuals >= 0).all()


@FUZZ
@given(settings_of_runs(reorthogonalise=True))
def test_the_basis_is_orthonormal(setting):
    assert setting.run().lack_of_orthogonality() <= TWICE


@FUZZ
@given(settings_of_runs())
def test_three_term_recurrence(setting):
    """Also without reorthogonalisation, and where orthogonality is long lost: it is local (Paige 1976)."""
    assert setting.run().error_of_the_recurrence() <= TWICE


@FUZZ
@given(settings_of_runs(reorthogonalise=True))
def test_the_last_remainder_is_new(setting):
    """It is orthogonal to every vector before, unless it is nothing but rounding."""
    run = setting.run()
    _, last = run.remainder()
    assert np.abs(run.basis @ last).max() <= TWICE * run.noise * run.scale


@FUZZ
@given(settings_of_runs(reorthogonalise=True))
def test_an_eigenvalue_lies_within_the_residual_of_every_ritz_value(setting):
    run = setting.run()
    t = run.tridiagonal
    assert (run.distance(t.nodes) <= t.residuals + TWICE * run.noise * run.scale).all()
    low, high = run.eigenvalues[[0, -1]] + TWICE * run.noise * run.scale * np.array([-1, 1])
    assert low <= t.nodes[0]
    assert t.nodes[-1] <= high


@FUZZ
@given(settings_of_runs(reorthogonalise=False))
def test_ritz_values_of_a_three_vector_run(setting):
    """Paige (1980): near an eigenvalue within 2.5 residuals, and inside of the spectrum, up to errors that add up."""
    run = setting.run()
    t = run.tridiagonal
    rounding = t.steps * TWICE * run.noise * run.scale
    assert (run.distance(t.nodes) <= 2.5 * t.residuals + rounding).all()
    assert run.eigenvalues[0] - rounding <= t.nodes[0]
    assert t.nodes[-1] <= run.eigenvalues[-1] + rounding


@FUZZ
@given(settings_of_runs(decades=(0,)))
def test_the_quadrature_is_exact_up_to_degree_2m_minus_1(setting):
    assume(not setting.dense)
    run = setting.run()
    t = run.tridiagonal
    nodes, eigenvalues = t.nodes / run.scale, np.diag(run.operator.matrix) / run.scale
    seen = run.start.double().numpy() ** 2
    for degree in range(min(2 * t.steps, 40)):
        error = t.weights @ nodes**degree - seen @ eigenvalues**degree
        assert abs(error) <= (degree + 1) * TWICE * run.noise


@FUZZ
@given(settings_of_runs(reorthogonalise=True))
def test_certified_levels_are_eigenvalues(setting):
    run = setting.run()
    spectrum = run.spectrum()
    for level in (spectrum.lambda_max, spectrum.lambda_min, *spectrum.top, *spectrum.bottom):
        error = run.distance([level.value])[0]
        assert error <= level.residual  # certified or not
        if level.certified:
            # To eight digits; in single precision as well as its products are known.
            coarse = run.noise * (abs(level.value) + run.scale) if setting.dtype == torch.float32 else 0.0
            assert level.residual <= max(1e-8 * abs(level.value), coarse)
            assert abs(level.value) > noise_floor(run.noise) * run.scale
    for levels in (spectrum.top, spectrum.bottom):
        assert all(level.certified for level in levels)
        nearest = [np.abs(run.eigenvalues - level.value).argmin() for level in levels]
        direction = -1 if levels is spectrum.top else 1
        assert (direction * np.diff(run.eigenvalues[nearest]) > 0).all()  # in order, none twice
    assert spectrum.top[:1] in ((), (spectrum.lambda_max,))
    assert spectrum.bottom[:1] in ((), (spectrum.lambda_min,))


@FUZZ
@given(
    size=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    decade=st.sampled_from([-20, 0, 20]),
)
def test_trace_and_norm_of_a_run_through_the_whole_space_are_exact(size, seed, dtype, decade):
    """Where eigenvalues can be told apart, from each other and from zero."""
    rng = np.random.default_rng(seed)
    values = (np.arange(size) + 0.5 + rng.uniform(-0.3, 0.3, size)) * rng.choice([-1, 1], size) / size
    operator = Diagonal(values * 10.0**decade, dtype)
    spectrum = estimate_spectrum(operator, steps=size, seed=seed % 1000)
    (run,) = spectrum.runs
    assert run.exhausted
    # Nothing is left to know, but the rule for weights takes a level of 16 times its share for a degenerate one.
    assume(run.steps == size and run.weights.max() < 16 / size)
    rounding = TWICE * rounding_noise(dtype) * np.abs(operator.eigenvalues).max() * size**0.5
    assert spectrum.trace.mean == pytest.approx(operator.eigenvalues.sum(), abs=rounding)
    assert spectrum.frobenius.mean == pytest.approx(np.linalg.norm(operator.eigenvalues), abs=rounding)
    assert spectrum.trace.stderr <= rounding
    assert spectrum.frobenius.stderr <= rounding
    np.testing.assert_allclose(run.nodes, operator.eigenvalues, rtol=0, atol=rounding)


@FUZZ
@given(settings_of_runs(decades=(0,)), st.integers(-20, 60))
def test_scale_covariance_is_exact_for_powers_of_two(setting, exponent):
    one, scaled = setting.run().tridiagonal, setting.run(2.0**exponent).tridiagonal
    np.testing.assert_array_equal(scaled.alpha, one.alpha * 2.0**exponent)
    np.testing.assert_array_equal(scaled.beta, one.beta * 2.0**exponent)


@FUZZ
@given(settings_of_runs())
def test_the_negated_operator_has_the_mirrored_run(setting):
    """T22: to the last bit, since rounding knows no sign."""
    one, negated = setting.run().tridiagonal, setting.run(-1.0).tridiagonal
    np.testing.assert_array_equal(negated.alpha, -one.alpha)
    np.testing.assert_array_equal(negated.beta, one.beta)


@settings(FUZZ, max_examples=100)
@given(settings_of_runs(), st.integers(1, 3))
def test_every_spectrum_can_be_asked_everything(setting, probes):
    """No exception, no warning, nothing that is not a number."""
    spectrum = estimate_spectrum(setting.operator(), steps=setting.steps, probes=probes, seed=setting.seed % 1000)
    scale = max(abs(spectrum.lambda_max.value), abs(spectrum.lambda_min.value))
    x = np.linspace(-1.2, 1.2, 7) * scale
    numbers = [
        *(spectrum.trace.mean, spectrum.trace.stderr, spectrum.frobenius.mean, spectrum.frobenius.stderr),
        *(spectrum.zero_mass, spectrum.zero_width, spectrum.negative_mass, *spectrum.negative_mass_bounds),
        *(spectrum.quantile(0.01), spectrum.quantile(0.5), spectrum.quantile(0.99), spectrum.moment(1)),
        *(number for level in (spectrum.lambda_max, spectrum.lambda_min) for number in (level.value, level.residual)),
        *(number for level in (*spectrum.top, *spectrum.bottom) for number in (level.value, level.residual)),
        *(*spectrum.cdf(x), *spectrum.density(x), *spectrum.nodes.ravel(), *spectrum.weights.ravel()),
        *(spectrum.free_cumulants().k1.mean, spectrum.free_cumulants().k4.stderr),
    ]
    assert np.isfinite(numbers).all()
    assert spectrum.trace.stderr >= 0
    assert 0 <= spectrum.negative_mass <= 1
    assert 0 <= spectrum.zero_mass <= 1
    assert (np.diff(spectrum.cdf(x)) >= -1e-12).all()
    assert spectrum.outliers.high.verdict
    assert spectrum.outliers.low.verdict


# --- controls: what the properties above would show of a broken run --------------------------------------------------------

CONVERGED = Setting("power law", 200, seed=1, steps=60, dtype=torch.float32)


def test_control_the_settings_of_the_controls_are_good_ones():
    run = CONVERGED.run()
    assert run.lack_of_orthogonality() <= TWICE
    assert run.error_of_the_recurrence() <= TWICE


def test_control_a_run_without_reorthogonalisation_is_seen():
    operator = CONVERGED.operator()
    start = start_vector(operator, 0)
    run = Run(operator, start, lanczos(operator, start, 60, reorthogonalise=False))
    assert run.lack_of_orthogonality() > 1e5


def test_control_an_operator_that_is_not_symmetric_is_seen():
    """Or an error in a product's transpose: with full orthogonalisation the basis alone looks perfect."""
    good = Setting("semicircle", 60, seed=1, steps=20, dense=True)
    operator = good.operator()
    operator.dense = operator.dense + 1e-6 * operator.dense.triu(1)
    start = start_vector(operator, 0)
    run = Run(operator, start, lanczos(operator, start, 20))
    assert run.lack_of_orthogonality() <= TWICE
    assert run.error_of_the_recurrence() > 1e5


@pytest.mark.parametrize("wrong", ["beta moved by one", "alpha moved by one", "alpha of the normalised vector"])
def test_control_wrong_coefficients_are_seen(wrong):
    run = CONVERGED.run()
    alpha, beta = run.tridiagonal.alpha.copy(), run.tridiagonal.beta.copy()
    if wrong == "beta moved by one":
        beta[:-1] = beta[1:]
    elif wrong == "alpha moved by one":
        alpha[1:] = alpha[:-1]
    else:
        alpha *= 1 + 1e-4
    assert Run(run.operator, run.start, Tridiagonal(alpha, beta)).error_of_the_recurrence() > 10


def test_control_a_level_that_is_off_in_its_eighth_digit_is_seen():
    run = Setting("outliers", 200, seed=3, steps=60).run()
    level = run.spectrum().top[0]
    assert run.distance([level.value * (1 + 1e-8)])[0] > level.residual
