"""A probe feeds the preconditioner of the training: eigenpairs, spectrum and noise of the curvature in its own metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.krylov.eigenpairs import EigenPairs
from lightning_rmt.krylov.lanczos import SymmetricOperator
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.memory import Memory
from lightning_rmt.live.noise import measure_noise
from lightning_rmt.live.ranks import Ranks, RefusedError, all_or_none
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.live.training import dataset_size
from lightning_rmt.optim.spectral_preconditioner import SpectralPreconditioner


def due_preconditioner(trainer: Any) -> SpectralPreconditioner | None:
    """The first optimizer that waits for a refresh; None where none does."""
    waiting = (found for found in trainer.optimizers if isinstance(found, SpectralPreconditioner) and found.due)
    return next(waiting, None)


def feed(
    optimizer: SpectralPreconditioner,
    trainer: Any,
    module: Any,
    batches: Sequence[CapturedBatch],
    operator: CurvatureOperator,
    settings: ProbeSettings,
    ranks: Ranks,
    memory: Memory,
    *,
    samples: int,
    exact: bool,
    mixed_precision: bool,
    seed: int,
) -> tuple[str, ...]:
    """Refreshes the preconditioner from a probe's operator, on all ranks or on none; releases the operator.

    Called inside the fence, by all ranks.

    Args:
        optimizer: waits for it.
        trainer: knows how large the training data are.
        module: the LightningModule.
        batches: this rank's curvature batches.
        operator: the curvature on them.
        settings: which matrix of which parameters.
        ranks: all that take part.
        memory: what graphs may take.
        samples: in the curvature batches, over all ranks.
        exact: whether products are, on every rank.
        mixed_precision: whether the fence computes in it.
        seed: of the random vectors.

    Returns:
        Sentences: what the noise was taken for, and why there is no refresh.
    """
    notes: list[str] = []

    def over_ranks(one: CurvatureOperator) -> SymmetricOperator:
        if ranks.group is None:
            return one
        return RankSum(one, ranks.group, weights=settings.rank_weights, sharded=False)

    def noise(pairs: EigenPairs) -> float:
        operator.release()  # its graphs are in the way of the halves'
        found, reasons = measure_noise(
            module,
            batches,
            lambda: pairs.vectors,
            settings,
            ranks,
            memory,
            exact=exact,
            mixed_precision=mixed_precision,
            seed=seed,
            over_ranks=lambda half: optimizer.in_metric(over_ranks(half)),
        )
        if found is None:
            notes.append(f"the preconditioner takes the batch's curvature for the truth{_because(reasons)}")
            return 0.0
        return found.at(samples, max(dataset_size(trainer), samples)).mean

    try:
        shared = all_or_none(ranks, lambda: over_ranks(_whole(operator, optimizer)))
        all_or_none(ranks, lambda: optimizer.in_metric(shared))  # what may fail on one rank does so here
        all_or_none(ranks, lambda: optimizer.refresh(shared, noise=noise))
    except RefusedError as error:
        optimizer.forget()  # or some ranks would shrink their steps, and others not
        notes.append(f"the preconditioner wasn't refreshed and takes its base's steps: {error}")
    finally:
        operator.release()
    return tuple(notes)


def state_of(optimizer: SpectralPreconditioner) -> dict[str, float]:
    """What a refresh led to, see `Reading.preconditioner`."""
    found = optimizer.deflation
    if found is None:
        return {"rank": 0.0}
    active = found if optimizer.active else None
    state = {"rank": float(0 if active is None else active.rank), "edge": found.edge}
    if active is not None:
        state["smallest_factor"] = float(active.factors(optimizer.damping).min())
    if optimizer.cosine is not None:
        state["cosine"] = optimizer.cosine
    return state


def _because(reasons: Sequence[str]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""


def _whole(operator: CurvatureOperator, optimizer: SpectralPreconditioner) -> CurvatureOperator:
    """The operator, if the optimizer's parameters are whole on every rank.

    Raises:
        RefusedError: they are sharded.
    """
    if any(hasattr(p, "_local_tensor") for group in optimizer.param_groups for p in group["params"]):
        raise RefusedError("its parameters are sharded over the ranks, and its vectors would have to be")
    return operator
