"""The curvature operator of a live module on its captured batches; called inside the fence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from lightning_rmt.curvature.errors import SecondDerivativeError
from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian
from lightning_rmt.curvature.gauss_newton import GaussNewton
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.curvature.parameters import select_parameters
from lightning_rmt.krylov.lanczos import start_vector
from lightning_rmt.live.batches import CapturedBatch, copy_batch
from lightning_rmt.live.loss import LossFn, curvature_loss
from lightning_rmt.live.namespaces import MisconfigurationException

Curvature = Literal["hessian", "ggn", "gradient_covariance"]
Product = Literal["auto", "exact", "finite_difference"]
OutputsFn = Callable[[Any, Any], "tuple[Tensor, Tensor]"]


def refuse_missing_outputs(module: Any, curvature: Curvature, outputs_fn: OutputsFn | None) -> None:
    """Refuses a Gauss-Newton matrix of a module that doesn't say what its outputs are.

    Raises:
        MisconfigurationException: ``curvature="ggn"``, no ``outputs_fn`` and no ``curvature_outputs`` on the module.
    """
    if curvature != "ggn" or outputs_fn is not None or callable(getattr(module, "curvature_outputs", None)):
        return
    raise MisconfigurationException(
        'SpectrumMonitor(curvature="ggn") needs the model\'s outputs and a loss of them: define '
        f"curvature_outputs(self, batch) on {type(module).__name__}, or pass outputs_fn=, a function of (module, batch); "
        "either returns (outputs, loss), the loss computed from those very outputs, for example "
        "`logits = self(x); return logits, cross_entropy(logits, y)`. "
        'curvature="hessian" needs neither.'
    )


def build_operator(
    module: Any,
    captured: Sequence[CapturedBatch],
    *,
    curvature: Curvature,
    product: Product,
    parameters: Sequence[str] | None,
    loss_fn: LossFn | None,
    outputs_fn: OutputsFn | None,
) -> CurvatureOperator:
    """The operator on this rank's batches.

    Args:
        module: the LightningModule, fenced and (if it was sharded) gathered.
        captured: this rank's curvature batches, at least one.
        curvature: which matrix.
        product: ``"auto"`` tries double backward once and falls back to finite differences where an operation has no
            second derivative; its ``check`` has then been passed.
        parameters: name globs, or None for all trainable ones.
        loss_fn: the user's loss, or None.
        outputs_fn: the user's outputs and loss for the Gauss-Newton matrix, or None.

    Raises:
        CurvatureError: the product can't be had; the message says what to do.
        ValueError: the loss or the parameters are unusable.
    """
    chosen = select_parameters(module.named_parameters(), parameters)
    if curvature == "ggn":
        return _gauss_newton(module, chosen, captured, outputs_fn)
    loss = curvature_loss(module, loss_fn)
    if curvature == "gradient_covariance":
        return GradientCovariance(loss, chosen, captured)
    if product == "finite_difference":
        return _finite_differences(loss, chosen, captured)
    hessian = Hessian(loss, chosen, captured)
    if product == "exact":
        return hessian
    try:
        hessian.matvec(start_vector(hessian, 0))
    except SecondDerivativeError:
        hessian.release()
        return _finite_differences(loss, chosen, captured)
    return hessian


def _finite_differences(loss: Any, chosen: Any, captured: Sequence[CapturedBatch]) -> FiniteDifferenceHessian:
    operator = FiniteDifferenceHessian(loss, chosen, captured)
    operator.check()
    return operator


def _gauss_newton(
    module: Any, chosen: Any, captured: Sequence[CapturedBatch], outputs_fn: OutputsFn | None
) -> GaussNewton:
    losses: dict[int, Tensor] = {}

    def outputs(batch: CapturedBatch) -> Tensor:
        copied = copy_batch(batch.batch)
        found = outputs_fn(module, copied) if outputs_fn is not None else module.curvature_outputs(copied)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Tensor)):
            raise TypeError(
                "curvature_outputs must return (outputs, loss), the loss a scalar tensor computed from outputs"
            )
        losses[id(batch)] = found[1]
        return found[0]

    return GaussNewton(outputs, lambda _, batch: losses.pop(id(batch)), chosen, captured)
