"""Under a Trainer: with a scheduler, a checkpoint to resume from, and through the wrapper that Lightning hands out."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from preconditioner_cases import batch, loss_of, network, preconditioned, same_weights

from lightning_rmt.curvature.hessian import Hessian


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return batch(index)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.active = []

    def training_step(self, data, _):
        return loss_of(self.net)(data)

    def on_train_batch_start(self, data, index):
        optimizer = self.optimizers()  # Lightning's wrapper, which looks like one
        if self.global_step % 6 == 3:
            optimizer.refresh(Hessian(loss_of(self.net), self.net.named_parameters(), [data]))
        self.active.append(optimizer.active)

    def configure_optimizers(self):
        optimizer = preconditioned(torch.optim.AdamW(self.parameters(), lr=0.01))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def fit(directory, epochs, resume=None):
    torch.manual_seed(0)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        gradient_clip_val=1.0,
        default_root_dir=directory,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=None), ckpt_path=resume)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*weights_only.*")
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path):
    whole, trainer = fit(tmp_path, 2)
    assert whole.active[:9] == [False] * 3 + [True] * 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0025
    _, half = fit(tmp_path, 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(tmp_path, 2, tmp_path / "half.ckpt")
    assert resumed.active == whole.active[8:]
    assert trainer.optimizers[0].steps == 16
    assert same_weights(whole, resumed)
