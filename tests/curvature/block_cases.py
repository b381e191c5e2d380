"""Blocks of the cases' networks: which entries they are, what they are formed to, and what that is compared with."""

from __future__ import annotations

import numpy as np
import torch
from curvature_cases import build, reseed

from lightning_rmt.curvature.double_precision import Slice, in_double
from lightning_rmt.curvature.exact_block import BlockHessian


def whole(model, *names):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (not names or n in names)]
    return [Slice(n, p, tuple(p.shape)) for n, p in named]


def positions(model, slices):
    """Where the entries of the slices lie in the flat vector of all parameters."""
    start, starts = 0, {}
    for p in model.parameters():
        starts[id(p)] = start
        start += p.numel()
    found = []
    for part in slices:
        numbers = torch.arange(part.parameter.numel()).view(part.parameter.shape)
        piece = numbers[tuple(slice(n) for n in part.shape)]
        found += (starts[id(part.parameter)] + piece.flatten()).tolist()
    return found


def formed(loss, model, slices, batch=None, keep=None):
    """The block as a matrix, and its levels."""
    with in_double(model.modules(), slices) as leaves:
        block = BlockHessian(loss, leaves, batch)
        return entries(block), block.levels(keep)


def entries(block):
    block._take(block.size)
    return torch.cat(block._found).numpy()


def single(name):
    made = build(name)
    made.batches, made.counts = made.batches[:1], made.counts[:1]
    reseed()
    return made


def agrees(levels, matrix):
    expected = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert levels.eigenvalues.dtype == np.float64
    assert np.abs(levels.eigenvalues - expected).max() <= 1e-12 * np.abs(expected).max()
    assert 1e-14 * np.abs(expected).max() <= levels.noise <= 1e-12 * np.abs(expected).max()
