"""Refuses strategies under which the probe was never tested, before training starts."""

from __future__ import annotations

from typing import Any

from lightning_rmt.live.namespaces import MisconfigurationException


def under_join(trainer: Any) -> bool:
    """Whether the model trains in torch's `Join` context, where a rank that ran out of batches goes on for the others.

    It answers the collectives of DDP and of nobody else: what a probe sums would be added to those.
    """
    return bool(getattr(getattr(trainer.strategy.model, "_join_config", None), "enable", False))


def refuse_untested_strategy(trainer: Any) -> None:
    """Lets pass: one device, DDP and its variants, and FSDP2 through ModelParallelStrategy without tensor parallelism.

    Raises:
        MisconfigurationException: any other strategy; the message names what to use.
    """
    strategy = trainer.strategy
    kind = type(strategy).__name__
    if "DeepSpeed" in kind or kind in ("FSDPStrategy", "XLAFSDPStrategy", "XLAStrategy"):
        raise MisconfigurationException(
            f"SpectrumMonitor is not tested under {kind}; use DDP, or FSDP2 through ModelParallelStrategy"
        )
    mesh = getattr(strategy, "device_mesh", None)
    if mesh is not None and "tensor_parallel" in (mesh.mesh_dim_names or ()) and mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            "SpectrumMonitor is not tested with tensor parallelism; use ModelParallelStrategy(tensor_parallel_size=1)"
        )


def refuse_untested_sharding(module: Any) -> None:
    """Lets pass: whole parameters, and those that FSDP2 shards over one mesh dimension.

    Asked for once the model is configured: until then it isn't sharded.

    Raises:
        MisconfigurationException: parameters are replicated over groups of ranks (HSDP) or cut by tensor parallelism.
    """
    for name, parameter in module.named_parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and (mesh.ndim > 1 or not all(placement.is_shard() for placement in parameter.placements)):
            raise MisconfigurationException(
                f"SpectrumMonitor is not tested where a parameter is placed as {name!r} is ({parameter.placements} on a "
                f"mesh of shape {tuple(mesh.shape)}: HSDP or tensor parallelism); use fully_shard over one mesh dimension, "
                'self.device_mesh["data_parallel"], or DDP'
            )
