"""The ways of training in which a probe must change nothing: one case each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Case
from live_models import (
    Augmented,
    Classifier,
    Collected,
    EvalNorm,
    Gan,
    Lbfgs,
    Metered,
    Unlogged,
    cnn,
    critic_loss,
    images,
    parametrised,
    tokens,
    vectors,
)
from nasty_models import (
    MomentumEncoder,
    MutatesBatch,
    Nasty,
    NormalisedPrototypes,
    Plain,
    PopsBatch,
    ScaledGradient,
    Sequence,
    StepsInBackward,
    Stops,
    WritesToLogger,
)
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

HOOKS = ("on_train_batch_end", "on_train_batch_start", "on_before_zero_grad", "on_before_optimizer_step")
END_AND_ZERO = ("on_train_batch_end", "on_before_zero_grad")


def options(**values: Any) -> Any:
    return lambda: dict(values)


def gradient_scaler() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.1}


def weight_averaging() -> dict[str, Any]:
    return {"callbacks": [EMAWeightAveraging(decay=0.5)]}


def stochastic_weight_averaging() -> dict[str, Any]:
    return {"callbacks": [StochasticWeightAveraging(0.05, swa_epoch_start=1)], "max_epochs": 3}


ANOMALY = ("Anomaly Detection has been enabled",)

CASES = (
    Case("mlp, Adam, scheduler, torchmetrics", Metered, vectors, hooks=HOOKS, validation=True),
    Case("mlp, SGD", Classifier, vectors),
    Case("spectral and weight norm", lambda: Classifier(parametrised()), vectors),
    Case("LBFGS", Lbfgs, vectors, hooks=END_AND_ZERO),
    Case("batch norm, momentum 0.1", lambda: Classifier(cnn()), images, hooks=HOOKS),
    Case("batch norm, momentum None", lambda: Classifier(cnn(None)), images, hooks=HOOKS),
    Case("one batch norm in eval mode", partial(EvalNorm, 1), images, hooks=HOOKS),
    Case("all batch norms in eval mode", partial(EvalNorm, 2), images, hooks=END_AND_ZERO),
    Case("GAN, manual optimization", Gan, vectors, loss_fn=critic_loss, hooks=HOOKS[:2] + HOOKS[3:]),
    Case("accumulate 4", Classifier, vectors, options(accumulate_grad_batches=4), hooks=HOOKS),
    Case(
        "accumulate 3, clip",
        lambda: Classifier(cnn()),
        images,
        options(accumulate_grad_batches=3, gradient_clip_val=0.1),
        hooks=END_AND_ZERO,
    ),
    Case("clip", Classifier, vectors, options(gradient_clip_val=0.1), hooks=HOOKS),
    Case("bf16-mixed", lambda: Classifier(cnn()), images, options(precision="bf16-mixed"), hooks=HOOKS),
    Case("bf16-true", lambda: Classifier(cnn()), images, options(precision="bf16-true")),
    Case(
        "16-mixed on CPU",
        Classifier,
        vectors,
        options(precision="16-mixed"),
        ignore=("You passed `Trainer\\(accelerator='cpu', precision='16-mixed'\\)`",),
    ),
    Case("gradient scaler, clip", Classifier, vectors, gradient_scaler, hooks=HOOKS[:1] + HOOKS[2:]),
    Case("compiled, aot_eager", Unlogged, vectors, compiled="aot_eager"),
    Case(
        "compiled, inductor",
        Unlogged,
        vectors,
        compiled="inductor",
        ignore=("`torch.jit.script_method` is deprecated", "`torch.jit.script` is deprecated"),
    ),
    Case("weight averaging", lambda: Classifier(cnn()), images, weight_averaging, validation=True),
    Case("SWA with its batch norm epoch", lambda: Classifier(cnn()), images, stochastic_weight_averaging),
    Case(
        "two workers, random augmentation",
        Classifier,
        lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2),
    ),
    Case(
        "optimizer in backward",
        StepsInBackward,
        vectors,
        trained=lambda module: module.fired(),
        ignore=("`LightningModule.configure_optimizers` returned `None`",),
    ),
    Case("detect_anomaly", Classifier, vectors, options(detect_anomaly=True), ignore=ANOMALY),
    Case("deterministic", lambda: Classifier(cnn()), images, options(deterministic=True)),
    Case("overfit_batches", Classifier, vectors, options(overfit_batches=2), ignore=("You requested to overfit",)),
    # what a training_step may do besides
    Case("batch changed in place", MutatesBatch, vectors),
    Case("batch emptied", PopsBatch, vectors),
    Case("state in Python attributes", Nasty, vectors, hooks=HOOKS, trained=lambda module: module.state()),
    Case("metric collection", Collected, vectors),
    Case("logger used directly, sync_dist", WritesToLogger, vectors, hooks=HOOKS),
    Case("should_stop", Stops, vectors, options(max_epochs=4)),
    Case(
        "momentum encoder",
        MomentumEncoder,
        vectors,
        hooks=HOOKS,
        trained=lambda module: module.hidden[0].state_dict(),
    ),
    Case("normalised prototypes", NormalisedPrototypes, vectors, hooks=HOOKS),
    Case(
        "gradient hooks",
        ScaledGradient,
        vectors,
        hooks=HOOKS,
        trained=lambda module: module.seen,
        ignore=("SpectrumMonitor 'rmt': gradient hooks on",),
    ),
    Case("embeddings, LSTM, attention", lambda: Plain(Sequence()), tokens),
)

#: Names of cases that differ most from each other, for callbacks that only read.
REPRESENTATIVE = (
    "mlp, SGD",
    "mlp, Adam, scheduler, torchmetrics",
    "LBFGS",
    "batch norm, momentum 0.1",
    "spectral and weight norm",
    "GAN, manual optimization",
    "accumulate 4",
    "accumulate 3, clip",
    "bf16-mixed",
    "bf16-true",
    "gradient scaler, clip",
    "compiled, aot_eager",
    "SWA with its batch norm epoch",
    "embeddings, LSTM, attention",
    "deterministic",
)
