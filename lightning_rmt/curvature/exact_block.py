"""The Hessian's block of a few parameters, entry by entry: what level statistics are taken from."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from lightning_rmt.curvature.double_precision import Slice
from lightning_rmt.curvature.evaluation import Loss, differentiable, differentiate, evaluate
from lightning_rmt.curvature.graph_memory import graph_nodes
from lightning_rmt.curvature.parameters import ParameterBlock

#: Rows that one backward pass is vectorised over.
CHUNK = 64
#: What rounding does to the eigenvalues is up to this many times what it does to the symmetry: autograd makes some errors
#: in both triangles alike. Measured in float32 on 300 small MLPs: 2 to 12 times without normalisation layers.
NOISE_PER_ASYMMETRY = 20.0
#: And at least this many roundings of the largest eigenvalue: an error of the forward pass keeps the symmetry, and LayerNorm
#: magnifies it (there up to 126 times the asymmetry, but never more than 32 roundings).
NOISE_IN_ROUNDINGS = 64.0
#: Seconds per cubed dimension that the decomposition takes, roughly (0.02 s for 650 on one core).
DECOMPOSITION_SECONDS = 7e-11

_COARSE = (torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex32)


@dataclass(frozen=True, eq=False)
class ExactLevels:
    """Exact eigenvalues of one block on one batch.

    Attributes:
        eigenvalues: ascending, shape (k,), float64, in the loss's units.
        noise: bound on the error of the matrix in the spectral norm, mostly from its asymmetry.
    """

    eigenvalues: NDArray[np.float64]
    noise: float


class BlockHessian:
    """The Hessian of a loss at one batch by a few leaves, to be formed row by row.

    The gradient reaches nothing but the leaves, so that the passes are as short as the way from them to the loss.

    Args:
        loss: as for `Hessian`.
        leaves: tensors that require gradients, float64.
        batch: the batch.
        index: its position, for messages.

    Attributes:
        size: dimension of the whole block.

    Raises:
        ValueError: the loss doesn't depend on the leaves, isn't computed in float64, or depends on other parameters too.
        CurvatureError: it can't be differentiated twice.
    """

    def __init__(self, loss: Loss, leaves: Sequence[Tensor], batch: Any, index: int = 0) -> None:
        block = ParameterBlock([(str(i), leaf) for i, leaf in enumerate(leaves)])
        if block.dtype != torch.float64:
            raise ValueError(f"level statistics need float64 parameters, got {block.dtype}")
        with differentiable():
            evaluation = evaluate(loss, (batch,), index)
            _refuse_other_precisions(evaluation.loss)
            _refuse_other_parameters(evaluation.loss, block)
            gradients = differentiate(evaluation.loss, block, index, create_graph=True)
        self.size = block.size
        self._rows = _Rows(block, gradients)
        self._found: list[Tensor] = []

    def seconds_per_row(self) -> float:
        """Takes the first rows, which are kept, and says how long one took."""
        with differentiable():
            self._rows.take(0, 1)  # thrown away: the first vectorised pass of a process imports what it needs
        begin = time.perf_counter()
        self._take(min(CHUNK, self.size))  # as `levels` would, so that the rows are bitwise the same
        return (time.perf_counter() - begin) / self._count

    def levels(self, keep: int | None = None) -> ExactLevels:
        """Forms and decomposes the block of the first ``keep`` coordinates (None: all of them).

        Raises:
            ValueError: an entry is NaN or infinite.
        """
        keep = self.size if keep is None else min(keep, self.size)
        self._take(keep)
        matrix = torch.cat(self._found)[:keep, :keep].cpu().numpy()
        self._found = []
        if not np.isfinite(matrix).all():
            raise ValueError("an entry of the exact Hessian is NaN or infinite")
        asymmetry = spectral_norm(matrix - matrix.T) / 2
        eigenvalues = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        rounding = np.finfo(np.float64).eps * float(np.abs(eigenvalues).max(initial=0.0))
        return ExactLevels(eigenvalues, max(NOISE_PER_ASYMMETRY * asymmetry, NOISE_IN_ROUNDINGS * rounding))

    @property
    def _count(self) -> int:
        return sum(part.shape[0] for part in self._found)

    def _take(self, upto: int) -> None:
        with differentiable():
            while self._count < upto:
                self._found.append(self._rows.take(self._count, min(self._count + CHUNK, upto)))


def rows_affordable(seconds: float, seconds_per_row: float) -> int:
    """How many rows, with the decomposition of their block, can be had in so many seconds."""
    low, high = 0, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        fits = middle * seconds_per_row + DECOMPOSITION_SECONDS * middle**3 <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return low


def spectral_norm(skew: NDArray[np.float64], iterations: int = 20) -> float:
    """Largest singular value by power iteration, from a fixed start; a few per cent low at worst."""
    v = np.random.default_rng(0).standard_normal(skew.shape[:1])
    length = 0.0
    for _ in range(iterations):
        norm = float(np.linalg.norm(v))
        if norm == 0.0:
            return 0.0
        v = np.asarray(skew @ (v / norm))
        length = float(np.linalg.norm(v))
    return length


def _refuse_other_precisions(loss: Tensor) -> None:
    """Whatever depends on the leaves has to be float64 all the way, also where the loss is float64 again."""
    coarse = {loss.dtype} if loss.dtype != torch.float64 else set()
    for node in graph_nodes([loss]):
        coarse |= {found.dtype for found in node._input_metadata if found.dtype in _COARSE}
    if coarse:
        listed = " and ".join(sorted(map(str, coarse)))
        raise ValueError(
            f"the loss is computed in {listed} between the block and its value, whatever the parameters' precision (a "
            "cast in the model, perhaps), and the rounding of anything but float64 is a random matrix itself. Give a loss "
            "without that cast (loss_fn=): models of transformers cast their logits in the loss that they return, so take "
            "the cross entropy of their logits instead; or do without level statistics (levels=None)"
        )


def _refuse_other_parameters(loss: Tensor, block: ParameterBlock) -> None:
    """Parameters that the loss reaches past the modules' tables, by a list or a closure, have no copies in the block."""
    known = {id(leaf) for leaf in block.tensors}
    for node in graph_nodes([loss]):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Parameter) and id(leaf) not in known:
            raise ValueError(
                f"the loss reaches a parameter of shape {tuple(leaf.shape)} by another way than as an attribute of its "
                "module (in a list or a closure of the user's, perhaps), where it has no copy in float64"
            )


class _Rows:
    """Rows of the Jacobian of a gradient, several in one vectorised backward pass where every operation allows it."""

    def __init__(self, block: ParameterBlock, gradients: list[Tensor | None]) -> None:
        self._block = block
        self._curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        self._at_once = True

    def take(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, shape (stop - start, size)."""
        count = stop - start
        if not self._curved:
            return torch.zeros(count, self._block.size, dtype=torch.float64, device=self._block.device)
        unit = torch.zeros(count, self._block.size, dtype=torch.float64, device=self._block.device)
        unit[torch.arange(count), torch.arange(start, stop)] = 1.0
        if self._at_once:
            try:
                return self._differentiate(unit, True)
            except (RuntimeError, NotImplementedError):  # vmap doesn't know every operation
                self._at_once = False
        return torch.cat([self._differentiate(row[None], False) for row in unit])

    def _differentiate(self, V: Tensor, at_once: bool) -> Tensor:
        parts = V.split(self._block.sizes, dim=1)
        vectors = [parts[i].unflatten(1, g.shape) if g.ndim else parts[i].reshape(-1) for i, g in self._curved]
        found = torch.autograd.grad(
            [g for _, g in self._curved],
            list(self._block.tensors),
            vectors if at_once else [v[0] for v in vectors],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=at_once,
        )
        columns = [
            torch.zeros_like(part) if column is None else column.detach().reshape(V.shape[0], -1)
            for part, column in zip(parts, found, strict=True)
        ]
        return torch.cat(columns, dim=1)


def steps_to_loss(loss: Tensor, parameters: Iterable[Tensor]) -> dict[int, int]:
    """How many operations lie between each parameter and the loss, on the longest way.

    That is what a product restricted to the parameter has to go through; a weight that is used twice, tied to an
    embedding say, is as far away as its farther use.

    Args:
        loss: with its graph.
        parameters: leaves.

    Returns:
        The distance by ``id`` of the parameter; those that the loss doesn't depend on are missing.
    """
    nodes = list(graph_nodes([loss]))
    waiting = dict.fromkeys(nodes, 0)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
    distance = dict.fromkeys(nodes, 0)
    ready = deque([loss.grad_fn])
    found: dict[int, int] = {}
    wanted = {id(p) for p in parameters}
    while ready:
        node = ready.popleft()
        variable = getattr(node, "variable", None)  # of a node that accumulates a leaf's gradient
        if variable is not None and id(variable) in wanted:
            found[id(variable)] = distance[node]
        for following, _ in node.next_functions:  # type: ignore[union-attr]
            if following is not None:
                distance[following] = max(distance[following], distance[node] + 1)
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)
    return found


def nearest_layer(named: Mapping[str, Tensor], distances: Mapping[int, int], *, fewest: int, most: int) -> list[Slice]:
    """The layers nearest to the loss that have enough parameters together, or a piece of them.

    A layer's parameters are those of one module. Layers are taken whole until there are ``fewest``; one that would lead
    beyond ``most`` is cut down to a leading piece of its largest tensor. The result is a block in the basis of
    the parameters: a rotated or sketched one would have the level statistics of the GOE whatever the Hessian.

    Args:
        named: parameters by name.
        distances: from `steps_to_loss`.
        fewest: levels that are worth having.
        most: levels that may be had.

    Returns:
        The block, nearest layer first; perhaps with fewer than ``fewest`` entries, where there aren't more.
    """
    layers: dict[str, list[tuple[str, Tensor]]] = {}
    for name, parameter in named.items():
        if id(parameter) in distances:
            layers.setdefault(name.rpartition(".")[0], []).append((name, parameter))
    order = sorted(layers.values(), key=lambda layer: max(distances[id(p)] for _, p in layer))
    chosen: list[Slice] = []
    room = most
    for layer in order:
        if most - room >= fewest or room <= 0:
            break
        for name, parameter in sorted(layer, key=lambda pair: pair[1].numel()):
            if room > 0:
                piece = Slice(name, parameter, leading_piece(tuple(parameter.shape), room))
                chosen.append(piece)
                room -= piece.size
    return chosen


def leading_piece(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The shape of a leading piece of a tensor with at most so many entries, about as long in every dimension."""
    piece = list(shape)
    while math.prod(piece) > most:
        longest = max(range(len(piece)), key=lambda i: piece[i])
        others = math.prod(piece) // piece[longest]
        next_longest = max((n for i, n in enumerate(piece) if i != longest), default=1)
        # down to what fits, but not below the next longest, which is then cut as well
        piece[longest] = max(min(most // others, piece[longest] - 1), min(next_longest, piece[longest] - 1), 1)
    return tuple(piece)
