"""What a monitor says of its first probe before it takes it."""

from __future__ import annotations

import math

from torch import nn

from lightning_rmt.curvature.double_precision import double_bytes
from lightning_rmt.live.batch_law import most_products
from lightning_rmt.live.level_blocks import MOST_AUTO, TIME_SHARE, named_block
from lightning_rmt.live.memory import Memory, NoiseVectors
from lightning_rmt.live.noise import RANDOM, RESOLVED
from lightning_rmt.live.settings import ProbeSettings
from lightning_rmt.probe import Forecast

_MEBI = 2**20


def announcement(
    module: nn.Module,
    settings: ProbeSettings,
    cost: Forecast,
    memory: Memory,
    ranks: int,
    noise: NoiseVectors | None = None,
) -> str:
    """The cost of the first probe in words: products, seconds, memory.

    Args:
        module: the LightningModule.
        settings: with the groups and the exact blocks that are wanted on top of the spectrum.
        cost: of the spectrum.
        memory: what its graphs take, and what is free.
        ranks: processes that share it; memory is that of one.
        noise: what the noise's vectors take; None: nothing.
    """
    each = cost.seconds / max(cost.products, 1)
    products = products_of_a_probe(settings, cost) + most_products(settings)
    where = "" if ranks == 1 else f" on each of {ranks} ranks"
    noise = noise or NoiseVectors()
    held = memory.graphs + noise.directions + max(cost.basis_bytes, noise.working)
    vectors = f", {sum(noise) / _MEBI:.2g} for the noise's vectors, most of it after the basis" if sum(noise) else ""
    said = (
        f"SpectrumMonitor {settings.name!r}: the first probe takes at most {products} products, about "
        f"{products * each:.2g} s, and {held / _MEBI:.2g} MiB ({cost.basis_bytes / _MEBI:.2g} for its basis, "
        f"{memory.graphs / _MEBI:.2g} for graphs{vectors}) of {memory.free / _MEBI:.0f} MiB free{where}"
    )
    if settings.batch_law:
        said = f"{said}; more where products take as long on few samples, which most of the outlier law's have"
    if settings.levels is None:
        return said
    copy = double_bytes(module.modules())
    if settings.levels == "auto":
        rows = min(MOST_AUTO, sum(p.numel() for p in module.parameters() if p.requires_grad))
        limit = f"at most {TIME_SHARE:g} times as long"
    else:
        sizes = [size for pattern in settings.levels if (size := _size(module, pattern, settings))]
        if not sizes:
            return said
        rows = max(sizes)
        limit = f"{sum(sizes) * settings.batches} rows, each no dearer than a product in float64"
    return (
        f"{said}; then level statistics from the exact Hessian of up to {rows} parameters ({limit}, "
        f"{(copy + 4 * 8 * rows**2) / _MEBI:.2g} MiB after the rest is freed)"
    )


def too_short(name: str, max_overhead: float, total_steps: float, full_steps: float) -> str:
    """That the budget pays for no full probe after the first, in words, and what to set.

    Args:
        name: the monitor's.
        max_overhead: its share of the training's time.
        total_steps: steps of the whole training, infinity where only its time is limited.
        full_steps: how many steps take as long as a full probe.
    """
    length = "" if math.isinf(total_steps) else f" of {total_steps:.0f} steps"
    return (
        f"SpectrumMonitor {name!r}: a full probe takes as long as {full_steps:.0f} steps, so that {100 * max_overhead:.3g} "
        f"% of this training{length} pay for no second one, at most for light ones. To see more of it, say when "
        "(every_n_steps=, light_every_n_steps=), allow more (max_overhead=), or make probes smaller (lanczos_steps=50, "
        "levels=None)"
    )


def products_of_a_probe(settings: ProbeSettings, cost: Forecast) -> int:
    """Of the whole spectrum, of the groups' and of the noise, at most; those of an outlier law aside."""
    noise = RANDOM + RESOLVED if settings.noise and settings.product != "finite_difference" else 0
    return cost.products + len(settings.blocks or ()) * settings.lanczos_steps + noise


def _size(module: nn.Module, pattern: str, settings: ProbeSettings) -> int:
    """Number of parameters in a block; 0 where there is none now, which is said when its turn comes."""
    try:
        return sum(part.size for part in named_block(module, pattern, settings.parameters).slices(module))
    except ValueError:
        return 0
