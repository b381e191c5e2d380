"""The zeros of a hidden layer's block against its width, exactly: where a product of matrices has them, and where not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from beyond_rmt_networks import Classifier, Size, digits, watch
from claims import Claims
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def zeros(claims: Claims, size: Size) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """Exact eigenvalues of the hidden layer's block, linear and tanh, at the first step and trained."""
    images, labels = digits().tensors
    images, labels = images[: size.samples], labels[: size.samples]
    inputs = torch.cat([images, torch.ones(len(images), 1)], 1).double()
    rank = int(torch.linalg.matrix_rank(inputs))
    widths = np.array(size.widths)
    predicted = 1 - np.minimum(widths, 9) * rank / (65 * widths)
    claims.show(
        "zeros by rank",
        f"hidden widths h of 64-h-10; rank of the inputs and the bias: {rank} of 65",
        "",
        ", ".join(map(str, widths)),
    )
    spectra: dict[str, list[np.ndarray]] = {}
    for name, activation in (("linear", nn.Identity), ("tanh", nn.Tanh)):
        for width in size.widths:
            pl.seed_everything(0, verbose=False)
            net = nn.Sequential(nn.Linear(64, width), activation(), nn.Linear(width, 10))
            loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
            readings = watch(
                Classifier(net, 1e-2),
                loader,
                size.passes,
                every_n_steps=size.passes - 1,
                levels=["net.0"],
                lanczos_steps=20,
            )
            for when, reading in zip(("first step", "trained"), readings, strict=True):
                spectra.setdefault(f"{name}, {when}", []).append(np.sort(np.abs(reading.levels[0].eigenvalues[0])))
    shares = {name: np.array([exact_zeros(one) for one in found]) for name, found in spectra.items()}

    def told(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    ratio = "product: 1 - min(h, 9) r / (65 h)"
    off = np.abs(shares["linear, first step"] - predicted)
    claims.true(
        ratio,
        "zeros of the hidden block, linear network, first step",
        told(predicted),
        told(shares["linear, first step"]),
        off.max() < 1e-9,
    )
    trained = shares["linear, trained"]
    claims.true(
        ratio,
        "the same, trained (eigenvalues of fitted samples vanish, too)",
        told(predicted),
        told(trained),
        np.abs(trained - predicted).max() < 0.05,
    )
    constant = 1 - rank / 65
    for when in ("first step", "trained"):
        found = shares[f"tanh, {when}"]
        claims.negative(
            ratio,
            f"the same with tanh, {when}",
            told(predicted),
            told(found),
            bool(np.abs(found - constant).max() < 0.02),
        )
    claims.near(
        ratio,
        "with tanh, first step: only pixels that don't vary, mean over h",
        float(shares["tanh, first step"].mean()),
        constant,
        within=1e-3,
    )
    return spectra, predicted


def exact_zeros(sizes: np.ndarray, cut: float = 1e-12) -> float:
    """Share of eigenvalues that are rounding errors of float64."""
    return float(np.mean(sizes <= cut * sizes[-1]))
