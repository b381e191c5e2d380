"""What a `SpectralPreconditioner` adds to its base's checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_rmt.optim.progress import Progress

#: Where ``state_dict`` keeps it.
SPECTRAL = "spectral"


def save(progress: Progress, metric: str, optimized: Sequence[Tensor], save_basis: bool) -> dict[str, Any]:
    """The progress in plain types and at most one tensor, with what tells whose it is.

    Args:
        progress: of the optimizer.
        metric: that the eigenvectors are in.
        optimized: the optimizer's parameters.
        save_basis: whether to save the eigenvectors.
    """
    shapes = [list(p.shape) for p in optimized]
    return {"metric": metric, "shapes": shapes, **progress.to_state(optimized, save_basis)}


def refuse_another_model(saved: dict[str, Any], optimized: Sequence[Tensor]) -> None:
    """Looks whether `save` was given parameters of these shapes.

    Raises:
        ValueError: it wasn't.
    """
    shapes = saved["shapes"]
    if len(shapes) != len(optimized):
        raise ValueError(
            f"the checkpoint is of another model: its optimizer has {len(shapes)} parameters, this one {len(optimized)}; "
            "load it into the model that it was saved from"
        )
    for place, (theirs, p) in enumerate(zip(shapes, optimized, strict=True)):
        if tuple(theirs) != tuple(p.shape):
            raise ValueError(
                f"the checkpoint is of another model: parameter {place} of its optimizer has shape {tuple(theirs)}, of "
                f"this one {tuple(p.shape)}; load it into the model that it was saved from"
            )


def restore(progress: Progress, saved: dict[str, Any] | None, metric: str, optimized: Sequence[Tensor]) -> None:
    """Takes over what `save` gave; None: a checkpoint of the base alone, so nothing is known of the curvature."""
    if saved is None:
        progress.forget()
        return
    progress.load(saved, optimized)
    if saved["metric"] != metric and progress.subspace is not None:
        warnings.warn(
            f"the checkpoint's eigenvectors are of the metric {saved['metric']!r}, not {metric!r}: steps are the base "
            "optimizer's until the next refresh",
            stacklevel=3,
        )
        progress.forget()
