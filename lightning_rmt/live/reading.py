"""What a probe measured, with where in the training that was: a `Reading`."""

from __future__ import annotations

from typing import Any

from lightning_rmt.live.measurement import LiveMeasurement
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.live.training import dataset_size, learning_rate, sharpness_limit
from lightning_rmt.reading import Reading


def reading_of(
    trainer: Any,
    module: Any,
    probed: LiveMeasurement,
    settings: ProbeSettings,
    *,
    step: int,
    seconds: float,
    overhead: float | None,
    light: bool,
) -> Reading:
    """Puts a measurement into the training that it is of, and its noise on the scale of that training's steps.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        probed: the measurement.
        settings: it was made with.
        step: optimizer steps so far.
        seconds: that the probe took.
        overhead: share of the training time that probes take, if that is known.
        light: whether the probe was a light one.
    """
    check, noise, metric = probed.measurement.check, probed.noise, probed.metric
    population = max(dataset_size(trainer), probed.samples)
    # at the end of an epoch a step takes what there is
    step_samples = min(probed.samples / probed.batches * trainer.accumulate_grad_batches, population)
    return Reading(
        step=step,
        epoch=int(trainer.current_epoch),
        spectrum=probed.measurement.spectrum,
        curvature=settings.curvature,
        name=settings.name,
        seconds=seconds,
        samples=probed.samples,
        parameters=probed.parameters,
        learning_rate=learning_rate(trainer),
        overhead=overhead,
        symmetry_error=None if check is None else check.symmetry,
        repeat_error=None if check is None else check.repeat,
        notes=(*probed.warnings, *probed.notes),
        speed="light" if light else "full",
        product="exact" if probed.product_error is None else "finite_difference",
        product_error=probed.product_error,
        levels=probed.levels,
        blocks=probed.blocks,
        preconditioner=probed.preconditioner,
        noise=None if noise is None else noise.at(step_samples, population),
        curvature_noise=None if noise is None else noise.at(probed.samples, population),
        batch_law=probed.batch_law,
        preconditioned=None if metric is None else " and ".join(metric.optimizers),
        stability_limit=None if metric is None else metric.limit,
        sharpness_limit=sharpness_limit(trainer, module, probed.parameters),
    )
