"""``X W X'``: the law against simulated matrices, and against its quartic solved by continuation."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_levels import bulk_of, kolmogorov, mass_error

from lightning_rmt.laws import ProductWigner
from lightning_rmt.laws.bulk import BulkMoments, FreeCumulantsOf, NoFitError


def quartic(z, ratio, scale):
    """Coefficients in g of ``(s g h)^2 - h + 1`` with ``h = 1 + (z g - 1) / c``, highest first."""
    h = np.array([z / ratio, 1 - 1 / ratio])
    equation = np.convolve(np.array([scale**2, 0, 0]), np.convolve(h, h))
    equation[-2:] -= h
    equation[-1] += 1
    return equation


def by_continuation(x, ratio, scale):
    """The density at x: the root that ``1 / z`` becomes on the way down from far above the real line."""
    g = None
    for height in np.geomspace(1e3, 1e-7, 400):
        z = x + 1j * height
        roots = np.roots(quartic(z, ratio, scale))
        g = roots[np.argmin(np.abs(roots - (1 / z if g is None else g)))]
    return -g.imag / np.pi


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_the_density_is_that_of_the_continued_root(ratio):
    law = ProductWigner(ratio, 1.5)
    x = np.array([0.05, 0.3, 0.6, 0.9, 0.99]) * law.edges[1]
    np.testing.assert_allclose(law.density(x), [by_continuation(v, ratio, 1.5) for v in x], rtol=1e-4)


def test_the_largest_imaginary_part_is_the_wrong_root():
    """Negative control: that branch has too much mass."""
    law = ProductWigner(0.3)
    x = np.linspace(*law.edges, 801)[1:-1:2]
    wrong = [np.abs(np.roots(quartic(v, 0.3, 1.0)).imag).max() / np.pi for v in x]
    assert np.trapezoid(wrong, x) > 1.5 * np.trapezoid(law.density(x), x)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.95, 1.0, 1.05, 2.0, 20.0])
def test_the_mass_and_the_moments_are_right(ratio):
    law = ProductWigner(ratio, 2.0)
    assert law.atom == pytest.approx(max(0, 1 - ratio))
    assert abs(mass_error(law)) < 1e-4
    assert law.moment(1) == pytest.approx(0, abs=1e-9)
    assert law.moment(2) == pytest.approx(4 * ratio, rel=1e-4)
    assert law.moment(4) == pytest.approx(16 * (2 * ratio + 2 * ratio**2), rel=1e-4)
    assert np.isfinite(law.density([0.0])).all()


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_a_simulated_matrix_has_the_law(ratio):
    law = ProductWigner(ratio, 2.0)
    levels = law.rvs(2000, np.random.default_rng(0))
    assert (levels == 0).mean() == pytest.approx(law.atom, abs=1e-3)
    assert kolmogorov(levels, law) < 0.006


def test_the_levels_are_those_of_the_plain_product():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((1000, 300)) / 1000**0.5
    w = rng.standard_normal((300, 300))
    levels = np.linalg.eigvalsh(x @ (w + w.T) @ x.T / 600**0.5)
    levels[np.abs(levels) < 1e-12] = 0
    assert kolmogorov(levels, ProductWigner(0.3)) < 0.01


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
def test_the_parameters_come_back(ratio):
    fit = ProductWigner.from_bulk(bulk_of(ProductWigner(ratio, 2.0).rvs(2000, np.random.default_rng(1))))
    assert fit.ratio == pytest.approx(ratio, rel=0.05)
    assert fit.scale == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("k4", "zero", "reason"), [(-0.1, 0, "positive"), (4.0, 0, "mass 0.5 at zero")])
def test_bulks_of_other_families_are_refused(k4, zero, reason):
    k = FreeCumulantsOf(0, 1, 0, k4)
    with pytest.raises(NoFitError, match=reason):
        ProductWigner.from_bulk(BulkMoments(k, k, zero))


@pytest.mark.parametrize("bad", [(0,), (-1,), (1, 0), (float("nan"),)])
def test_bad_parameters_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        ProductWigner(*bad)
