from __future__ import annotations

import torch
from torch import nn

from lightning_rmt.curvature.gradient_factors import GradientFactors
from lightning_rmt.curvature.weight_matrices import matrix_shape, weight_matrices


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.conv = nn.Conv2d(3, 5, 2)
        self.transposed = nn.ConvTranspose1d(3, 4, 2)
        self.linear = nn.Linear(6, 4)
        self.row = nn.Linear(6, 1)
        self.wide = nn.Linear(300, 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.lstm = nn.LSTM(3, 2)
        self.experts = nn.Parameter(torch.zeros(2, 3, 4))
        self.complex = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
        self.tied = nn.Linear(4, 20, bias=False)
        self.tied.weight = self.embedding.weight


def found(patterns=None, max_dim=256, max_bytes=2.0**30):
    return weight_matrices(Everything(), patterns, max_dim, max_bytes, GradientFactors.bytes_needed)


def test_matrices_and_the_reasons_of_the_others():
    matrices, skipped = found()
    shapes = {name: matrix_shape(p) for name, p in matrices.items()}
    assert shapes == {
        "conv": (5, 12), "transposed": (3, 8), "linear": (4, 6), "lstm.weight_ih_l0": (8, 3), "lstm.weight_hh_l0": (8, 2),
    }  # fmt: skip
    reasons = {
        "conv.bias": "a vector", "row.weight": "a vector", "embedding.weight": "an embedding", "frozen.weight": "frozen",
        "wide.weight": "2 x 300 as a matrix, over max_dim=256", "experts": "of 3 dimensions", "complex": "complex",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert skipped[name].startswith(reason), name
    names = {name for name, _ in Everything().named_parameters()}
    assert names == set(skipped) | {n if n.startswith("lstm") else f"{n}.weight" for n in matrices}


def test_patterns():
    matrices, skipped = found(["lin*", "conv.*"])
    assert list(matrices) == ["conv", "linear"]
    assert set(skipped) == {"conv.bias", "linear.bias"}


def test_memory_is_bounded_and_small_ones_come_first():
    small = GradientFactors.bytes_needed((8, 2)) + GradientFactors.bytes_needed((4, 6))
    matrices, skipped = found(max_bytes=small + 10)
    assert set(matrices) == {"lstm.weight_hh_l0", "linear"}
    assert "no room within max_memory_mib=" in skipped["conv.weight"]
