"""Models as people train them, tiny: each with its loader, its way of training, and parameters few enough for the truth.

Transformers come from their configurations, with the library's defaults: nothing is downloaded, torchvision isn't needed,
and attention is `scaled_dot_product_attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from bitwise_cases import CASES, options
from harness import Case
from live_models import CLASSES, Classifier, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 24  # six batches of four


@dataclass(frozen=True)
class Real:
    """A case, and what is compared with its dense Hessian.

    Attributes:
        case: the way of training.
        parameters: patterns of at most 400 parameters, from every kind of layer; None: all of them.
        block: pattern of those with an exact block in float64.
        tolerance: of an eigenvalue from Lanczos, in units of the largest one.
        loss: of (module, batch), where `training_step` would not keep to float64.
        every: steps from probe to probe.
    """

    case: Case
    parameters: tuple[str, ...] | None
    block: str | None
    tolerance: float = 2e-6  # float32 misses by up to 9e-7
    loss: Callable[[Any, Any], Tensor] | None = None
    every: int = 8

    def __str__(self) -> str:
        return self.case.name


def hugging_face() -> Any:
    """The library, imported where a model is made: its models take a second or two."""
    if sys.version_info < (3, 11):
        pytest.skip("transformers 5.24 needs Python 3.11")
    import transformers

    return transformers


class FineTuned(pl.LightningModule):
    """A model of `transformers` that computes its own loss, AdamW with warm-up, as in the library's examples."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.net(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def gpt2(reentrant: bool | None = None) -> FineTuned:
    """Without dropout of attention weights, which no fused kernel on a CPU has; checkpointed if `reentrant` isn't None."""
    library = hugging_face()
    config = library.GPT2Config(
        **{"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "attn_pdrop": 0.0},
        **{"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "loss_type": "ForCausalLMLoss"},
    )
    net = library.GPT2LMHeadModel(config)
    if reentrant is not None:
        net.activation_checkpointing_enable({"use_reentrant": reentrant})
    return FineTuned(net)


def bert() -> FineTuned:
    library = hugging_face()
    config = library.BertConfig(
        **{"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 8, "num_labels": CLASSES},
    )
    return FineTuned(library.BertForSequenceClassification(config))


def vit() -> FineTuned:
    library = hugging_face()
    config = library.ViTConfig(
        **{"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "intermediate_size": 32, "num_labels": CLASSES},
    )
    return FineTuned(library.ViTForImageClassification(config))


def resnet() -> FineTuned:
    library = hugging_face()
    config = library.ResNetConfig(
        **{"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        **{"layer_type": "basic", "num_labels": CLASSES},
    )
    return FineTuned(library.ResNetForImageClassification(config))


def next_token(module: FineTuned, batch: Any) -> Tensor:
    """GPT-2's own loss casts its logits to float32."""
    logits = module.net(input_ids=batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def loader(**columns: Tensor) -> DataLoader:
    """Shuffled batches of four, each a `BatchEncoding`, which is what a tokenizer returns and no dict."""

    def collate(rows: list[dict[str, Tensor]]) -> Any:
        return hugging_face().BatchEncoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    rows = [{key: column[i] for key, column in columns.items()} for i in range(SAMPLES)]
    return DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)


def text() -> DataLoader:
    ids = torch.randint(20, (SAMPLES, 8), generator=torch.Generator().manual_seed(0))
    return loader(input_ids=ids, labels=ids)


def padded_text() -> DataLoader:
    """Sentences of three to eight tokens, and an attention mask."""
    ids = torch.randint(1, 20, (SAMPLES, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < 3 + torch.arange(SAMPLES)[:, None] % 6).long()
    return loader(input_ids=ids * mask, attention_mask=mask, labels=ids[:, 0] % CLASSES)


def pictures(size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(SAMPLES, 1, size, size, generator=generator)
    return loader(pixel_values=pixels, labels=torch.randint(CLASSES, (SAMPLES,), generator=generator))


class Recurrent(nn.Module):
    """Two layers, dropout between them, the last hidden state classified."""

    def __init__(self, cell: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.cell = cell(1, width, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def series() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 5, 1, generator=generator).cumsum(1)
    return DataLoader(TensorDataset(x, (x[:, -1, 0] > 0).long()), batch_size=4, shuffle=True)


class Recommender(pl.LightningModule):
    """Matrix factorisation: sparse gradients of two embeddings, and SparseAdam, which takes nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(12, 8, sparse=True)
        self.items = nn.Embedding(10, 8, sparse=True)
        self.bias = nn.Embedding(10, 1, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        user, item, liked = batch
        score = (self.users(user) * self.items(item)).sum(1) + self.bias(item)[:, 0]
        loss = F.binary_cross_entropy_with_logits(score, liked)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.parameters(), lr=0.05)


def ratings() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    user, item = (torch.randint(n, (48,), generator=generator) for n in (12, 10))
    return DataLoader(TensorDataset(user, item, ((user + item) % 2).float()), batch_size=8, shuffle=True)


class BagOfWords(nn.Module):
    """FastText's classifier, with a hidden layer. PyTorch has no second derivative of its EmbeddingBag."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 8)
        self.head = nn.Sequential(activation(), nn.Linear(8, 8), activation(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Poisson(pl.LightningModule):
    """A PINN: the second derivative of the network by its input is inside the loss, so the Hessian is its fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        ends = self.net(x.new_tensor([[0.0], [1.0]]))
        loss = (curvature + torch.sin(torch.pi * x)).square().mean() + 10 * ends.square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def collocation() -> DataLoader:
    x = torch.rand(SAMPLES * 2, 1, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=8, shuffle=True)


def named(name: str) -> Case:
    """One of the bitwise cases, whose models are small enough to be taken whole."""
    return next(case for case in CASES if case.name == name)


ATTENTION_AND_NORM = ("*.attn.*.bias", "*.ln_*")

MODELS = (
    Real(Case("GPT-2", gpt2, text), ATTENTION_AND_NORM, "*.attn.*.bias", loss=next_token),
    Real(Case("BERT", bert, padded_text), ("*LayerNorm.*", "*attention.self.*.bias"), "*LayerNorm.*"),
    Real(Case("ViT", vit, pictures), ("*layernorm*", "*_proj.bias", "*cls_token"), "*layernorm*"),
    Real(
        Case("ResNet", resnet, lambda: pictures(16)),
        ("*shortcut.*", "*embedder.normalization.*"),
        "*shortcut.convolution.weight",
    ),
    Real(Case("LSTM", lambda: Classifier(Recurrent(nn.LSTM, 3)), series), None, "*_l1"),
    Real(Case("GRU", lambda: Classifier(Recurrent(nn.GRU, 3)), series), None, "*_l1"),
    Real(Case("embeddings, sparse gradients", Recommender, ratings), None, "items.weight"),
    Real(
        Case("EmbeddingBag", lambda: Classifier(BagOfWords()), tokens, ignore=("SpectrumMonitor 'rmt': products are",)),
        None,
        None,
        tolerance=5e-4,  # finite differences, which say themselves that they err by 1e-4
    ),
    Real(Case("PINN", Poisson, collocation), None, "net.2.weight"),
    Real(named("LBFGS"), None, "net.*"),
    Real(named("compiled, aot_eager"), None, "net.*"),
    Real(named("compiled, inductor"), None, "net.*"),
    Real(
        Case("GPT-2, activation checkpoints", lambda: gpt2(reentrant=False), text, loss_fn=next_token),
        ("*.attn.*.bias", "*.ln_1.*"),
        "*.attn.*.bias",
        loss=next_token,
    ),
    Real(named("accumulate 4"), None, "net.*", every=2),
    Real(
        Case("GPT-2, bf16-mixed", gpt2, text, options(precision="bf16-mixed")),
        ("*.attn.*.bias", "*.ln_1.*"),
        "*.attn.*.bias",
        loss=next_token,
    ),
    Real(
        Case("ViT, bf16-true", vit, pictures, options(precision="bf16-true")),
        ("*layernorm_before*", "*_proj.bias"),
        "*_proj.bias",
        tolerance=0.02,  # two or three roundings of bfloat16, which are 0.4 %; its block in float64 is as exact as any
    ),
    Real(named("weight averaging"), ("net.1.*", "net.4.*"), "net.4.weight"),
    Real(named("SWA with its batch norm epoch"), ("net.0.*", "net.5.*", "net.8.*"), "net.8.*"),
)
