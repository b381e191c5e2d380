"""The Hessian by differences of gradients on the shards of an FSDP2 module, for which whole parameters needn't fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rmt.curvature.difference_checks import COARSE, TOLERANCE, FiniteDifferenceCheck, kinks, self_checks
from lightning_rmt.curvature.distributed import RankWeights
from lightning_rmt.curvature.errors import CurvatureError
from lightning_rmt.curvature.evaluation import Evaluation, Loss, differentiable, evaluate
from lightning_rmt.curvature.fsdp_passes import averaged_gradients
from lightning_rmt.curvature.randomness import RandomState
from lightning_rmt.curvature.sharded_block import ShardedBlock
from lightning_rmt.krylov.collectives import OtherRankFailedError
from lightning_rmt.krylov.lanczos import rounding_noise, start_vector

_SEEDS = 0, 1  # of the vectors of the check


class ShardedDifferenceHessian:
    """Hessian of the mean loss over all ranks, by central differences of gradients that never leave their shards.

    Each rank's part of a vector is what its shards hold, so that vectors, like parameters and gradients, take 1/W of the
    memory: besides what a training step takes, a product needs a copy of the shards and three vectors.
    ``Hv = |v| (g(theta + h v/|v|) - g(theta - h v/|v|)) / (2 h)``: the shards are moved in place, the loss runs with
    FSDP's own gathering, `backward` leaves averaged gradients in the shards' ``grad``, and all is put back bitwise, also
    after an exception that all ranks meet: the shards from the copy, ``grad`` by object, FSDP's settings and state.

    Entries lie as in the flat vector of whole parameters, so start vectors and spectra are those of the other operators.
    As by `FiniteDifferenceHessian`, losses with kinks are refused and others tested with 22 gradients: two steps against
    each other, and symmetry. All ranks decide alike, by sums over all of them.

    An exception on one rank alone, within a pass, can't be made good: the others wait for it in FSDP's collectives until
    the process group's timeout ends the training, as they do where a training step fails on one rank.

    Args:
        loss: as for `Hessian`; it has to call the module through FSDP's hooks, as training does.
        parameters: pairs of names and sharded parameters (DTensors), in float32 or float64, cut along dimension 0 over
            ``group`` and along nothing else: what ``module.named_parameters()`` yields, or some of it.
        batches: this rank's; as many on every rank.
        module: the module whose parts `fully_shard` was called on.
        group: the ranks over which parameters are sharded; None: all.
        weights: as for `RankSum`; the gradients that FSDP trains with are those of ``"equal"``.
        tolerance: the largest error that passes; infinity takes what comes, without a test.

    Attributes:
        names: of the parameters.
        size: dimension n, over all ranks.
        device: of the vectors: that of the shards.
        dtype: of the vectors.
        shards: which entries this rank holds.
        exact: False.
        step: length h of the displacement.
        checked: what the test found; None with an infinite tolerance.
        product_error: relative error of a product, as tested; 0.02 where nothing was.
        noise: the same, for Lanczos.
        samples: total weight of the batches over all ranks.
        loss_value: weighted mean loss over all ranks.
        gradient: this rank's part of its gradient.
        unused: names of the parameters that the loss doesn't depend on.
        products: taken so far.

    Raises:
        ValueError: as for `ShardedBlock`, or the mean loss is not finite: on every rank.
        CurvatureError: finite differences can't be trusted here: on every rank.
        Exception: what the loss raises, on the ranks where it does.
    """

    exact = False

    def __init__(
        self,
        loss: Loss,
        parameters: Iterable[tuple[str, Tensor]],
        batches: Iterable[Any],
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        weights: RankWeights = "equal",
        tolerance: float = TOLERANCE,
    ) -> None:
        self._batches = list(batches)
        self._block = ShardedBlock(parameters, module, group, len(self._batches))
        self.names, self.size, self.shards = self._block.names, self._block.size, self._block.shards
        self.device, self.dtype = self._block.device, self._block.dtype
        self._loss: Loss | None = loss
        self._module = module
        self._random = RandomState([self.device])
        self.samples, self.loss_value, self._factors = self._look(weights, tolerance)
        self.unused: tuple[str, ...] = ()
        self.gradient = self._gradient()

        scale = 1.0 + float(self.shards.norm(self._block.point()))
        self.step = scale * torch.finfo(self.dtype).eps ** (1 / 3)
        self.checked: FiniteDifferenceCheck | None = None
        self.product_error = TOLERANCE
        if tolerance < math.inf:
            self.checked = self._checked(COARSE * scale, tolerance)
            self.step, self.product_error = self.checked.step, self.checked.error
        self.noise = max(rounding_noise(self.dtype), self.product_error)
        self.products = 0

    def matmat(self, V: Tensor) -> Tensor:
        """Products with this rank's parts of k vectors, shape (k, local size); each takes two gradients.

        Raises:
            ValueError: ``V`` has another shape.
            RuntimeError: the operator was released.
        """
        if V.shape[1:] != (self.shards.local_size,):
            raise ValueError(f"V must have shape (k, {self.shards.local_size}), got {tuple(V.shape)}")
        products = torch.empty_like(V)
        for row, v in zip(products, V.detach(), strict=True):
            row.copy_(self._product(v, self.step))
        self.products += V.shape[0]
        return products

    def matvec(self, v: Tensor) -> Tensor:
        """Product with this rank's part of one vector; see `matmat`."""
        return self.matmat(v.unsqueeze(0)).squeeze(0)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on every rank, in one small all-reduce: what ends a run must end it everywhere."""
        return not bool(self.shards.largest(torch.tensor(float(not flag), device=self.device)))

    def release(self) -> None:
        """Lets go of the loss and the batches; no product is possible after."""
        self._loss, self._batches = None, []

    def _look(self, weights: RankWeights, tolerance: float) -> tuple[float, float, list[float]]:
        """Runs the loss forward: total weight, mean loss, and by what each batch's loss is to be multiplied."""
        values, found, total = [], [], []
        with averaged_gradients(self._module), differentiable(twice=False), self._random.replay():
            for index in range(len(self._batches)):
                value, weight, jumps = self._first_evaluation(index)
                values.append(value)
                total.append(weight)
                found += jumps
        mine = sum(total)
        weight = mine if weights == "samples" else 1.0
        mean = sum(w * value for w, value in zip(total, values, strict=True)) / mine
        sums = torch.tensor([mine, weight, weight * mean, len(found)], dtype=torch.float64, device=self.device)
        samples, weight_sum, loss_sum, kinked = self.shards.total(sums).tolist()
        if not math.isfinite(loss_sum):
            raise ValueError(f"the loss is {loss_sum} on some rank; its curvature means nothing")
        if kinked and tolerance < math.inf:
            seen = f" ({', '.join(sorted(set(found)))})" if found else ", on another rank"
            raise CurvatureError(f"finite differences can't be trusted here: the loss has kinks{seen}")
        # FSDP averages over ranks, so a rank that is to count a fraction c counts W c.
        factor = self._block.ranks * weight / (weight_sum * mine)
        return samples, loss_sum / weight_sum, [factor * w for w in total]

    def _first_evaluation(self, index: int) -> tuple[float, float, list[str]]:
        """Loss, weight and kinks of a batch. A rank that fails after its part of the pass, in the loss, fails on all."""
        found: tuple[float, float, list[str]] = math.nan, math.nan, []
        error: Exception | None = None
        try:
            evaluation = self._evaluate(index)
            found = float(evaluation.loss.detach()), evaluation.weight(), kinks(evaluation.loss)
        except Exception as caught:
            error = caught
        fine = self.agree(error is None)
        try:
            if error is not None:
                raise error
        finally:
            error = None  # or its traceback's frame would hold it, and with it the graph
        if not fine:
            raise OtherRankFailedError("the loss failed on another rank; its log says why")
        return found

    def _checked(self, coarse: float, tolerance: float) -> FiniteDifferenceCheck:
        u, other = (start_vector(self, seed) for seed in _SEEDS)
        steps = [self.step, self.step / 4, self.step / 16]
        checks = self_checks(self._product, (u, other), steps, coarse, tolerance, self.shards)
        best = min(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error)
        if not best.ok:
            raise CurvatureError(f"finite differences can't be trusted here: {best.doubt}")
        return best

    def _product(self, v: Tensor, h: float) -> Tensor:
        norm = self.shards.norm(v)  # stays on the device
        length = h / norm.clamp_min(torch.finfo(self.dtype).tiny)  # v = 0 gives 0 / tiny
        with self._block.displaced(v, length):
            product = self._gradient()
        with self._block.displaced(v, -length):
            product.sub_(self._gradient())
        return product.mul_(norm / (2.0 * h))

    def _gradient(self) -> Tensor:
        """This rank's part of the mean gradient at the present parameters."""
        with averaged_gradients(self._module), differentiable(twice=False), self._random.replay():
            for index, factor in enumerate(self._factors):
                value = self._evaluate(index).loss
                (value if factor == 1.0 else value * factor).backward()
            self.unused = self._block.without_gradient()
            return self._block.gradient()

    def _evaluate(self, index: int) -> Evaluation:
        if self._loss is None:
            raise RuntimeError("this ShardedDifferenceHessian was released; build a new one")
        return evaluate(self._loss, (self._batches[index],), index)
