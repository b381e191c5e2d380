"""Level statistics from a real Trainer to TensorBoard's event file: of exact levels, never of Ritz values."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import SpectrumMonitor
from lightning_rmt.levels.spacings import spacing_ratios
from lightning_rmt.reading import Reading

FEATURES, HIDDEN, CLASSES = 20, 24, 5
STEPS, EVERY = 42, 40
ZEROS = HIDDEN + 1
"""The softmax doesn't see a shift of all logits: one direction for each input of the last layer, and one of its biases."""


class Network(pl.LightningModule):
    """1229 parameters."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
        self.net = nn.Sequential(*hidden, nn.Linear(HIDDEN, CLASSES))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def gaussians() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256 * STEPS, FEATURES, generator=generator, dtype=torch.float64)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x @ teacher).argmax(1)), batch_size=256)


class Run:
    """One training, read back from its event file."""

    def __init__(self, directory) -> None:
        torch.manual_seed(0)
        options = {"probes": 2, "batches": 2, "figures_every": 0, "on_error": "raise"}
        watch = SpectrumMonitor(every_n_steps=EVERY, levels=["*"], **options)
        logger = TensorBoardLogger(directory)
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            logger=logger,
            log_every_n_steps=1,
            default_root_dir=directory,
            callbacks=[watch],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Network(), gaussians())
        self.readings = [Reading.load(path) for path in sorted(Path(logger.log_dir).rglob("*.npz"))]
        board = EventAccumulator(logger.log_dir)
        board.Reload()
        self.scalars = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr("lightning_rmt.live.levels.TIME_SHARE", 1e6)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        return Run(tmp_path_factory.mktemp("run"))


def test_all_parameters_pooled_over_batches(run):
    """T26: 1229 parameters in float64; the ratio is that of all eigenvalues but the exact zeros, pooled over two batches."""
    assert [reading.step for reading in run.readings] == [1, 41]
    for reading in run.readings:
        (block,) = reading.levels
        assert block.eigenvalues.shape == (2, 1229)
        ratio = run.scalars["rmt/goe/all/spacing_ratio"][reading.step]
        assert 0.45 <= ratio <= 0.62
        assert run.scalars["rmt/goe/all/dropped"][reading.step] >= 2 * ZEROS
        assert run.scalars["rmt/goe/all/spacing_ratio_levels"][reading.step] <= 2 * (1229 - ZEROS)
        away = [row[np.abs(row) > 1e-12] for row in block.eigenvalues]
        assert [row.size for row in away] == [1229 - ZEROS] * 2
        assert ratio == pytest.approx(np.concatenate([spacing_ratios(row) for row in away]).mean(), abs=0.003)


def test_no_spacing_of_ritz_values_is_logged(run):
    """T26: every spacing ratio in the event file is that of an exact block, and no number is one of the nodes'."""
    ratios = {tag for tag in run.scalars if "spacing" in tag and "gap_spacings" not in tag}
    assert {tag.rpartition("/")[0] for tag in ratios} == {f"rmt/goe/{block.name}" for block in run.readings[-1].levels}
    assert "rmt/goe/all/spacing_ratio" in ratios
    for reading in run.readings:
        nodes = reading.spectrum.nodes
        assert nodes.shape == (2, 100)
        of_nodes = [
            spacing_ratios(row).mean() for row in (*nodes, np.unique(nodes))
        ]  # both runs find the same outliers
        logged = [values[reading.step] for tag, values in run.scalars.items() if tag.endswith("spacing_ratio")]
        assert logged == pytest.approx([block.statistics.spacing_ratio for block in reading.levels], rel=1e-6)
        assert np.abs(np.subtract.outer(logged, of_nodes)).min() > 0.01
