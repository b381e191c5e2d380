"""Training with a probe is bitwise training without it, in every way of training; and the harness would see it if not."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from bitwise_cases import CASES
from functorch.compile import make_boxed_func
from harness import EVERY, Case, Fingerprint, ProductProbe, differences, train
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

import lightning_rmt.live.fence
from lightning_rmt import SpectrumMonitor
from lightning_rmt.live.fence.generators import randomness
from lightning_rmt.live.fence.tensors import buffers, parameters

INDUCTOR = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
)
MARKED = [pytest.param(case, marks=INDUCTOR if case.compiled == "inductor" else ()) for case in CASES]
AT_HOOKS = [pytest.param(*p.values, hook, marks=p.marks) for p in MARKED for hook in p.values[0].hooks]


@cache
def control(case: Case, directory: Path) -> Fingerprint:
    return train(case, directory)


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_two_controls_agree(case, tmp_path_factory):
    assert differences(train(case, tmp_path_factory.getbasetemp()), control(case, tmp_path_factory.getbasetemp())) == []


@pytest.mark.parametrize(("case", "hook"), AT_HOOKS, ids=str)
def test_training_is_the_same_with_products_behind_the_fence(case, hook, tmp_path_factory):
    probe = ProductProbe(case, hook)
    probed = train(case, tmp_path_factory.getbasetemp(), probe)
    assert differences(probed, control(case, tmp_path_factory.getbasetemp())) == []
    assert probe.taken > 0


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_training_is_the_same_with_a_spectrum_monitor(case, tmp_path, tmp_path_factory, monkeypatch):
    """With level statistics, whatever they cost: the exact block's loss is evaluated in float64 in all these modules."""
    monkeypatch.setattr("lightning_rmt.live.levels.TIME_SHARE", 1e6)
    monitor = SpectrumMonitor(every_n_steps=EVERY, lanczos_steps=4, loss_fn=case.loss_fn, on_error="raise")
    assert differences(train(case, tmp_path, monitor), control(case, tmp_path_factory.getbasetemp())) == []
    assert monitor.history
    assert monitor.reading.levels


def outputs(module, batch):
    logits = module(batch[0])
    return logits, lambda logits: F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp, SGD", {"product": "finite_difference"}),
        ("embeddings, LSTM, attention", {"product": "finite_difference"}),
        ("compiled, aot_eager", {"product": "finite_difference"}),
        pytest.param("compiled, inductor", {"product": "finite_difference"}, marks=INDUCTOR),
        ("mlp, Adam, scheduler, torchmetrics", {"curvature": "gradient_covariance"}),
        ("mlp, SGD", {"curvature": "ggn", "outputs_fn": outputs}),
        ("bf16-mixed", {"autocast": True}),
        ("accumulate 4", {"batches": 6, "probes": 2}),
        ("accumulate 4", {"batches": 6, "batch_law_every": 1}),
    ],
)
def test_training_is_the_same_with_other_measurements(name, options, tmp_path, tmp_path_factory):
    case = case_named(name)
    monitor = SpectrumMonitor(every_n_steps=EVERY, lanczos_steps=4, on_error="raise", **options)
    assert differences(train(case, tmp_path, monitor), control(case, tmp_path_factory.getbasetemp())) == []
    assert monitor.history


def test_finite_differences_run_compiled_code_as_training_does(tmp_path):
    """And compile nothing: `graphs` is one of the entries that are compared above."""

    def runs(probe):
        ran = []

        def compiler(graph, inputs):
            return make_boxed_func(lambda *values: ran.append(1) or graph.forward(*values))

        backend = aot_autograd(fw_compiler=compiler)
        train(replace(case_named("compiled, aot_eager"), compiled=backend), tmp_path, probe)
        return len(ran)

    def monitor(product):
        return SpectrumMonitor(every_n_steps=EVERY, lanczos_steps=4, on_error="raise", product=product)

    alone = runs(None)
    assert runs(monitor("exact")) == alone > 0
    assert runs(monitor("finite_difference")) > alone + 2 * 4 * 2  # two passes for each product, of two probes at least


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# The part that is taken out of the fence, the case and hook that need it, entries that must differ, entries that must not.
NEGATIVE_CONTROLS = (
    (
        "randomness",
        "batch norm, momentum 0.1",
        "on_train_batch_end",
        {"loss", "weights", "torch generator", "batches"},
        {},
    ),
    # the curse of running statistics: the whole training looks the same, the checkpoint is another one
    (
        "buffers",
        "batch norm, momentum 0.1",
        "on_train_batch_end",
        {"buffers", "state_dict"},
        {"loss", "weights", "rows"},
    ),
    ("logging", "mlp, Adam, scheduler, torchmetrics", "on_train_batch_end", {"rows", "callback metrics"}, {"weights"}),
    ("logging", "mlp, Adam, scheduler, torchmetrics", "on_before_zero_grad", {"rows"}, {"weights"}),
    ("logging", "mlp, Adam, scheduler, torchmetrics", "on_before_optimizer_step", {"rows"}, {"weights"}),
    ("logging", "logger used directly, sync_dist", "on_train_batch_end", {"rows"}, {"weights"}),
    ("metrics", "mlp, Adam, scheduler, torchmetrics", "on_train_batch_end", {"rows"}, {"weights", "loss"}),
    ("metrics", "metric collection", "on_train_batch_end", {"rows", "callback metrics"}, {"weights"}),
    ("attributes", "state in Python attributes", "on_train_batch_end", {"loss", "weights", "own"}, {}),
    ("parameters", "momentum encoder", "on_train_batch_end", {"loss", "weights", "own"}, {}),
    ("parameters", "normalised prototypes", "on_train_batch_end", {"loss", "weights"}, {}),
    ("trainer_state", "state in Python attributes", "on_train_batch_end", {"learning rates", "weights"}, {}),
    ("trainer_state", "should_stop", "on_train_batch_end", {"global step", "progress"}, {}),
    ("training_flags", "all batch norms in eval mode", "on_train_batch_start", {"flags"}, {"weights"}),
)


@pytest.mark.parametrize(("part", "name", "hook", "differ", "agree"), NEGATIVE_CONTROLS)
def test_harness_sees_a_part_of_the_fence_missing(part, name, hook, differ, agree, tmp_path_factory, monkeypatch):
    directory, case = tmp_path_factory.getbasetemp(), case_named(name)
    present = [p for p in lightning_rmt.live.fence.PARTS if p.__name__ != part]
    assert len(present) == len(lightning_rmt.live.fence.PARTS) - 1
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", tuple(present))
    seen = set(differences(train(case, directory, ProductProbe(case, hook)), control(case, directory)))
    assert differ <= seen
    assert not seen & set(agree)


# Parts that are there and do their work a little wrong.


def buffers_by_value(enclosure, undo):
    """The same tensors inside, their values copied back: an in-place change that a live graph does not forgive."""
    for module in enclosure.modules:
        for buffer in module._buffers.values():
            undo.callback(buffer.copy_, buffer.clone())


def buffers_of_the_first_module(enclosure, undo):
    """Not those of its submodules."""
    buffers(replace(enclosure, modules=enclosure.modules[:1]), undo)


def randomness_of_torch(enclosure, undo):
    """NumPy and Python are seeded and stay so."""
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    randomness(enclosure, ExitStack())


def parameters_without_grad(enclosure, undo):
    """`grad` is None afterwards, as if every probe came right after `zero_grad`."""
    for p in enclosure.parameters():
        undo.callback(setattr, p, "grad", None)  # after what follows
    parameters(enclosure, undo)


def training_flags_by_train(enclosure, undo):
    """`train()` puts every submodule into training mode."""
    undo.callback(enclosure.module.train)


MUTATIONS = (
    # by value does no harm between two steps...
    (buffers_by_value, "batch norm, momentum 0.1", set(), {"buffers", "state_dict", "weights"}),
    (buffers_of_the_first_module, "batch norm, momentum 0.1", {"buffers"}, {"weights", "loss"}),
    (
        randomness_of_torch,
        "batch norm, momentum 0.1",
        {"numpy generator", "python generator"},
        {"torch generator", "weights", "batches"},
    ),
    (parameters_without_grad, "accumulate 4", {"gradients", "weights"}, {"torch generator"}),
    (training_flags_by_train, "one batch norm in eval mode", {"flags"}, {"batches"}),
)


def mutated(mutant):
    """The fence's parts with this one in the place of the part that its name begins with."""
    original = next(p for p in lightning_rmt.live.fence.PARTS if mutant.__name__.startswith(p.__name__))
    return tuple(mutant if p is original else p for p in lightning_rmt.live.fence.PARTS)


@pytest.mark.parametrize(("mutant", "name", "differ", "agree"), MUTATIONS)
def test_harness_sees_a_part_of_the_fence_that_is_a_little_wrong(
    mutant, name, differ, agree, tmp_path_factory, monkeypatch
):
    directory, case = tmp_path_factory.getbasetemp(), case_named(name)
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", mutated(mutant))
    probe = ProductProbe(case)
    seen = set(differences(train(case, directory, probe), control(case, directory)))
    assert probe.taken > 0
    assert differ <= seen
    assert not seen & agree


def test_harness_sees_buffers_restored_by_value(tmp_path_factory, monkeypatch):
    """... but it breaks the backward pass where a probe comes between the forward pass and it."""
    case = case_named("batch norm, momentum 0.1")
    monkeypatch.setattr(lightning_rmt.live.fence, "PARTS", mutated(buffers_by_value))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(case, tmp_path_factory.getbasetemp(), ProductProbe(case, "on_before_zero_grad"))


class BackwardProbe(ProductProbe):
    """What not to do: `.backward()`, with `grad` put back afterwards."""

    def products(self, loss, module):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            loss.backward(create_graph=True)


def test_harness_sees_backward_instead_of_grad(tmp_path_factory):
    directory, case = tmp_path_factory.getbasetemp(), case_named("optimizer in backward")
    seen = differences(train(case, directory, BackwardProbe(case)), control(case, directory))
    assert {"own", "loss", "weights"} <= set(seen)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["batch norm, momentum 0.1", "state in Python attributes", "momentum encoder"])
def test_training_is_the_same_after_an_exception_inside_the_fence(name, error, tmp_path_factory):
    directory, case = tmp_path_factory.getbasetemp(), case_named(name)

    class Raises(ProductProbe):
        def probe(self, trainer, module):
            with pytest.raises(error, match="inside"):
                super().probe(trainer, module)

        def products(self, loss, module):
            super().products(loss, module)
            raise error("inside")

    probe = Raises(case)
    assert differences(train(case, directory, probe), control(case, directory)) == []
    assert probe.taken > 0
