from __future__ import annotations

import pytest

from lightning_rmt.local_law.learning_rate import CAVEAT, EARLY, sgd_learning_rate, suggestion
from lightning_rmt.spectra.spectrum import Level


def test_two_over_lambda_max_with_its_reliability():
    assert sgd_learning_rate(8.0) == 0.25
    rate, sentence = suggestion(Level(8.0, 0.01, True), EARLY)
    assert rate == 0.25
    assert sentence == CAVEAT
    for number in ("2.2 times", "11 times at worst", "5.2, and 100", "0.76 to 6", "11 small tasks"):
        assert number in sentence


@pytest.mark.parametrize(
    ("level", "step", "words"),
    [
        (None, 0, "takes a SpectrumMonitor of the Hessian of all parameters"),
        (Level(8.0, 0.0, True), EARLY + 1, "after step 11, when the sharpness has adapted"),
        (Level(8.0, 0.5, False), 0, "isn't certified"),
        (Level(-1.0, 0.0, True), 0, "lambda_max is -1, not positive"),
    ],
)
def test_refusals(level, step, words):
    rate, sentence = suggestion(level, step)
    assert rate is None
    assert sentence.startswith("no learning rate is suggested: ")
    assert words in sentence


def test_bad_number():
    with pytest.raises(ValueError, match="lambda_max must be finite and above 0, got 0"):
        sgd_learning_rate(0.0)
