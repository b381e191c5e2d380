"""Real curvature: softmax regression on scikit-learn's digits, 650 parameters, exact Hessians of batches of 64."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_rmt import level_statistics

CLASSES, BATCH, BATCHES = 10, 64, 28


def probabilities(weights, x):
    scores = x @ weights.T
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def hessian(weights, x):
    """``mean of (diag p - p p') kron x x'``, in closed form."""
    p = probabilities(weights, x)
    middle = np.einsum("ba,ac->bac", p, np.eye(CLASSES)) - p[:, :, None] * p[:, None, :]
    whole = np.einsum("bac,bi,bj->aicj", middle, x, x, optimize=True) / len(x)
    size = weights.size
    return whole.reshape(size, size)


@pytest.fixture(scope="module")
def readings():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = np.append(x / 16, np.ones((len(x), 1)), axis=1)
    rng = np.random.default_rng(0)
    weights = rng.uniform(-1, 1, size=(CLASSES, 65)) / 65**0.5
    start, velocity = weights.copy(), np.zeros_like(weights)
    for _ in range(100):
        order = rng.permutation(len(x))
        for first in range(0, len(x) - BATCH + 1, BATCH):
            batch = order[first : first + BATCH]
            error = probabilities(weights, x[batch])
            error[np.arange(BATCH), y[batch]] -= 1
            velocity = 0.9 * velocity - 0.01 * error.T @ x[batch] / BATCH
            weights = weights + velocity

    def of(w):
        batches = [x[first : first + BATCH] for first in range(0, BATCHES * BATCH, BATCH)]
        return level_statistics([np.linalg.eigvalsh(hessian(w, batch)) for batch in batches])

    assert np.mean(probabilities(weights, x).argmax(axis=1) == y) == pytest.approx(0.967, abs=0.005)
    return {"untrained": of(start), "trained": of(weights), "zero": of(np.zeros_like(weights))}


def test_trained_levels_repel(readings):
    """13 000 levels show a difference of .011, and these are at the verge of being told from GOE.

    Over seeds 0 to 5: ratio .524 to .529, p .012 to .12 ("repel" six times) at this learning rate; p .004 to .044 ("repel"
    four times) at .006. At .1 (accuracy .991, seeds 0 to 3) .522 to .528, p .003 to .07, "intermediate" three times.
    """
    trained = readings["trained"]
    assert trained.spacing_ratio == pytest.approx(0.527, abs=0.01)
    assert trained.z_poisson > 20
    assert trained.verdict_kind == "repel"
    assert trained.z_goe > -2.5
    assert 0.01 < trained.p_value < 0.5
    assert trained.spectra == BATCHES
    assert trained.levels > 10_000
    assert trained.dropped > 4000  # a softmax doesn't see a shift of all scores, nor a pixel that is always dark


def test_trained_levels_are_not_quite_goe(readings):
    """What the p-value of 28 spectra doesn't see, their common exponent does: .84 to .86 for seeds 0 to 5."""
    trained = readings["trained"]
    mean, sd = trained.brody_goe
    assert (trained.brody - mean) / sd < -5
    assert f"Brody exponent, {trained.brody:.2f}, isn't GOE's {mean:.2f}" in trained.verdict


def test_untrained_levels_repel_less(readings):
    """Ratio .464 to .479 over seeds 0 to 5."""
    untrained = readings["untrained"]
    assert 0.44 < untrained.spacing_ratio < 0.51
    assert untrained.verdict.startswith("intermediate (levels repel less than GOE's, and more than Poisson's)")
    assert "Anderson-Darling p < 1e-4" in untrained.verdict
    assert untrained.z_goe < -4
    assert untrained.p_value < 0.01
    assert untrained.verdict_kind == "intermediate"


def test_at_zero_weights_everything_is_ninefold(readings):
    zero = readings["zero"]
    assert zero.verdict_kind == "insufficient"
    assert "50 needed" in zero.verdict
    assert "coincide" in " ".join(zero.notes)
