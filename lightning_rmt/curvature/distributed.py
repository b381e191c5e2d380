"""One operator over several processes: the sample-weighted mean of what each has."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rmt.curvature.errors import clear_frames
from lightning_rmt.curvature.gradient_covariance import GradientCovariance
from lightning_rmt.curvature.operator import CurvatureOperator


class RankSum:
    """The operator on the union of all ranks' batches: ``sum_r N_r H_r V / sum_r N_r``.

    A product is one local product and one all-reduce, however many tensors, batches and vectors there are;
    the operators are linear in the data, so nothing else is needed. Constructing it takes four more. Every
    rank must construct it and take the same products in the same order; all get the same numbers.

    A rank whose local product raises keeps the exception in `error`, warns nobody, and contributes NaN from
    then on: every rank sees NaN in that same product, and none waits for another. ``KeyboardInterrupt`` passes.

    Args:
        operator: this rank's share, on the same parameters as the others'. A `GradientCovariance` is pooled,
            so that the result is the covariance around the mean over all ranks.
        group: process group; None: the default one.

    Attributes:
        size: dimension n.
        device: of the vectors, the local operator's.
        dtype: of the vectors.
        noise: relative rounding error of a product, the largest of any rank.
        exact: as the local operator's.
        product_error: relative error of a product as measured, the largest of any rank; None where they are exact.
        samples: total weight of the batches over all ranks.
        loss_value: weighted mean loss over all ranks.
        gradient: weighted mean gradient over all ranks, shape (size,).
        unused: names of the trainable parameters that no rank's loss depends on.
        products: operator-vector products taken so far.
        error: what the local product raised, or None.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: the ranks' operators have different sizes (raised on every rank).
    """

    def __init__(self, operator: CurvatureOperator, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised; a single process needs no RankSum: use the operator itself"
            )
        self.operator = operator
        self.group = group
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.exact = operator.exact
        self.products = 0
        self.error: Exception | None = None

        # NCCL reduces on its own device only; gloo wherever the vectors are
        nccl = "nccl" in str(dist.get_backend(group))
        self._reduce_on = torch.device("cuda", torch.cuda.current_device()) if nccl else self.device
        parts = operator.parts if isinstance(operator, GradientCovariance) else 0
        shape = float(self.size), float(len(operator.used))
        totals = self._sum_floats([operator.samples, operator.samples * operator.loss_value, float(parts), *shape])
        world = dist.get_world_size(group)
        if totals[3:] != [world * number for number in shape]:
            raise ValueError(
                f"the ranks' operators differ: this one has {shape[1]:g} parameters with {shape[0]:g} entries, the "
                f"mean over {world} ranks is {totals[4] / world:g} with {totals[3] / world:g}"
            )
        errors = torch.tensor([operator.noise, operator.product_error or 0.0], dtype=torch.float64)
        self.noise, error = self._sum(errors, dist.ReduceOp.MAX).tolist()
        self.product_error = None if operator.exact else error
        self.samples: float = totals[0]
        self.loss_value: float = totals[1] / self.samples
        self._fraction = operator.samples / self.samples
        used = [count > 0 for count in self._sum_floats([float(used) for used in operator.used])]
        self.unused = tuple(
            name
            for name, p, is_used in zip(operator.block.names, operator.block.tensors, used, strict=True)
            if p.requires_grad and not is_used
        )
        self.gradient = self._sum(operator.gradient * self._fraction)
        if isinstance(operator, GradientCovariance):
            operator.pool(self.gradient, self.samples, int(totals[2]))

    def matmat(self, V: Tensor) -> Tensor:
        """Products with the rows of ``V``, the same on every rank; see `CurvatureOperator.matmat`.

        Args:
            V: shape (k, size), the same on every rank.

        Returns:
            Shape (k, size); all NaN once any rank's local product has raised.
        """
        product = None
        if self.error is None:
            try:
                product = self.operator.matmat(V) * self._fraction
            except Exception as error:  # whatever it is, the other ranks are about to wait for this one
                clear_frames(error)
                self.error = error
        if product is None:
            product = torch.full(tuple(V.shape), float("nan"), dtype=self.dtype, device=self.device)
        self.products += V.shape[0]
        return self._sum(product)

    def matvec(self, v: Tensor) -> Tensor:
        """Product with one vector of shape (size,); see `matmat`."""
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on every rank, in one small all-reduce: what ends a run must end it everywhere."""
        return bool(self._sum(torch.tensor(int(flag)), dist.ReduceOp.MIN).item())

    def release(self) -> None:
        """Releases the local operator."""
        self.operator.release()

    def _sum_floats(self, numbers: list[float]) -> list[float]:
        return [float(total) for total in self._sum(torch.tensor(numbers, dtype=torch.float64)).tolist()]

    def _sum(self, tensor: Tensor, reduction: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sum (or other reduction) over ranks of a tensor of one shape, in one collective."""
        moved = tensor.to(self._reduce_on).contiguous()
        dist.all_reduce(moved, op=reduction, group=self.group)
        return moved.to(tensor.device)
