"""What a probe is to measure, and what earlier probes found out, as values that go from the callback to the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_rmt.curvature.distributed import RankWeights
from lightning_rmt.live.level_blocks import LevelBlock
from lightning_rmt.live.loss import LossFn

Curvature = Literal["hessian", "ggn", "gradient_covariance"]
Product = Literal["auto", "exact", "finite_difference"]
OutputsFn = Callable[[Any, Any], "tuple[Any, Callable[[Any], Tensor]]"]


@dataclass(frozen=True)
class ProbeSettings:
    """What is measured, and how; the arguments of `SpectrumMonitor` of the same names.

    ``batch_law`` is whether it is this probe's turn to fit the outlier map (``batch_law_every``). ``scale`` is set by the
    probe: the diagonal S that makes a matrix C into S C S, shape (n,); None for C itself.
    """

    curvature: Curvature
    microbatch: int
    product: Product
    parameters: Sequence[str] | None
    levels: Sequence[str] | Literal["auto"] | None
    blocks: Sequence[str] | None
    loss_fn: LossFn | None
    outputs_fn: OutputsFn | None
    autocast: bool
    lanczos_steps: int
    probes: int
    batches: int
    seed: int
    name: str
    rank_weights: RankWeights = "equal"
    noise: bool = False
    batch_law: bool = False
    preconditioned: bool = False
    scale: Tensor | None = None

    @property
    def first_order(self) -> bool:
        """Whether one derivative is enough, so that the model may keep its own kernels."""
        return self.curvature == "hessian" and self.product == "finite_difference"


@dataclass(frozen=True)
class Learned:
    """What a probe has found out about the module, so that the next one needn't; all of it may be forgotten.

    Attributes:
        product: the kind of product that works, where the settings leave it open.
        at_once: whether products with several vectors are faster in one backward pass; None: not measured yet.
        level_block: the block that ``levels="auto"`` stands for; None: not chosen yet.
        no_levels: why there are no level statistics; they are not tried again.
    """

    product: Product
    at_once: bool | None = None
    level_block: LevelBlock | None = None
    no_levels: str | None = None


@dataclass(frozen=True)
class LightEnds:
    """What a light probe is to certify: eigenvalues from the largest down, and from the smallest up."""

    top: int = 1
    bottom: int = 0
