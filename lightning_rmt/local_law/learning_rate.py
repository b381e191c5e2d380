"""A learning rate for SGD from the largest eigenvalue of the Hessian, and how far it can be trusted."""

from __future__ import annotations

from lightning_rmt.local_law.arguments import positive
from lightning_rmt.spectra.levels import Level

EARLY = 10
"""The rule was measured before the first steps; later on the sharpness has adapted to the learning rate in use."""

CAVEAT = (
    "measured once, at the beginning, since later on the sharpness adapts to the learning rate in use; over 11 small tasks "
    "(SGD, momentum 0.9) the best learning rate was 0.76 to 6 over lambda_max on ten and 12 on one, and with 2 over "
    "lambda_max the final loss was 2.2 times that of a tuned one in the geometric mean, 11 times at worst (the best single "
    "learning rate for all tasks: 5.2, and 100). A place to start, for SGD only: for Adam the same rule does worse than a "
    "fixed one"
)


def sgd_learning_rate(lambda_max: float) -> float:
    """``2 / lambda_max``: where gradient descent on the quadratic loses its stability. See `CAVEAT`.

    Raises:
        ValueError: ``lambda_max`` isn't positive and finite.
    """
    return 2.0 / positive(lambda_max, "lambda_max")


def suggestion(lambda_max: Level | None, step: int) -> tuple[float | None, str]:
    """A learning rate for SGD, and how far to trust it; or None, and why there is none.

    Args:
        lambda_max: largest eigenvalue of the whole Hessian; None where nobody measures it.
        step: optimizer steps before it was measured.
    """
    if lambda_max is None:
        return None, "no learning rate is suggested: that takes a SpectrumMonitor of the Hessian of all parameters"
    if step > EARLY:
        return None, (
            f"no learning rate is suggested: lambda_max was measured after step {step}, when the sharpness has adapted to "
            "the learning rate in use, so that the rule would return that one"
        )
    if not lambda_max.certified:
        return None, "no learning rate is suggested: lambda_max isn't certified; more Lanczos steps settle it"
    if not lambda_max.value > 0:
        return None, f"no learning rate is suggested: lambda_max is {lambda_max.value:.3g}, not positive"
    return sgd_learning_rate(lambda_max.value), CAVEAT
