"""The weight matrices of a module: which parameters are matrices, and why the others aren't. Torch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def weight_matrices(
    module: nn.Module, patterns: Sequence[str] | None, max_dim: int, max_bytes: float, cost: Callable[..., int]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Trainable parameters that are matrices, by the layer's name, and a reason for each of the others.

    A convolution's kernel is the matrix of its output channels (of a transposed one: its input channels) against the rest.

    Args:
        module: whose parameters.
        patterns: name patterns (``"encoder.*"``) of the parameters to look at; the others aren't mentioned. None: all.
        max_dim: largest number of rows or columns.
        max_bytes: what all of them together may keep; smaller ones come first.
        cost: bytes that a matrix of a given shape keeps.
    """
    found: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, list[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner)  # several of a tied one
    for name, parameter in module.named_parameters():
        if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        if reason := _no_matrix(parameter, owners[id(parameter)], max_dim):
            skipped[name] = reason
        else:
            found[name] = parameter
    kept, left = {}, max_bytes
    costs = {name: cost(matrix_shape(parameter)) for name, parameter in found.items()}
    for name in sorted(found, key=lambda name: costs[name]):
        left -= costs[name]
        if left < 0:
            skipped[name] = f"no room within max_memory_mib={max_bytes / 2**20:g}"
        else:
            kept[name] = found[name]
    return {layer_name(name): parameter for name, parameter in found.items() if name in kept}, skipped


def layer_name(parameter: str) -> str:
    """``net.0.weight`` -> ``net.0``; other names stay."""
    return parameter.removesuffix(".weight")


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


def _no_matrix(parameter: Tensor, owners: list[nn.Module], max_dim: int) -> str | None:
    if not parameter.requires_grad:
        return "frozen"
    if parameter.ndim < 2:
        return "a vector: no basis to rotate to"
    if any(isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) for owner in owners):
        return "an embedding: its rows are seldom in a batch, and there was nothing to gain (1.1) where it was measured"
    if parameter.is_complex():
        return "complex"
    if parameter.ndim > 2 and not any(isinstance(owner, _ConvNd) for owner in owners):
        return f"of {parameter.ndim} dimensions, and not a convolution's: no one way to see a matrix in it"
    rows, columns = matrix_shape(parameter)
    if min(rows, columns) < 2:
        return "a vector: no basis to rotate to"
    if max(rows, columns) > max_dim:
        return f"{rows} x {columns} as a matrix, over max_dim={max_dim}"
    return None
