"""The monitor feeds a SpectralPreconditioner: what it is given is what its own refresh on the same batch finds."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from several_ranks import on_two_ranks
from torch import nn

from lightning_rmt import Hessian, SpectralPreconditioner, SpectrumMonitor
from lightning_rmt.reading import Reading

BASES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        # inputs with a mean: an outlier in the curvature
        return 2 + torch.randn(64, 8, generator=generator), torch.randint(4, (64,), generator=generator)


class Module(pl.LightningModule):
    def __init__(self, base, options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        self.base, self.options = base, options
        self.seen = []

    def loss(self, data):
        return nn.functional.cross_entropy(self.net(data[0]), data[1])

    def training_step(self, data, _):
        return self.loss(data)

    def on_train_batch_end(self, outputs, data, batch_idx):
        optimizer = self.trainer.optimizers[0]
        self.seen.append((optimizer.active, optimizer.reason))

    def configure_optimizers(self):
        return SpectralPreconditioner(BASES[self.base](self.parameters()), **self.options)


def fit(directory, base="adamw", monitor=None, devices=1, options=None, **more):
    module = Module(base, {"refresh": 4, "gap": 1, **(options or {})})
    monitor = monitor or SpectrumMonitor(every_n_steps=4, lanczos_steps=20, levels=None, on_error="raise")
    trainer = pl.Trainer(
        max_steps=9,
        callbacks=[monitor],
        logger=CSVLogger(directory),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=devices,
        default_root_dir=directory,
        use_distributed_sampler=False,
        **more,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=None))
    return module, monitor, trainer


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_it_is_refreshed_from_the_probe(base, tmp_path):
    module, monitor, trainer = fit(tmp_path, base)
    optimizer = trainer.optimizers[0]
    assert any(active for active, _ in module.seen), module.seen
    assert monitor.reading.preconditioner["rank"] >= 1, monitor.reading.notes
    assert 0 < monitor.reading.preconditioner["smallest_factor"] <= 1
    # the last probe was after the last step (8): its levels are those of the dense matrix in the metric, at these weights
    data = Data()[8]
    with Hessian(module.loss, module.named_parameters(), [data]) as hessian:
        inside = optimizer.in_metric(hessian)
        dense = torch.linalg.eigvalsh(inside.matmat(torch.eye(hessian.size)).double())
    largest = dense.abs().sort(descending=True).values[: optimizer.deflation.rank]
    np.testing.assert_allclose(np.abs(optimizer.deflation.values), largest, rtol=1e-4)


def test_its_state_is_logged_and_saved(tmp_path):
    _, monitor, trainer = fit(tmp_path)
    trainer.logger.save()
    header = Path(trainer.logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    for name in ("rank", "edge", "smallest_factor", "cosine"):
        assert f"rmt/preconditioner/{name}" in header
    monitor.reading.save(tmp_path / "reading.npz")
    assert Reading.load(tmp_path / "reading.npz").preconditioner == monitor.reading.preconditioner


def test_noise_decides_on_the_rank(tmp_path, monkeypatch):
    """The curvature's noise, measured in the metric, reaches the choice of the rank; noise=False takes it for none."""
    import lightning_rmt.optim.spectral_preconditioner as module

    seen, real = [], module.find_deflation

    def noted(*arguments, noise, **options):
        seen.append(noise)
        return real(*arguments, noise=noise, **options)

    monkeypatch.setattr(module, "find_deflation", noted)
    fit(tmp_path)
    assert seen
    assert all(noise > 0 for noise in seen)
    seen.clear()
    quiet = SpectrumMonitor(every_n_steps=4, lanczos_steps=20, levels=None, noise=False, on_error="raise")
    _, monitor, _ = fit(tmp_path, monitor=quiet)
    assert set(seen) == {0.0}
    assert any("for the truth" in note for note in monitor.reading.notes)


def test_a_refresh_that_fails_leaves_the_base_and_the_reading(tmp_path, monkeypatch):
    def broken(self, pairs, *rest, **options):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(SpectralPreconditioner, "update", broken)
    module, monitor, trainer = fit(tmp_path)
    assert not any(active for active, _ in module.seen)
    assert any("takes its base's steps: no memory left" in note for note in monitor.reading.notes)
    assert monitor.reading.spectrum.lambda_max.certified
    assert not trainer.optimizers[0].active


def test_rank_zero_is_never_fed(tmp_path):
    _, monitor, _ = fit(tmp_path, options={"rank": 0})
    assert monitor.reading.preconditioner == {}


def on_rank(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, monitor, _ = fit(directory, devices=2, strategy="ddp")
    weights = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return weights.numpy(), dict(monitor.reading.preconditioner), module.seen


def test_two_ranks_keep_the_same_weights(tmp_path):
    first, second = on_two_ranks(on_rank, tmp_path, tmp_path)
    assert (first[0] == second[0]).all()
    assert first[1] == second[1]
    assert first[1]["rank"] >= 1
    assert any(active for active, _ in first[2])
