"""T9: a K-FAC whose damping is controlled, resumed in the middle of an epoch: bit for bit what it is without a break."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from kronecker_harness import KroneckerSGD, Task
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_rmt import DampingController, LocalLawDamping

BATCHES = 12


class Resumable(pl.LightningModule):
    """Everything that the training depends on is in the checkpoint, the generator of the K-FAC's targets too."""

    def __init__(self):
        super().__init__()
        self.task = Task("autoencoder", 0)
        self.model = self.task.model
        self.dampings = {}

    def training_step(self, batch, batch_idx):
        output = self.model(batch)
        optimizer = self.trainer.optimizers[0]
        noise = torch.randn(output.shape, generator=self.task.random) * math.sqrt(2 / output.shape[1])
        optimizer.observe((output * noise).sum(1).mean(), len(output))
        return F.mse_loss(output, batch)

    def curvature_loss(self, batch):
        return F.mse_loss(self.model(batch), batch)

    def configure_optimizers(self):
        return KroneckerSGD(self.model, 0.3, 1.0)

    def on_train_batch_end(self, *_):
        self.dampings[self.trainer.global_step] = self.trainer.optimizers[0].param_groups[0]["damping"]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["targets"] = self.task.random.get_state()

    def on_load_checkpoint(self, checkpoint):
        self.task.random.set_state(checkpoint["targets"])


class Loader:
    """Goes on in the middle of an epoch, which Lightning asks a loader to be able to."""

    def __init__(self, x):
        self.x, self.place = x, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        self.place %= BATCHES
        while self.place < BATCHES:
            self.place += 1
            yield self.x[(self.place - 1) * 128 : self.place * 128]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def trained(directory, resume=None):
    watch = LocalLawDamping(
        DampingController(mode="control", every=4, deadband=(0.99, 1.01), max_change=1.2), on_error="raise"
    )
    saving = ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = Resumable()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[watch, saving], default_root_dir=directory,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Loader(module.task.x), ckpt_path=resume)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return weights, module.dampings, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, trained(directory)


@pytest.mark.parametrize("step", [4, 7, 8, 17])
@pytest.mark.filterwarnings("ignore:.*weights_only.*", "ignore:The dirpath has changed.*")
def test_the_resumed_run_is_the_uninterrupted_one(step, whole, tmp_path):
    directory, (weights, dampings, watch) = whole
    assert len({damping for at, damping in dampings.items() if at > step}) > 1  # it is controlled after that too
    resumed, went_on, again = trained(tmp_path, directory / f"step={step}.ckpt")
    assert list(went_on) == list(range(step + 1, 2 * BATCHES + 1))
    assert went_on == {at: dampings[at] for at in went_on}
    assert torch.equal(resumed, weights)
    assert again.controller.state_dict() == watch.controller.state_dict()


@pytest.mark.filterwarnings("ignore:.*weights_only.*", "ignore:The dirpath has changed.*")
def test_a_step_that_would_be_judged_by_the_batch_before_the_break_is_not(whole, tmp_path):
    """That batch is in no checkpoint: the damping stays what it is until the next measurement."""
    directory, (_, dampings, _) = whole
    assert dampings[11] != dampings[10]
    _, went_on, _ = trained(tmp_path, directory / "step=10.ckpt")
    assert {went_on[at] for at in range(11, 15)} == {dampings[10]}
    assert went_on[15] != dampings[10]
