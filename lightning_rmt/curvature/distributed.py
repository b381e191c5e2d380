"""One operator over several processes: the mean of what each has."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.operator import CurvatureOperator
from lightning_rmt.krylov.collectives import all_or_nobody, collective
from lightning_rmt.krylov.shards import EvenShards, Replicated

#: How ranks with different numbers of samples count: each the same, which is what DDP's averaged gradients are of, or by
#: their samples, which is the mean over the data set.
RankWeights = Literal["equal", "samples"]


class RankSum:
    """The operator on the union of all ranks' batches: the weighted mean ``sum_r c_r H_r V`` of their products.

    A product is one local product and one all-reduce, however many tensors, batches and vectors there are;
    the operators are linear in the data, so nothing else is needed. Constructing it takes five more. Every
    rank must construct it and take the same products in the same order; all get the same numbers.

    With ``sharded`` a rank holds its part of every vector only, and an all-gather before the local product with a
    reduce-scatter behind it, which together move the bytes of the all-reduce, take its place.

    A rank whose local product raises keeps the exception in `error`, warns nobody, and contributes NaN from
    then on: every rank sees NaN in that same product, and none waits for another. ``KeyboardInterrupt`` passes.

    Args:
        operator: this rank's share, on the same parameters as the others'. A `GradientCovariance` is pooled,
            so that the result is the covariance around the mean over all ranks.
        group: process group; None: the default one.
        weights: how much a rank counts, whose batches hold N_r samples: c_r = 1/W (``"equal"``) or N_r/N (``"samples"``).
        sharded: `matmat` takes and gives this rank's part of each vector; see `EvenShards`.

    Attributes:
        size: dimension n.
        device: of the vectors, the local operator's.
        dtype: of the vectors.
        shards: which entries this rank holds; `Replicated` where each holds all.
        noise: relative rounding error of a product, the largest of any rank.
        exact: whether every rank's is.
        product_error: relative error of a product as measured, the largest of any rank; None where they are exact.
        samples: total weight of the batches over all ranks.
        loss_value: weighted mean loss over all ranks.
        gradient: weighted mean gradient over all ranks, shape (size,).
        unused: names of the trainable parameters that no rank's loss depends on.
        products: operator-vector products taken so far.
        error: what went wrong on this rank since, or None.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: the ranks' operators have different sizes (raised on every rank).
        OtherRankFailedError: another rank has no memory for its vectors.
        LostRankError: another rank is gone.
    """

    def __init__(
        self,
        operator: CurvatureOperator,
        group: dist.ProcessGroup | None = None,
        *,
        weights: RankWeights = "samples",
        sharded: bool = False,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; a single process needs no RankSum: use the operator itself"
            )
        self.operator = operator
        self.group = group
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.products = 0
        self.shards: EvenShards | Replicated = (
            EvenShards(operator.size, group) if sharded else Replicated(operator.size)
        )

        # NCCL reduces on its own device only; gloo wherever the vectors are
        nccl = "nccl" in str(dist.get_backend(group))
        self._reduce_on = torch.device("cuda", torch.cuda.current_device()) if nccl else self.device
        gradient = all_or_nobody(self.agree, self._allocate, "memory for the operator's vectors")
        parts = operator.parts if isinstance(operator, GradientCovariance) else 0
        shape = float(self.size), float(len(operator.used))
        world = dist.get_world_size(group)
        weight = operator.samples if weights == "samples" else 1.0
        mine = [operator.samples, weight * operator.loss_value, float(parts), *shape, weight]
        *totals, weight_sum = self._sum_floats(mine)
        if totals[3:] != [world * number for number in shape]:
            raise ValueError(
                f"the ranks' operators differ: this one has {shape[1]:g} parameters with {shape[0]:g} entries, the "
                f"mean over {world} ranks is {totals[4] / world:g} with {totals[3] / world:g}"
            )
        imprecise = float(not operator.exact)
        errors = torch.tensor([operator.noise, operator.product_error or 0.0, imprecise], dtype=torch.float64)
        self.noise, error, imprecise = self._sum(errors, dist.ReduceOp.MAX).tolist()
        self.exact = not imprecise
        self.product_error = None if self.exact else error
        self.samples: float = totals[0]
        self.loss_value: float = totals[1] / weight_sum
        self._fraction = weight / weight_sum
        used = [count > 0 for count in self._sum_floats([float(used) for used in operator.used])]
        self.unused = tuple(
            name
            for name, p, is_used in zip(operator.block.names, operator.block.tensors, used, strict=True)
            if p.requires_grad and not is_used
        )
        self.gradient = self._sum(gradient.mul_(self._fraction)).to(self.device)
        if isinstance(operator, GradientCovariance):
            operator.pool(self.gradient, self.samples, int(totals[2]))

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the rows of ``V``; see `CurvatureOperator.matmat`.

        Args:
            V: shape (k, size), the same on every rank; (k, local size) where vectors are sharded.

        Returns:
            The same shape; all NaN once any rank's local product has raised.
        """
        self.reserve(V.shape[0])
        self.products += V.shape[0]
        if isinstance(self.shards, EvenShards):
            return self.shards.exchange(V, self.operator.matmat, self._fraction)
        failed = torch.full((1, 1), float("nan"), dtype=self.dtype, device=self.device).expand(V.shape)
        mine = failed
        if self.error is None:
            mine = self.shards.attempt(lambda: self.operator.matmat(V).mul_(self._fraction), failed)
        return self._sum(mine)

    @property
    def error(self) -> Exception | None:
        """What the local product raised, or what went wrong between products."""
        return self.shards.error

    def reserve(self, k: int) -> None:
        """Takes the memory for products with k vectors at a time, if there is none yet; on all ranks, or on none.

        Raises:
            OtherRankFailedError: another rank hasn't got it.
        """
        shards = self.shards
        if isinstance(shards, EvenShards) and not shards.reserved(k):
            all_or_nobody(self.agree, lambda: shards.reserve(k, self.gradient), f"memory for products of {k} vectors")

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector, of shape (size,) or (local size,); see `matmat`."""
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on every rank, and none has failed; one small all-reduce.

        What ends a run must end it everywhere.
        """
        return bool(self._sum(torch.tensor(int(flag and self.error is None)), dist.ReduceOp.MIN).item())

    def release(self) -> None:
        """Releases the local operator."""
        self.operator.release()

    def _allocate(self) -> Tensor:
        """What every rank must have before the first collective: a copy of its gradient, buffers for a product."""
        if isinstance(self.shards, EvenShards):
            self.shards.reserve(1, self.operator.gradient)
        return self.operator.gradient.to(self._reduce_on, copy=True)

    def _sum_floats(self, numbers: list[float]) -> list[float]:
        return [float(total) for total in self._sum(torch.tensor(numbers, dtype=torch.float64)).tolist()]

    def _sum(self, tensor: Tensor, reduction: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum (or other reduction) over ranks of a tensor of one shape, in one collective."""
        moved = tensor.to(self._reduce_on).contiguous()
        with collective():
            dist.all_reduce(moved, op=reduction, group=self.group)
        return moved.to(tensor.device)
