"""A run that is resumed from a checkpoint probes at the same steps, and finds the same, as the uninterrupted one."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from harness import Case, differences, train
from live_models import Classifier, cnn, images
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_rmt import SpectrumMonitor


class Remembering(SpectrumMonitor):
    """Keeps the nodes of every reading by step."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=4, lanczos_steps=5, on_error="raise")
        self.nodes: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        if self.reading is not None:
            self.nodes[self.reading.step] = self.reading.spectrum.nodes.tolist()


class Reseeds(pl.Callback):
    """Lightning doesn't save the generators, so a resumed run has other dropout masks unless it does this."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_step)


def in_order() -> DataLoader:
    return DataLoader(images().dataset, batch_size=4)


def test_resumed_run_probes_as_the_uninterrupted_one(tmp_path):
    """With dropout and batch normalisation, whose masks and statistics have to be the same in the probe."""

    def trainer() -> dict[str, Any]:
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        return {"max_epochs": 3, "enable_checkpointing": True, "callbacks": [Reseeds(), saving]}

    case = Case("resumed", lambda: Classifier(cnn()), in_order, trainer)
    whole, resumed = Remembering(), Remembering()
    one = train(case, tmp_path, whole)
    other = train(case, tmp_path, resumed, checkpoint=tmp_path / "epoch=0.ckpt")
    assert list(whole.nodes) == [0, 4, 8, 12, 16]
    assert list(resumed.nodes) == [8, 12, 16]
    assert all(resumed.nodes[step] == whole.nodes[step] for step in resumed.nodes)
    assert len({tuple(map(tuple, nodes)) for nodes in whole.nodes.values()}) == 5
    assert not {"weights", "state_dict", "optimizers"} & set(differences(one, other))
