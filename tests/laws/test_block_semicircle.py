"""Two coupled networks: the law against simulated matrices and against the block Dyson equation, iterated."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_levels import kolmogorov, mass_error

from lightning_rmt.laws import BlockSemicircle, Semicircle

#: fraction, coupling, block, shift
KNOWN = [(0.5, 1.0, 1.0, 0.0), (0.5, 1.0, 1.0, 1.0), (0.7, 0.6, 1.0, 2.0)]
EXTREME = [
    (0.5, 0.02, 1.0, 0.5),
    (0.5, 1.0, 0.0, 4.0),
    (0.01, 1.0, 1.0, 3.0),
    (0.99, 1.0, 1.0, 3.0),
    (0.3, 1.0, 8.0, 2.0),
    (0.5, 1.0, 1.0, -4.0),
    (0.5, 1.0, 1.0, 2.2),
]


def by_iteration(x, kappa, b, b1, x1):
    """The density at the points x: the block Dyson equation, damped, from far above the real line downwards."""
    g1 = g2 = None
    for height in [*np.geomspace(10, 1e-4, 25), *[1e-5] * 20]:
        z = x + 1j * height
        if g1 is None:
            g1 = g2 = 1 / z
        for _ in range(200):
            g = kappa * g1 + (1 - kappa) * g2
            g1 = (g1 + 1 / (z + x1 - b**2 / 2 * g - b1**2 / 2 * g1)) / 2
            g2 = (g2 + 1 / (z - b**2 / 2 * g)) / 2
    return -(kappa * g1 + (1 - kappa) * g2).imag / np.pi


def quartic(x, kappa, b, b1, x1, sign):
    """Roots of the quartic in ``w``; its coefficient F has the sign +."""
    a = np.array([1, -x, (1 - kappa) * b**2 / 2])
    c = b1**2 / (kappa * b**2)
    equation = np.convolve(a, np.array([1 + c, x1 - c * x, sign * (1 - kappa) * b1**2 / (2 * kappa)]))
    equation[2] += kappa * b**2 / 2
    return np.roots(equation)


@pytest.mark.parametrize("parameters", KNOWN)
def test_a_simulated_matrix_has_the_law(parameters):
    law = BlockSemicircle(*parameters)
    assert kolmogorov(law.rvs(1200, np.random.default_rng(0)), law) < 0.004
    assert kolmogorov(law.rvs(2000, np.random.default_rng(1)), law) < 0.003


@pytest.mark.parametrize("parameters", [*KNOWN, (0.5, 1.0, 1.0, 4.0)])
def test_the_density_solves_the_block_dyson_equation(parameters):
    law = BlockSemicircle(*parameters)
    x = np.concatenate([low + (high - low) * np.linspace(0.02, 0.98, 15) for low, high in law.support])
    np.testing.assert_allclose(law.density(x), by_iteration(x, *parameters), atol=2e-4)


@pytest.mark.parametrize("parameters", [*KNOWN, *EXTREME])
def test_mass_and_moments_are_right(parameters):
    law = BlockSemicircle(*parameters)
    kappa, b, b1, x1 = parameters
    assert abs(mass_error(law)) < 1e-4
    assert law.moment(1) == pytest.approx(-kappa * x1, abs=1e-4)
    assert law.moment(2) == pytest.approx(b**2 / 2 + kappa * (b1**2 / 2 + x1**2), rel=1e-4)
    assert law.cdf([law.edges[0] - 1, law.edges[1] + 1]) == pytest.approx([0, 1])


def test_a_large_shift_splits_the_support():
    law = BlockSemicircle(0.3, 1.0, 1.0, 6.0)
    (_, first), (second, _) = law.support
    assert law.density([(first + second) / 2]) == 0
    assert law.cdf((first + second) / 2) == pytest.approx(0.3, abs=1e-6)
    for low, high in law.support:
        assert (law.density([low - 1e-9, high + 1e-9]) == 0).all()
        # the quartic knows nothing of the edges, and begins to have a root there
        roots = [law._subordination(np.array([low - 1e-6, low + 1e-6, high - 1e-6, high + 1e-6]))]
        assert [(w.imag > 1e-7).tolist() for w in roots] == [[False, True, True, False]]


def test_without_a_block_it_is_a_semicircle():
    law = BlockSemicircle(0.4, 2.0, 0.0)
    x = np.linspace(-3, 3, 50)
    np.testing.assert_allclose(law.density(x), Semicircle(2 * 2**0.5).density(x), atol=1e-9)


@pytest.mark.parametrize("parameters", KNOWN[1:])
def test_the_quartic_with_the_other_sign_or_the_largest_root_is_wrong(parameters):
    """Negative controls: with F < 0, and with the largest imaginary part, the density is off or its mass isn't 1."""
    law = BlockSemicircle(*parameters)
    x = np.linspace(law.edges[0] - 0.5, law.edges[1] + 0.5, 801)
    right = law.density(x)
    b = parameters[1]
    for sign in (-1, 1):
        other = [np.abs(quartic(v, *parameters, sign).imag).max() * 2 / (np.pi * b**2) for v in x]
        assert np.trapezoid(np.abs(other - right), x) > 0.03
    near = [
        np.abs(quartic(v, *parameters, 1).imag * 2 / (np.pi * b**2) - d).min() for v, d in zip(x, right, strict=True)
    ]
    assert max(near) < 1e-6  # the right density is a root of the quartic with F > 0


@pytest.mark.parametrize("bad", [(0, 1, 1), (1, 1, 1), (0.5, 0, 1), (0.5, 1, -1), (0.5, 1, 1, float("inf"))])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        BlockSemicircle(*bad)


@pytest.mark.parametrize("coupling", [3e-3, 1e-4, 1e-9])
def test_a_spike_that_the_grid_misses_is_refused(coupling):
    """Half of this law is a spike of the coupling's width; normalising would turn the other half into all of it."""
    law = BlockSemicircle(0.5, coupling, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"integrates to .* instead of 1"):
        law.moment(1)
    with pytest.raises(ValueError, match="too narrow for the grid"):
        law.cdf(0.0)
