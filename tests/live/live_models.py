"""Small modules that train in every way that a probe could disturb, for the bitwise harness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, TensorDataset

CLASSES = 3
BATCHES = 6


def vectors(batch: int = 4, **options: Any) -> DataLoader:
    """Shuffled batches of 6 features."""
    return DataLoader(_dataset(batch * BATCHES, 6), batch_size=batch, shuffle=True, **options)


def images(batch: int = 4) -> DataLoader:
    """Shuffled batches of 1x6x6 images."""
    return DataLoader(_dataset(batch * BATCHES, 1, 6, 6), batch_size=batch, shuffle=True)


def tokens(batch: int = 4) -> DataLoader:
    """Shuffled batches of five tokens out of ten."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(10, (batch * BATCHES, 5), generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1) % CLASSES), batch_size=batch, shuffle=True)


def _dataset(samples: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


class Augmented(Dataset):
    """Noise from torch's and NumPy's global generators on every sample, drawn in the loader's workers."""

    def __init__(self) -> None:
        self.data = _dataset(4 * BATCHES, 6)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + 0.1 * torch.randn(6) + 0.1 * torch.from_numpy(np.random.randn(6)).float(), y


class Classifier(pl.LightningModule):
    """Cross entropy of a network, trained by SGD with momentum; the other modules vary this one."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Unlogged(Classifier):
    """For torch.compile, which in torch 2.13 can't trace through Lightning's `self.log`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, CLASSES))


def cnn(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


class Metered(Classifier):
    """Adam, a scheduler per step, torchmetrics, every way of logging, a dict returned."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True, prog_bar=True)
        self.log_dict({"a": loss, "b": loss * 2}, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Collected(Classifier):
    """A MetricCollection with compute groups, logged as a whole, and a metric that keeps lists."""

    def __init__(self) -> None:
        super().__init__()
        of = {"task": "multiclass", "num_classes": CLASSES}
        self.collection = torchmetrics.MetricCollection(
            {"precision": torchmetrics.Precision(**of), "recall": torchmetrics.Recall(**of)}
        )
        self.areas = torchmetrics.AUROC(**of)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.collection.update(logits, batch[1])
        self.areas.update(logits.softmax(1), batch[1])
        self.log_dict(self.collection, on_epoch=True, on_step=False)
        return F.cross_entropy(logits, batch[1])

    def on_train_epoch_end(self) -> None:
        self.log("areas", sum(len(part) for part in self.areas.preds))
        self.areas.reset()


def parametrised() -> nn.Sequential:
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(8, CLASSES))
    )


class Lbfgs(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)))

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class EvalNorm(Classifier):
    """Puts batch normalisation into evaluation mode inside the step: running statistics are saved for backward."""

    def __init__(self, layers: int) -> None:
        super().__init__(cnn())
        self.layers = layers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        norms = [m for m in self.net if isinstance(m, nn.BatchNorm2d)]
        for norm in norms[: self.layers]:
            norm.eval()
        return super().training_step(batch, batch_idx)


class Gan(pl.LightningModule):
    """Manual optimization of two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        one, two = self.optimizers()
        self.toggle_optimizer(one)
        loss = -self.critic(self.generator(torch.randn(len(x), 4))).mean()
        one.zero_grad()
        self.manual_backward(loss)
        one.step()
        self.untoggle_optimizer(one)
        self.toggle_optimizer(two)
        loss = critic_loss(self, batch)
        two.zero_grad()
        self.manual_backward(loss)
        two.step()
        self.untoggle_optimizer(two)
        self.log("critic", loss, prog_bar=True)

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.Adam(self.critic.parameters(), lr=1e-2),
        )


def critic_loss(module: Gan, batch: Any) -> Tensor:
    x, _ = batch
    fake = module.critic(module.generator(torch.randn(len(x), 4)))
    return F.softplus(fake).mean() + F.softplus(-module.critic(x)).mean()
