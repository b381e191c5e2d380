"""What a user writes, with the types that a user sees.

``make lint`` checks it strictly; tests/test_packaging.py runs it against the installed wheel.
"""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from typing_extensions import assert_type

from lightning_rmt import (
    DampingController,
    Estimate,
    FiniteDifferenceHessian,
    GaussNewton,
    GradientCovariance,
    Hessian,
    KroneckerDiagnostics,
    Level,
    LevelStatistics,
    LocalLawDamping,
    Reading,
    SpectralPreconditioner,
    Spectrum,
    SpectrumMonitor,
    edge_statistics,
    estimate_spectrum,
    level_statistics,
    rank_laws,
)
from lightning_rmt.laws import Fit, Law, MarchenkoPastur, Ranking, Semicircle
from lightning_rmt.local_law import effective_damping

Batch = tuple[torch.Tensor, torch.Tensor]

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
batches: list[Batch] = [(torch.randn(16, 4), torch.randn(16, 1))]


def loss(batch: Batch) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def residual(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.mse_loss(outputs, batch[1])


def forward(batch: Batch) -> torch.Tensor:
    outputs: torch.Tensor = model(batch[0])
    return outputs


def live_loss(module: pl.LightningModule, batch: Batch) -> torch.Tensor:
    return loss(batch)


def operators() -> None:
    hessian = Hessian(loss, model.named_parameters(), batches)
    spectrum = estimate_spectrum(hessian, steps=12, probes=1, seed=0)
    assert_type(hessian.size, int)
    assert_type(hessian.dtype, torch.dtype)
    assert_type(hessian.matmat(torch.randn(2, hessian.size)), torch.Tensor)
    assert_type(spectrum, Spectrum)
    assert_type(spectrum.trace, Estimate)
    assert_type(spectrum.lambda_max, Level)
    assert_type(spectrum.lambda_max.value, float)
    assert_type(spectrum.top, tuple[Level, ...])
    assert_type(spectrum.outliers.high.count, int | None)
    assert_type(spectrum.bulk_edges.low, float | None)
    assert_type(spectrum.density(0.0), NDArray[np.float64])
    assert_type(spectrum.quantile(0.5), float)
    for other in (
        FiniteDifferenceHessian(loss, model.named_parameters(), batches),
        GaussNewton(forward, residual, model.named_parameters(), batches),
        GradientCovariance(loss, model.named_parameters(), batches),
    ):
        assert_type(other.matvec(torch.randn(other.size)), torch.Tensor)
    assert_type(effective_damping(1e3, 0.1, spectrum), float)


def laws_and_levels() -> None:
    law: Law = Semicircle(2.0)
    assert_type(law.edges, tuple[float, float])
    assert_type(law.cdf([0.0, 1.0]), NDArray[np.float64])
    levels = law.rvs(300, np.random.default_rng(0))
    statistics = level_statistics(levels)
    assert_type(statistics, LevelStatistics)
    assert_type(statistics.verdict, str)
    assert "GOE" in statistics.verdict  # from simulated matrices that the wheel brings along
    fit = MarchenkoPastur.fit
    assert_type(fit(measured()), Fit)
    assert_type(rank_laws(measured(), (Semicircle, MarchenkoPastur)), Ranking)


def measured() -> Spectrum:
    class Diagonal:
        """Anything with these four is an operator."""

        size = 400
        device = torch.device("cpu")
        dtype = torch.float64
        values = torch.as_tensor(MarchenkoPastur(0.5).rvs(400, np.random.default_rng(0)))

        def matmat(self, V: torch.Tensor) -> torch.Tensor:
            return V * self.values

    return estimate_spectrum(Diagonal(), steps=40, probes=1, seed=0)


def callbacks() -> None:
    monitor = SpectrumMonitor(
        every_n_steps=10, loss_fn=live_loss, levels=None, curvature="hessian", parameters=["net.*"]
    )
    controller = DampingController("lr", bounds=(1e-6, 1.0), mode="log")
    assert_type(monitor.reading, Reading | None)
    optimizer = SpectralPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1))
    base: torch.optim.Optimizer = optimizer
    assert_type(controller.attach(base).damping, float)
    pl.Trainer(
        callbacks=[monitor, LocalLawDamping(controller), KroneckerDiagnostics(every_n_steps=None)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )


if __name__ == "__main__":
    operators()
    laws_and_levels()
    assert edge_statistics is not None
    callbacks()
