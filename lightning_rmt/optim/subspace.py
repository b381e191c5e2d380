"""The directions in which steps are shrunk: an orthonormal basis over some of an optimizer's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rmt.curvature.parameters import ParameterBlock
from lightning_rmt.krylov.reductions import inner_products, subtract_combination
from lightning_rmt.optim.deflation import Deflation

#: Rows further from orthonormal than this aren't rounded eigenvectors but something else.
ORTHONORMAL = 1e-2


@dataclass(frozen=True, eq=False)
class Subspace:
    """Where and how much to shrink.

    Attributes:
        block: the parameters that the vectors run over, in their order.
        vectors: shape (k, n), orthonormal rows, in the metric's coordinates.
        deflation: the k levels.
    """

    block: ParameterBlock
    vectors: Tensor
    deflation: Deflation

    def shrink(self, step: Tensor, roots: Tensor | None, factors: NDArray[np.float64]) -> Tensor:
        """What has to be added to a step: ``-D^(-1/2) V (1 - c) V' D^(1/2) step``, in 4 k n operations.

        Args:
            step: shape (n,), zero for what isn't moved; it is overwritten.
            roots: ``D^(-1/2)``, shape (n,), zero for what isn't moved; None: 1.
            factors: c, shape (k,).
        """
        if roots is not None:
            step.div_(roots.masked_fill(roots == 0, 1.0))
        coefficients = torch.from_numpy(1 - factors).to(self.vectors.device) * inner_products(self.vectors, step)
        # a gradient that isn't finite spoils the base's step of its own parameter, and shall not spoil all others
        coefficients = torch.where(coefficients.isfinite(), coefficients, 0.0)
        correction = torch.zeros_like(step)
        subtract_combination(correction, self.vectors, coefficients)
        return correction if roots is None else correction.mul_(roots)

    def overlap(self, other: Subspace) -> float | None:
        """Mean squared cosine of the smaller subspace's directions to the other subspace, from 0 to 1.

        None where either is empty, or they are of different parameters.
        """
        k = min(self.deflation.rank, other.deflation.rank)
        same = [id(p) for p in self.block.tensors] == [id(p) for p in other.block.tensors]
        if k == 0 or not same:
            return None
        return float(torch.linalg.matrix_norm(self.vectors @ other.vectors.T, dtype=torch.float64).square()) / k


def subspace_of(optimized: Sequence[Tensor], block: ParameterBlock, vectors: Tensor, deflation: Deflation) -> Subspace:
    """A subspace over the parameters that an optimizer has.

    Args:
        optimized: its parameters.
        block: the layout of the vectors; what isn't the optimizer's is cut off.
        vectors: shape (k, n), orthonormal up to rounding; the first ones are taken, one for each level.
        deflation: the levels.

    Raises:
        ValueError: the shape is wrong, the vectors aren't orthonormal, or they are about other parameters too.
    """
    if vectors.shape[1] != block.size:
        raise ValueError(
            f"the eigenvectors have {vectors.shape[1]} entries and the parameters {block.size}: pass the parameters of the "
            "operator that they are of, in its order (parameters=operator.block.tensors)"
        )
    vectors = vectors[: deflation.rank].detach().to(block.device, block.dtype)
    known = {id(p) for p in optimized}
    parts = list(zip(block.names, block.tensors, vectors.split(block.sizes, dim=1), strict=True))
    for name, p, part in parts:
        # a random start leaves a little of itself where there is no curvature
        if id(p) not in known and float(torch.linalg.matrix_norm(part).square()) > ORTHONORMAL:
            raise ValueError(
                f"parameter {name!r} is in the eigenvectors but not in this optimizer: measure them on "
                "optimizer.in_metric(operator), or build the operator on the optimizer's parameters only"
            )
    ours = [(name, p, part) for name, p, part in parts if id(p) in known]
    if not ours:
        raise ValueError("none of the operator's parameters is in this optimizer")
    if len(ours) < len(parts):
        vectors = torch.cat([part for *_, part in ours], dim=1)
    # a block of its own: an operator keeps graphs alive
    return Subspace(ParameterBlock([(name, p) for name, p, _ in ours]), _orthonormal(vectors), deflation)


def _orthonormal(vectors: Tensor) -> Tensor:
    """The rows made orthonormal to rounding, from rows that nearly are, as a tensor of their own."""
    k = vectors.shape[0]
    if k == 0:
        return vectors.clone()
    gram = torch.stack([inner_products(vectors, row) for row in vectors]).cpu()
    error = float((gram - torch.eye(k, dtype=gram.dtype)).abs().max())
    if not error <= ORTHONORMAL:
        raise ValueError(
            f"the eigenvectors are not orthonormal: the Gram matrix is {error:.2g} from the identity; pass unit "
            "eigenvectors of one symmetric operator, as top_eigenpairs gives them"
        )
    # Loewdin's: the nearest orthonormal rows
    values, rotation = torch.linalg.eigh((gram + gram.T) / 2)
    return ((rotation * values.rsqrt()) @ rotation.T).to(vectors) @ vectors


def subspace_to_state(subspace: Subspace, optimized: Sequence[Tensor]) -> dict[str, Any]:
    """A subspace in plain types and one tensor, its parameters by their places in the optimizer."""
    places = {id(p): place for place, p in enumerate(optimized)}
    return {
        "places": [places[id(p)] for p in subspace.block.tensors],
        "vectors": subspace.vectors,
        "values": subspace.deflation.values.tolist(),
        "curvature": subspace.deflation.curvature.tolist(),
        "edge": subspace.deflation.edge,
        "reason": subspace.deflation.reason,
    }


def subspace_from_state(state: dict[str, Any], optimized: Sequence[Tensor]) -> Subspace:
    """What `subspace_to_state` was given; the vectors are copied to the parameters' device."""
    block = ParameterBlock([optimized[place] for place in state["places"]])
    values, curvature = (np.asarray(state[name], dtype=np.float64) for name in ("values", "curvature"))
    deflation = Deflation(values, curvature, float(state["edge"]), str(state["reason"]))
    return Subspace(block, state["vectors"].to(block.device, block.dtype, copy=True), deflation)
