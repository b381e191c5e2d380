"""The loss whose curvature is measured: the `loss_fn` argument, the module's ``curvature_loss``, or ``training_step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_rmt.live.batches import CapturedBatch, copy_batch
from lightning_rmt.live.namespaces import MisconfigurationException

LossFn = Callable[[Any, Any], Any]
Loss = Callable[[CapturedBatch], Any]


def refuse_unusable_loss(module: Any, loss_fn: LossFn | None, who: str = "SpectrumMonitor") -> None:
    """Refuses, before training starts, a module whose loss can't be had by running ``training_step`` again.

    Raises:
        MisconfigurationException: manual optimization or ``training_step(dataloader_iter)``, and neither ``loss_fn`` nor
            the module's ``curvature_loss`` says what the loss is. The message is ``who``'s.
    """
    if loss_fn is not None or callable(getattr(module, "curvature_loss", None)):
        return
    way_out = (
        f"Pass {who}(loss_fn=...), a function of (module, batch) that returns the loss to look at, "
        "or define curvature_loss(self, batch) on the module."
    )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} uses manual optimization: running its training_step again would step its "
            f"optimizers, so {who} can't take the loss from it. {way_out}"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"{type(module).__name__}.training_step takes a dataloader_iter: running it again would consume training "
            f"batches. {way_out}"
        )


def curvature_loss(module: Any, loss_fn: LossFn | None) -> Loss:
    """The loss as a function of a captured batch, to be called inside the fence.

    It runs on a fresh copy of the batch every time, because a ``training_step`` may change its batch.

    Args:
        module: the LightningModule.
        loss_fn: the user's ``(module, batch) -> loss`` or ``(loss, weight)``, or None.

    Returns:
        A function that gives the scalar loss, or a (loss, weight) pair where the user's own function does.
    """
    if loss_fn is not None:
        return lambda captured: loss_fn(module, copy_batch(captured.batch))
    if callable(getattr(module, "curvature_loss", None)):
        return lambda captured: module.curvature_loss(copy_batch(captured.batch))
    return lambda captured: _loss_of_training_step(module, captured)


def _loss_of_training_step(module: Any, captured: CapturedBatch) -> Tensor:
    batch = copy_batch(captured.batch)
    takes_index = _takes_batch_idx(module.training_step)
    output = module.training_step(batch, captured.batch_idx) if takes_index else module.training_step(batch)
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise MisconfigurationException(
                f"training_step returned a dict without a 'loss' (its keys: {sorted(map(str, output))}); return the loss "
                "under 'loss', or pass loss_fn= to SpectrumMonitor"
            )
        output = output["loss"]
    if output is None:
        raise ValueError("training_step returned None for this batch (it skips it), so there is no loss to probe")
    if not isinstance(output, Tensor):
        raise MisconfigurationException(
            f"training_step must return a loss tensor or a dict with one, got {type(output).__name__}; "
            "pass loss_fn= to SpectrumMonitor to say what the loss is"
        )
    return output


def _takes_batch_idx(training_step: Callable[..., Any]) -> bool:
    """Lightning's own rule: a parameter of that name, ``*args``, or at least two positional parameters."""
    parameters = inspect.signature(training_step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL or p.name == "batch_idx" for p in parameters)
