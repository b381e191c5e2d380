"""The damping callback on real Trainers: what it sets, what it writes, what it gives up, and what it refuses."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as lightning_pl
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from kronecker_harness import KroneckerSGD, Task
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import DampingController, LocalLawDamping, SpectrumMonitor
from lightning_rmt.live.damping import StepBatches
from lightning_rmt.live.namespaces import MisconfigurationException

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*logging interval.*", "ignore:.*weights_only.*"
)


class Autoencoder:
    """Digits through a bottleneck, trained with a K-FAC that starts from the damping `start`."""

    def __init__(self, start=1e-6, rate=0.3, optimizer=None):
        super().__init__()
        self.task = Task("autoencoder", 0)
        self.model, self.start, self.rate = self.task.model, start, rate
        self.optimizer = optimizer
        self.dampings = []

    def training_step(self, batch, batch_idx):
        output = self.model(batch[0])
        loss = F.mse_loss(output, batch[0])
        optimizer = self.trainer.optimizers[0]
        if isinstance(optimizer, KroneckerSGD):
            noise = torch.randn(output.shape, generator=self.task.random) * math.sqrt(2 / output.shape[1])
            optimizer.observe((output * noise).sum(1).mean(), len(output))
        return loss

    def curvature_loss(self, batch):
        return F.mse_loss(self.model(batch[0]), batch[0])

    def on_train_batch_end(self, *_):
        self.dampings.append(self.trainer.optimizers[0].param_groups[0].get("damping"))

    def configure_optimizers(self):
        return self.optimizer(self) if self.optimizer else KroneckerSGD(self.model, self.rate, self.start)

    def final(self):
        return self.task.final()


class Module(Autoencoder, pl.LightningModule):
    pass


class OtherModule(Autoencoder, lightning_pl.LightningModule):
    pass


def loader(module):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(module.task.x, module.task.y)
    return DataLoader(data, batch_size=128, shuffle=True, drop_last=True, generator=generator)


def fit(callbacks, directory, module=None, namespace=pl, steps=30, **options):
    namespace.seed_everything(0, verbose=False)
    module = module if module is not None else Module()
    defaults = {
        "max_steps": steps, "accelerator": "cpu", "default_root_dir": directory, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    resume = options.pop("ckpt_path", None)
    trainer = namespace.Trainer(callbacks=callbacks, **{**defaults, **options})
    trainer.fit(module, loader(module), ckpt_path=resume)
    return trainer, module


def control(**options):
    return LocalLawDamping(DampingController(mode="control", **options), on_error="raise")


def scalars(directory):
    board = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


@pytest.mark.parametrize(("namespace", "module"), [(pl, Module), (lightning_pl, OtherModule)])
def test_an_absurd_start_is_left_at_once_and_the_training_works(namespace, module, tmp_path):
    _, fixed = fit([], tmp_path, module(), namespace)
    watch = control()
    _, controlled = fit([watch], tmp_path, module(), namespace, steps=200)
    assert not fixed.final() < 0.1
    assert controlled.final() < 0.06  # a constant output has 0.075
    assert controlled.dampings[0] > 100 * controlled.start  # by its own batch, without others to hold out
    assert watch.controller.damping == controlled.dampings[-1]
    assert watch.report.mode == "control"


@pytest.mark.parametrize("monitors", [[], [SpectrumMonitor(lanczos_steps=10, probes=1, levels=None)]])
def test_where_the_damping_starts_has_no_say(monitors, tmp_path):
    runs = []
    for start in (1e-6, 1.0):
        watch = control(every=2)
        _, module = fit([*monitors, watch], tmp_path, Module(start=start), steps=4)
        runs.append((module.dampings, watch.controller.state_dict()))
    assert runs[0] == runs[1]


def test_the_first_step_has_nothing_held_out(tmp_path):
    watch = control()
    fit([watch], tmp_path, steps=1)
    assert watch.report.own_ratio == watch.report.ratio
    assert watch.report.products <= 24
    logs = LocalLawDamping(on_error="raise")
    fit([logs], tmp_path, steps=1)
    assert "in a Trainer, this is the first step since" in logs.report.refused


def test_what_tensorboard_shows_with_a_monitor(tmp_path):
    monitor = SpectrumMonitor(every_n_steps=10, lanczos_steps=20, levels=None, on_error="raise")
    watch = control(
        every=5, bounds=(3.0, 1e3)
    )  # above the Hessian's most negative eigenvalue, so that something is left
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit([monitor, watch], tmp_path, Module(start=0.1), logger=logger, log_every_n_steps=1)
    found = scalars(tmp_path / "run")
    steps = [step for step, _ in found["rmt/damping_control/heldout_ratio"]]
    assert {0, 2, 7, 12, 17, 22} <= set(steps)  # between round numbers, which checkpoints are written at
    assert found["rmt/damping"][-1][1] == pytest.approx(watch.controller.damping)
    for tag in ("suggested", "own_ratio", "rejections", "products", "clipped"):
        assert f"rmt/damping_control/{tag}" in found
    report = watch.report
    # what noise leaves of it, by the last spectrum before the report
    assert found["rmt/effective_damping"][-1][1] == pytest.approx(report.effective)
    assert report.local_law == pytest.approx(monitor.reading.local_law_damping())


def test_log_mode_measures_and_leaves_the_damping(tmp_path):
    watch = LocalLawDamping(on_error="raise")
    _, module = fit([watch], tmp_path, Module(start=0.1))
    assert set(module.dampings) == {0.1}
    assert watch.report.ratio is not None
    assert watch.report.mode == "log"


def test_suggest_mode_warns_once_and_leaves_the_damping(tmp_path):
    watch = LocalLawDamping(DampingController(mode="suggest", every=5), on_error="raise")
    with pytest.warns(RuntimeWarning, match="would be nearer") as caught:
        _, module = fit([watch], tmp_path, Module(start=10.0))
    assert len([w for w in caught if "would be nearer" in str(w.message)]) == 1
    assert set(module.dampings) == {10.0}


def test_a_schedule_of_the_users_own_wins_with_one_warning(tmp_path):
    class Scheduled(Module):
        def on_train_batch_start(self, batch, batch_idx):
            self.trainer.optimizers[0].param_groups[0]["damping"] = 0.1 / (1 + batch_idx)

    watch = control(every=2)
    with pytest.warns(RuntimeWarning, match="a scheduler or a callback changes it too") as caught:
        _, module = fit([watch], tmp_path, Scheduled(), steps=8)
    assert len([w for w in caught if "only logs" in str(w.message)]) == 1
    assert module.dampings == [0.1 / (1 + i) for i in range(8)]
    assert watch.controller.mode == "log"


def test_the_local_law_alone_follows_the_monitor(tmp_path):
    monitor = SpectrumMonitor(every_n_steps=10, lanczos_steps=20, levels=None, on_error="raise")
    watch = control(method="local-law", guard=None, max_change=1e6)
    fit([monitor, watch], tmp_path, Module(start=0.1))
    assert watch.controller.damping == pytest.approx(monitor.reading.local_law_damping())


def test_the_local_law_alone_needs_a_monitor(tmp_path):
    for monitors in ([], [SpectrumMonitor(noise=False, every_n_steps=100)]):
        with pytest.raises(MisconfigurationException, match="takes the damping from a spectrum"):
            fit([*monitors, control(method="local-law")], tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no parameter group of the optimizers \\(SGD\\) has 'damping' or 'delta' or 'rho' or 'mu'"),
        ({"target": "hessian_power"}, "has 'hessian_power'"),
        ({"target": "lr", "optimizer": 1}, "returns 1 optimizers"),
    ],
)
def test_no_such_damping(options, words, tmp_path):
    module = Module(optimizer=lambda module: torch.optim.SGD(module.parameters(), 0.1))
    with pytest.raises(MisconfigurationException, match=words):
        fit([LocalLawDamping(**options)], tmp_path, module)


def test_manual_optimization_needs_a_loss(tmp_path):
    class Manual(Module):
        curvature_loss = None

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"Pass LocalLawDamping\(loss_fn=...\)"):
        fit([LocalLawDamping()], tmp_path, Manual())


def test_bad_arguments():
    with pytest.raises(ValueError, match="write LocalLawDamping\\(mode='control'\\)"):
        LocalLawDamping("control")
    with pytest.raises(ValueError, match="are the controller's own"):
        LocalLawDamping(DampingController(), mode="control")
    with pytest.raises(ValueError, match="mode is one of"):
        LocalLawDamping(mode="always")
    with pytest.raises(ValueError, match="name becomes a tag prefix"):
        LocalLawDamping(name="../x")


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path):
    def longer():
        return Module(start=1.0)

    whole = control(every=5)
    fit([whole], tmp_path, longer(), max_epochs=2, steps=-1)
    half = control(every=5)
    trainer, _ = fit([half], tmp_path, longer(), max_epochs=1, steps=-1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = control(every=5)
    _, resumed = fit([rest], tmp_path, longer(), max_epochs=2, steps=-1, ckpt_path=tmp_path / "half.ckpt")
    assert rest.controller.state_dict()["steps"] == whole.controller.state_dict()["steps"]
    assert resumed.dampings[0] == half.controller.damping
    assert half.controller.damping != 1.0


def test_a_second_training_starts_afresh(tmp_path):
    watch = control(every=5)
    _, first = fit([watch], tmp_path)
    _, second = fit([watch], tmp_path)
    assert first.dampings == second.dampings


def test_clipping_is_seen(tmp_path):
    watch = LocalLawDamping(on_error="raise")
    fit([watch], tmp_path, Module(start=0.1), logger=CSVLogger(tmp_path), gradient_clip_val=1e-6)
    assert watch._clipped is True
    watch = LocalLawDamping(on_error="raise")
    fit([watch], tmp_path, Module(start=0.1), logger=CSVLogger(tmp_path), gradient_clip_val=1e6)
    assert watch._clipped is False


def test_an_optimizer_that_rewrites_its_gradients_does_not_clip_them(tmp_path):
    class Rewriting(KroneckerSGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(0.1)
            return loss

    watch = LocalLawDamping(on_error="raise")
    module = Module(start=0.1, optimizer=lambda module: Rewriting(module.model, module.rate, module.start))
    fit([watch], tmp_path, module)
    assert watch._clipped is False


def test_a_step_that_calls_its_parents_step_is_one(tmp_path):
    class Child(KroneckerSGD):
        def step(self, closure=None):
            return super().step(closure)

    runs = []
    for kind in (KroneckerSGD, Child):  # once there was one of a class, PyTorch calls the hooks around its step as well
        watch = control(every=5)
        _, module = fit([watch], tmp_path, Module(optimizer=lambda m, kind=kind: kind(m.model, m.rate, m.start)))
        runs.append((module.dampings, watch.controller.state_dict()))
    assert runs[0] == runs[1]
    assert runs[1][1]["steps"] == 30


class Twice(Module):
    """Two steps on every batch, which both are in their gradient."""

    def __init__(self):
        super().__init__(start=0.1)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class AfterBatch(pl.Callback):
    def __init__(self):
        self.reports = []

    def on_train_batch_end(self, trainer, *_):
        self.reports.append(trainer.callbacks[0].report)


def test_a_second_step_on_a_batch_is_judged_by_the_batch_before(tmp_path):
    seen = AfterBatch()
    fit([control(every=1), seen], tmp_path, Twice(), steps=12)
    assert [report.step for report in seen.reports] == [1, 3, 5, 7, 9, 11]
    for report in seen.reports[1:]:
        assert report.refused is None
        assert None not in (report.ratio, report.own_ratio)
        assert report.ratio != report.own_ratio


def test_a_step_that_a_gradient_scaler_has_skipped_leaves_no_batch_to_the_next_one():
    batches, module = StepBatches(), torch.nn.Module()
    for value in (1.0, 2.0, 4.0):
        batches.begin()
        batches.add(torch.tensor([value]), 0)
        batches.stepped()  # the optimizer's own step may not follow
    assert batches.own(module, lambda _, batch: batch.sum())() == 4.0
    assert batches.held_out(module, lambda _, batch: batch.sum())() == 2.0


def test_a_failure_is_a_warning_and_the_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rmt.optim.controller.judge", lambda *_: 1 / 0)
    watch = LocalLawDamping()
    with pytest.warns(UserWarning, match="is off: it could not judge a step: ZeroDivisionError") as caught:
        _, module = fit([watch], tmp_path, Module(start=0.1), steps=4)
    assert len([w for w in caught if "is off" in str(w.message)]) == 1
    assert len(module.dampings) == 4


def test_nothing_is_left_of_the_module_and_the_hooks(tmp_path):
    watch = control()
    trainer, _ = fit([watch], tmp_path, steps=3)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    with pytest.raises(RuntimeError, match="no optimizer yet"):
        _ = watch.controller.optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.controller.damping > 0
