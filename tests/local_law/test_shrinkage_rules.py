"""Linear shrinkage against the best one, found with the truth."""

from __future__ import annotations

import numpy as np
import pytest
from known_spectra import goe, marchenko_pastur, spectrum_of
from noisy_matrices import wigner

from lightning_rmt.local_law import NoDampingError, ledoit_wolf, linear_shrinkage, smallest_damping

N, NOISE = 800, 0.5


def oracle(noisy, target):
    """Intensity with the smallest Frobenius distance from the truth."""
    matrix = (noisy.vectors * noisy.levels) @ noisy.vectors.T
    away, wanted = matrix - target * np.eye(matrix.shape[0]), np.diag(noisy.truth - target)
    return np.sum(away * wanted) / np.sum(away**2)


@pytest.mark.parametrize("kind", ["bulk", "power"])
def test_the_intensity_is_the_best_one(kind):
    """The oracle within 2 %, for a target of 1 and for the mean eigenvalue."""
    noisy = wigner(kind, NOISE, N)
    mean = float(noisy.levels.mean())
    assert linear_shrinkage(NOISE, noisy.spectrum).intensity == pytest.approx(oracle(noisy, 1.0), rel=0.02)
    found = ledoit_wolf(NOISE, noisy.spectrum)
    assert found.intensity == pytest.approx(oracle(noisy, mean), rel=0.02)
    assert found.target == pytest.approx(mean, abs=0.04)  # the probes' sampling


def test_damping_is_shrinkage():
    """The identity, exactly: ``a H + (1 - a) t I = a (H + d)``."""
    levels = np.sort(np.random.default_rng(0).uniform(0, 3, 50))
    for found in (linear_shrinkage(0.4, spectrum_of(levels, 50)), ledoit_wolf(0.4, spectrum_of(levels, 50))):
        shrunk = found.intensity * levels + (1 - found.intensity) * found.target
        np.testing.assert_allclose(found.learning_rate_factor / (levels + found.damping), 1 / shrunk, rtol=1e-12)


def test_it_ignores_the_bulk_edge():
    """Why it isn't the default: the damped matrix has eigenvalues of either sign."""
    noisy = wigner("spikes", 1.0, 800)
    assert ledoit_wolf(1.0, noisy.spectrum).damping < smallest_damping(1.0, noisy.spectrum) / 4


def test_scale():
    """T6: Ledoit and Wolf's rule scales, a target of 1 doesn't."""
    levels = marchenko_pastur(500)
    one, other = spectrum_of(levels, 40), spectrum_of(1e-3 * levels, 40)
    assert ledoit_wolf(3e-4, other).damping == pytest.approx(1e-3 * ledoit_wolf(0.3, one).damping, rel=1e-6)
    assert linear_shrinkage(3e-4, other).damping != pytest.approx(1e-3 * linear_shrinkage(0.3, one).damping, rel=0.5)


def test_limits_and_refusals():
    spectrum = spectrum_of(marchenko_pastur(500), 40)
    assert ledoit_wolf(0.0, spectrum).damping == 0
    drowned = ledoit_wolf(5.0, spectrum)
    assert (drowned.intensity, drowned.damping, drowned.learning_rate_factor) == (0, np.inf, np.inf)
    assert linear_shrinkage(0.0, spectrum_of(np.ones(10), 2)).damping == 0
    with pytest.raises(NoDampingError, match="the mean eigenvalue is -"):
        ledoit_wolf(0.1, spectrum_of(goe(200, np.random.default_rng(0)) - 1, 40))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="noise must be finite"):
            ledoit_wolf(bad, spectrum)
        with pytest.raises(ValueError, match="noise must be finite"):
            linear_shrinkage(bad, spectrum)
    with pytest.raises(ValueError, match="the target must be above 0"):
        linear_shrinkage(0.1, spectrum, target=0.0)
    with pytest.raises(TypeError, match=r"lightning_rmt\.Spectrum"):
        ledoit_wolf(0.1, None)
