"""The monitor on real Trainers: what it writes, when it probes, what it refuses."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path

import lightning.pytorch as lightning_pl
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import Reading, Spectrum, SpectrumMonitor
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.schedule import Decision

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*logging interval.*")


def classifier(base=pl.LightningModule):
    class Classifier(base):
        def __init__(self, lr: float = 0.1):
            super().__init__()
            self.lr = lr
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def loss(self, batch):
            return cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Classifier


Classifier = classifier()


def loader(batches=12, size=16, shuffle=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=shuffle)


def fit(monitors, tmp_path, module=None, namespace=pl, data=None, ckpt_path=None, **kwargs):
    monitors = monitors if isinstance(monitors, list) else [monitors]
    namespace.seed_everything(0, verbose=False)
    module = module if module is not None else classifier(namespace.LightningModule)()
    options = {
        "max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path, "logger": True,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, **kwargs,
    }  # fmt: skip
    trainer = namespace.Trainer(callbacks=[*options.pop("callbacks", []), *monitors], **options)
    trainer.fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return trainer


def monitor(**kwargs):
    return SpectrumMonitor(
        **{"every_n_steps": 5, "lanczos_steps": 12, "on_error": "raise", "figures_every": 0, **kwargs}
    )


def events(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"histograms": 0, "images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def dense_hessian(module, batch):
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
    names = [name for name, _ in module.named_parameters()]
    shapes = [p.shape for p in module.parameters()]

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        state = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(module, state, (batch[0],))
        return cross_entropy(outputs, batch[1])

    return torch.func.jacrev(torch.func.jacrev(loss))(flat)


@pytest.mark.parametrize("namespace", [pl, lightning_pl], ids=["pytorch_lightning", "lightning.pytorch"])
def test_one_line_on_a_real_trainer_and_read_back(namespace, tmp_path):
    watch = monitor(figures_every=1)
    trainer = fit(watch, tmp_path, namespace=namespace)
    assert [entry.step for entry in watch.history] == [0, 5, 10]
    board = events(trainer.log_dir)
    scalars = {event.step: event.value for event in board.Scalars("rmt/lambda_max")}
    assert list(scalars) == [0, 5, 10]
    assert scalars[10] == pytest.approx(watch.reading.spectrum.lambda_max.value, rel=1e-6)
    tags = board.Tags()
    assert "rmt/density" in tags["histograms"]
    assert {"rmt/spectrum", "rmt/spectrum_over_time"} <= set(tags["images"])
    assert {"rmt/trace", "rmt/trace_stderr", "rmt/probe_seconds", "rmt/overhead", "rmt/sharpness_times_lr"} <= set(
        tags["scalars"]
    )
    assert len({tuple(h.histogram_value.bucket_limit) for h in board.Histograms("rmt/density")}) == 1
    assert board.Scalars("rmt/sharpness_times_lr")[-1].value == pytest.approx(0.1 * scalars[10], rel=1e-6)


def test_values_are_those_of_the_module_at_that_step(tmp_path):
    """The last probe sees the weights after the last step: its levels are the dense Hessian's."""
    torch.manual_seed(0)
    module = Classifier().double()
    data = DataLoader([(x.double(), y) for x, y in loader(6).dataset], batch_size=16)
    watch = monitor(every_n_steps=5, lanczos_steps=83)
    fit(watch, tmp_path, module=module, data=data, max_steps=6)
    batch = list(data)[5]
    H = dense_hessian(_Forward(module), batch)
    values = np.linalg.eigvalsh(H.numpy())
    spectrum = watch.reading.spectrum
    assert watch.reading.step == 5
    assert spectrum.lambda_max.value == pytest.approx(values[-1], rel=1e-8)
    assert spectrum.lambda_min.value == pytest.approx(values[0], rel=1e-6)
    for level, value in zip(spectrum.top, values[::-1], strict=False):
        assert level.value == pytest.approx(value, rel=1e-8)
    assert abs(spectrum.trace.mean - values.sum()) < 4 * spectrum.trace.stderr + 1e-9


class _Forward(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.net = module.net

    def forward(self, x):
        return self.net(x)


def test_several_batches_are_the_weighted_mean_of_the_steps_before(tmp_path):
    torch.manual_seed(0)
    module = Classifier().double()
    dataset = [(x.double(), y) for x, y in loader(6).dataset][:88]  # the sixth batch has 8 samples
    data = DataLoader(dataset, batch_size=16)
    watch = monitor(every_n_steps=6, batches=6, lanczos_steps=83)
    fit(watch, tmp_path, module=module, data=data)
    assert [entry.step for entry in watch.history] == [5]
    assert watch.reading.samples == 88
    whole = next(iter(DataLoader(dataset, batch_size=88)))
    values = np.linalg.eigvalsh(dense_hessian(_Forward(module), whole).numpy())
    assert watch.reading.spectrum.lambda_max.value == pytest.approx(values[-1], rel=1e-8)


def test_steps_are_optimizer_steps_under_accumulation(tmp_path):
    watch = monitor(every_n_steps=2)
    trainer = fit(watch, tmp_path, accumulate_grad_batches=3, max_epochs=2)
    assert [entry.step for entry in watch.history] == [0, 2, 4, 6]
    assert [event.step for event in events(trainer.log_dir).Scalars("rmt/trace")] == [0, 2, 4, 6]


def test_resumed_run_probes_at_the_same_steps_with_the_same_values(tmp_path):
    def checkpoint():
        return pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, every_n_epochs=1)

    whole = monitor(every_n_steps=5)
    fit(whole, tmp_path / "a", max_epochs=2)
    first = monitor(every_n_steps=5)
    fit(first, tmp_path / "b", max_epochs=1, enable_checkpointing=True, callbacks=[checkpoint()])
    second = monitor(every_n_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(second, tmp_path / "b", max_epochs=2, ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert [e.to_dict() | {"seconds": 0} for e in second.history] == [
        e.to_dict() | {"seconds": 0} for e in whole.history
    ]
    assert [e.step for e in second.history] == [0, 5, 10, 15, 20]
    assert whole.reading.symmetry_error is None  # tested on the first probe only


def test_the_first_probe_is_announced_with_its_cost(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(monitor(probes=2), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "first probe" in record.getMessage()]
    assert "at most 28 products" in line
    assert re.search(
        r"about [0-9.e-]+ s, and [0-9.]+ MiB \([0-9.]+ for its basis, [0-9.]+ for graphs, [0-9.]+ for the "
        r"noise's vectors, most of it after the basis\) of \d+ MiB free; "
        r"then level statistics from the exact Hessian of up to 83 parameters \(at most 0.5 times as long, [0-9.]+ MiB",
        line,
    )


def test_the_announcement_counts_the_outlier_maps_products(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(monitor(batch_law_every=3, noise=False), tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "first probe" in record.getMessage()]
    steps = monitor().lanczos_steps
    assert f"at most {steps + 4 * steps} products" in line  # four batch sizes, each with all samples
    assert "more where products take as long on few samples" in line
    assert "noise's vectors" not in line


def test_state_is_plain(tmp_path):
    watch = monitor()
    fit(watch, tmp_path)
    assert json.loads(json.dumps(watch.state_dict())) == watch.state_dict()


def test_state_of_another_version_is_ignored_with_a_warning():
    watch = monitor()
    with pytest.warns(UserWarning, match="version 99.*afresh"):
        watch.load_state_dict({"version": 99})
    assert watch.history == []


def test_saved_readings_are_spectra_too(tmp_path):
    watch = monitor()
    trainer = fit(watch, tmp_path)
    files = sorted(Path(trainer.log_dir).rglob("*.npz"))
    assert [Reading.load(f).step for f in files] == [0, 5, 10]
    np.testing.assert_array_equal(Spectrum.load(files[-1]).nodes, watch.reading.spectrum.nodes)


def test_several_monitors_and_loggers(tmp_path):
    watches = [monitor(), monitor(name="head", parameters=["net.2.*"], every_n_steps=3)]
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    fit(watches, tmp_path, logger=loggers)
    assert watches[1].reading.parameters == ("net.2.weight", "net.2.bias")
    assert watches[1].reading.spectrum.size == 27
    scalars = events(loggers[0].log_dir).Tags()["scalars"]
    assert {"rmt/lambda_max", "head/lambda_max"} <= set(scalars)
    assert "head/lambda_max" in (Path(loggers[1].log_dir) / "metrics.csv").read_text()
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own
        fit([monitor(), monitor()], tmp_path)


def test_no_logger_is_refused_unless_somebody_reads(tmp_path):
    with pytest.raises(MisconfigurationException, match="nowhere to write"):
        fit(monitor(), tmp_path, logger=False)

    class Reader(pl.Callback):
        consumes_readings = True

    watch = monitor()
    fit(watch, tmp_path, logger=False, callbacks=[Reader()])
    assert watch.reading is not None


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("runs", [True, 2, 4])
def test_fast_dev_run_probes_once(tmp_path, runs, batches):
    watch = monitor(every_n_steps=50, batches=batches)
    fit(watch, tmp_path, fast_dev_run=runs, logger=False)
    assert len(watch.history) == 1
    assert not list(tmp_path.rglob("*.npz"))


def test_the_share_of_the_time_comes_once_it_means_something_and_at_the_end(tmp_path):
    """Not at the first probe, which costs hundreds of the one step before it; the last value is the whole training's."""
    watch = monitor(every_n_steps=10, lanczos_steps=5, figures_every=0)
    trainer = fit(watch, tmp_path, max_epochs=4)
    shares = {event.step: event.value for event in events(trainer.log_dir).Scalars("rmt/overhead")}
    assert [entry.step for entry in watch.history] == [0, 10, 20, 30, 40]
    assert list(shares) == [10, 20, 30, 40, 47]
    assert shares[47] == pytest.approx(watch._schedule.probe_seconds / watch._schedule.training_seconds, rel=1e-6)


def test_a_training_too_short_for_a_second_full_probe_is_told_so(tmp_path, caplog):
    """Once, with what to set; not where steps are given."""
    watch = SpectrumMonitor(on_error="raise", figures_every=0, lanczos_steps=10, levels=None)
    with caplog.at_level("INFO"):
        fit(watch, tmp_path, max_epochs=4)
    (said,) = [text for record in caplog.records if "for no second one" in (text := record.getMessage())]
    found = re.search(r"as long as (\d+) steps, so that 5 % of this training of 48 steps pay .*every_n_steps=", said)
    assert int(found[1]) > 0.05 * 48
    assert [entry.step for entry in watch.history if entry.speed == "full"] == [0]
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(monitor(), tmp_path / "steps", max_epochs=2)
    assert not [record for record in caplog.records if "for no second one" in record.getMessage()]


def test_default_budget_probes_at_the_start_and_stays_within(tmp_path):
    watch = SpectrumMonitor(lanczos_steps=5, on_error="raise", figures_every=0, max_overhead=0.5)
    trainer = fit(watch, tmp_path, max_epochs=20)
    assert watch.history[0].step == 0
    assert len(watch.history) > 2
    assert {"rmt/overhead"} <= set(events(trainer.log_dir).Tags()["scalars"])


def test_a_slow_first_probe_does_not_put_off_the_next(tmp_path):
    """Its second one is expected to take as long as its products, not as what was slow once."""
    waits = iter([3.0])

    def loss(module, batch):
        time.sleep(next(waits, 0.0))
        return cross_entropy(module.net(batch[0]), batch[1])

    watch = SpectrumMonitor(lanczos_steps=5, on_error="raise", figures_every=0, levels=None, loss_fn=loss)
    fit(watch, tmp_path)
    assert watch.reading.seconds > 3
    assert watch._schedule.probe_seconds > 3  # it was spent, though
    assert watch._schedule.state_dict()["full_cost"] < 1.5


class TwoSpeeds:
    """What one run with both kinds of probe left behind."""

    def __init__(self, directory):
        self.watch = monitor(every_n_steps=6, light_every_n_steps=2, lanczos_steps=40, figures_every=1, batches=2)
        trainer = fit(self.watch, directory, max_epochs=3)
        self.log_dir = Path(trainer.log_dir)
        self.scalars = {
            tag: [event.step for event in events(trainer.log_dir).Scalars(tag)]
            for tag in events(trainer.log_dir).Tags()["scalars"]
        }
        self.tags = events(trainer.log_dir).Tags()


@pytest.fixture(scope="module")
def two_speeds(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval).*")
        return TwoSpeeds(tmp_path_factory.mktemp("speeds"))


def test_light_readings_come_between_and_are_cheaper(two_speeds):
    watch = two_speeds.watch
    steps = {speed: [e.step for e in watch.history if e.speed == speed] for speed in ("full", "light")}
    assert steps["full"][:2] == [1, 7]
    assert steps["light"][:4] == [3, 5, 9, 11]
    products = {speed: {e.products for e in watch.history if e.speed == speed} for speed in ("full", "light")}
    assert max(products["light"]) < min(products["full"])
    assert (watch.reading.speed, watch.light_reading.speed) == ("full", "light")
    assert watch.reading.step < watch.light_reading.step


def test_light_readings_say_what_they_certified_and_nothing_else(two_speeds):
    watch, scalars = two_speeds.watch, two_speeds.scalars
    everywhere = [entry.step for entry in watch.history]
    full = [entry.step for entry in watch.history if entry.speed == "full"]
    for tag in ("lambda_max", "lambda_max_residual", "top/1", "sharpness_times_lr", "products", "probe_seconds"):
        assert scalars[f"rmt/{tag}"] == everywhere
    for tag in ("trace", "frobenius", "outliers/gap_index_high", "zero_mass", "negative_mass", "free_skew"):
        assert scalars[f"rmt/{tag}"] == full
    light = watch.light_reading.spectrum
    assert light.lambda_max.certified
    assert len(events(two_speeds.log_dir).Histograms("rmt/density")) == len(full)
    assert [event.step for event in events(two_speeds.log_dir).Images("rmt/spectrum")] == full


def test_light_and_full_readings_of_the_same_weights_agree(tmp_path):
    batch = next(iter(loader()))

    class Still(classifier()):
        def training_step(self, _, batch_idx):
            return self.loss(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    watch = monitor(every_n_steps=4, light_every_n_steps=2, lanczos_steps=60)
    fit(watch, tmp_path, Still())
    full = [e.lambda_max for e in watch.history if e.speed == "full"]
    light = [e.lambda_max for e in watch.history if e.speed == "light"]
    assert full
    assert light
    np.testing.assert_allclose(light, full[0], rtol=1e-5)


def test_readings_of_both_speeds_are_drawn_without_a_trainer(two_speeds, tmp_path, capsys):
    from lightning_rmt.__main__ import main

    assert main(["plot", str(two_speeds.log_dir), "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count(" light ") == sum(entry.speed == "light" for entry in two_speeds.watch.history)
    drawn = {path.name for path in (tmp_path / "rmt").iterdir()}
    assert {"spectrum_over_time.png", "eigenvalues_over_time.png", "spectrum_step_00000001.png"} <= drawn
    assert "spectrum_step_00000003.png" not in drawn


def test_a_light_reading_keeps_its_speed_over_saving_and_over_a_checkpoint(two_speeds):
    light = two_speeds.watch.light_reading
    assert Reading.load(two_speeds.log_dir / "rmt" / f"step_{light.step:08d}.npz").speed == "light"
    other = monitor(every_n_steps=6, light_every_n_steps=2)
    other.load_state_dict(json.loads(json.dumps(two_speeds.watch.state_dict())))
    assert [e.speed for e in other.history] == [e.speed for e in two_speeds.watch.history]
    assert other.history == two_speeds.watch.history


class Gan(pl.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 6), nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.loss_g, self.loss_d), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss(batch[0]))
            optimizer.step()

    def loss_g(self, x):
        return -self.critic(self.generator(torch.ones(len(x), 2))).mean()

    def loss_d(self, x):
        return (self.critic(x) ** 2).mean() + self.critic(self.generator(torch.ones(len(x), 2))).pow(2).mean()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.generator.parameters(), 0.01), torch.optim.SGD(self.critic.parameters(), 0.02)]


def test_manual_optimization_needs_a_loss(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"manual optimization.*loss_fn"):
        fit(monitor(), tmp_path, module=Gan())
    watch = monitor(loss_fn=lambda module, batch: module.loss_d(batch[0]))
    fit(watch, tmp_path, module=Gan())
    assert [entry.step for entry in watch.history] == [0, 5, 10]
    assert watch.reading.learning_rate == 0.02


def test_gauss_newton_needs_outputs(tmp_path):
    with pytest.raises(MisconfigurationException, match="curvature_outputs"):
        fit(monitor(curvature="ggn"), tmp_path)

    class WithOutputs(Classifier):
        def curvature_outputs(self, batch):
            return self.net(batch[0]), lambda logits: cross_entropy(logits, batch[1])

    torch.manual_seed(0)
    own = monitor(curvature="ggn", lanczos_steps=40)
    fit(own, tmp_path, module=WithOutputs())
    passed = monitor(curvature="ggn", lanczos_steps=40, outputs_fn=WithOutputs.curvature_outputs)
    torch.manual_seed(0)
    fit(passed, tmp_path, module=WithOutputs())
    assert own.reading.spectrum.lambda_min.value > -1e-5
    np.testing.assert_allclose(own.reading.spectrum.nodes, passed.reading.spectrum.nodes)
    assert own.reading.curvature == "ggn"


def test_gradient_covariance_is_positive_and_has_the_rank_of_the_batch(tmp_path):
    watch = monitor(curvature="gradient_covariance", lanczos_steps=40)
    fit(watch, tmp_path)
    spectrum = watch.reading.spectrum
    assert spectrum.lambda_min.value > -1e-5 * spectrum.lambda_max.value
    assert len(spectrum.top) <= 15
    fewer = monitor(curvature="gradient_covariance", lanczos_steps=40, microbatch=4)
    fit(fewer, tmp_path)
    assert len(fewer.reading.spectrum.top) <= 3  # four gradients about their mean


def test_operation_without_second_derivative_falls_back_to_checked_differences(tmp_path):
    class Bag(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, 4), nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return mse_loss(torch.tanh(self.head(self.bag(x.abs().long().clamp(max=4)))).squeeze(), y.float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    watch = monitor()
    with pytest.warns(UserWarning, match="embedding_bag") as caught:
        fit(watch, tmp_path, module=Bag())
    assert len([w for w in caught if "embedding_bag" in str(w.message)]) == 1  # of three probes
    assert any("finite differences" in note for note in watch.reading.notes)
    assert any("embedding_bag" in note for note in watch.reading.notes)
    assert watch.reading.product == "finite_difference"
    assert 0.0 < watch.reading.product_error < 0.02


def test_neither_second_derivatives_nor_finite_differences(tmp_path):
    class Kinks(Classifier):
        def loss(self, batch):
            hidden = 100 * torch.relu(self.net[0](batch[0]))
            return cross_entropy(self.net[2](torch.cdist(hidden, 100 * torch.eye(8))), batch[1])

    watch = SpectrumMonitor(every_n_steps=20, figures_every=0)
    with pytest.warns(UserWarning, match=r"second derivative of .*_cdist_backward, and finite differences.*loss_fn="):
        fit(watch, tmp_path, module=Kinks())


def test_finite_differences_that_were_asked_for_are_noted_without_a_warning(tmp_path):
    exact, watch = monitor(lanczos_steps=20), monitor(lanczos_steps=20, product="finite_difference")
    fit(exact, tmp_path)
    trainer = fit(watch, tmp_path)
    note = watch.reading.notes[0]
    assert "products are forward differences of gradients" in note
    assert f"Against double backward they err by {watch.reading.product_error:.1e}, and by" in note
    assert (exact.reading.product, exact.reading.product_error, exact.reading.notes) == ("exact", None, ())
    assert watch.reading.product == "finite_difference"
    assert exact.reading.spectrum.noise < watch.reading.product_error < 0.02
    assert watch.reading.spectrum.noise == 2 * watch.reading.product_error
    found, truth = watch.reading.spectrum.lambda_max, exact.reading.spectrum.lambda_max
    assert 0.0 < abs(found.value - truth.value) <= found.residual
    logged = events(trainer.log_dir).Scalars("rmt/product_error")
    assert logged[-1].value == pytest.approx(watch.reading.product_error, rel=1e-6)


def test_finite_differences_of_a_network_with_kinks_are_refused(tmp_path):
    class Kinks(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    watch = SpectrumMonitor(every_n_steps=20, figures_every=0, product="finite_difference")
    with pytest.warns(UserWarning, match=r"product='auto' may: finite differences can't be trusted.* has kinks"):
        fit(watch, tmp_path, module=Kinks())
    assert watch.reading is None


def test_gradient_hooks_and_unreached_parameters_are_warned_of_and_noted(tmp_path):
    class Hooked(Classifier):
        def __init__(self):
            super().__init__()
            self.net[0].weight.register_hook(lambda gradient: gradient / 2)
            self.spare = nn.Linear(2, 2)

    plain, hooked = monitor(lanczos_steps=30), monitor(lanczos_steps=30)
    fit(plain, tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="gradient hooks"), pytest.warns(UserWarning, match="no gradient reaches"):
        fit(hooked, tmp_path, module=Hooked())
    notes = " ".join(hooked.reading.notes)
    assert "net.0.weight" in notes
    assert "no gradient reaches spare.weight, spare.bias" in notes
    assert plain.reading.notes == ()


def test_failing_probe_is_a_warning_and_repeated_ones_turn_it_off(tmp_path):
    def broken(module, batch):
        raise RuntimeError("no loss today")

    watch = SpectrumMonitor(every_n_steps=2, loss_fn=broken, figures_every=0)
    with pytest.warns(UserWarning, match="no loss today") as caught:
        fit(watch, tmp_path)
    ours = [str(w.message) for w in caught if "SpectrumMonitor" in str(w.message)]
    assert len(ours) == 2
    assert "off now" in ours[-1]
    assert watch.reading is None
    with pytest.raises(RuntimeError, match="no loss today"):
        fit(monitor(loss_fn=broken), tmp_path)


def test_batches_that_do_not_fit_between_probes_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="don't fit"):
        fit(monitor(every_n_steps=2, batches=3), tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        {"every_n_steps": 0}, {"every_n_steps": 2.5}, {"every_n_steps": "5"}, {"lanczos_steps": 10.0},
        {"max_overhead": 0.0}, {"max_overhead": 2.0}, {"curvature": "fisher"}, {"lanczos_steps": 0},
        {"probes": 0},
        {"microbatch": 0}, {"batches": 0}, {"on_error": "ignore"}, {"parameters": []}, {"parameters": "net.*"}, {"name": ""},
        {"name": "../x"}, {"name": "."}, {"name": "a\0b"}, {"seed": -1}, {"product": "fast"}, {"figures_every": -1},
    ],
)  # fmt: skip
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SpectrumMonitor(**arguments)


def test_pattern_without_a_match_is_refused_before_the_first_step(tmp_path):
    watch = SpectrumMonitor(every_n_steps=5, parameters=["net.0.*", "net.5.*"])
    with pytest.raises(MisconfigurationException, match=r"net\.5\.\*.*net\.0\.weight"):
        fit(watch, tmp_path)
    assert watch.history == []


def test_pattern_of_parameters_that_are_unfrozen_later_is_not_refused(tmp_path):
    class Unfreezes(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.net[0].requires_grad_(batch_idx >= 3)

    module = Classifier()
    module.net[0].requires_grad_(False)
    watch = SpectrumMonitor(every_n_steps=5, lanczos_steps=5, parameters=["net.0.*"], figures_every=0)
    with pytest.warns(UserWarning, match="matches only frozen parameters"):
        fit(watch, tmp_path, module, callbacks=[Unfreezes()])
    assert [entry.step for entry in watch.history] == [5, 10]


@pytest.mark.parametrize("every_n_steps", [None, 5])
def test_the_same_monitor_watches_a_second_training_from_its_start(every_n_steps, tmp_path):
    """Cross-validation, say: nothing of the first training's schedule, pictures or sentences is carried over."""
    watch, found, texts = monitor(every_n_steps=every_n_steps), [], []
    for run in "ab":
        trainer = fit(watch, tmp_path / run)
        found.append([(entry.step, entry.lambda_max) for entry in watch.history])
        texts.append([tag for tag in events(trainer.log_dir).Tags()["tensors"] if "notes" in tag])
    assert found[0] == found[1]
    assert found[0][0][0] == 0
    assert texts[0] == texts[1] != []
    fit(watch, tmp_path / "c", fast_dev_run=True)
    assert len(watch.history) == 1


def test_failures_of_an_earlier_training_do_not_count(tmp_path):
    def broken(module, batch):
        raise RuntimeError("no loss today")

    watch = SpectrumMonitor(every_n_steps=2, loss_fn=broken, figures_every=0)
    for _ in range(2):
        with pytest.warns(UserWarning, match="no loss today") as caught:
            fit(watch, tmp_path)
        assert len([w for w in caught if "SpectrumMonitor" in str(w.message)]) == 2


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    watch, module = monitor(), Classifier()
    trainer = fit(watch, tmp_path, module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [entry.step for entry in watch.history] == [0, 5, 10, 15, 20]


class Recorder(pl.loggers.Logger):
    """A logger without a directory of its own, in a folder that its runs share; its images fail."""

    name, version, save_dir = "project", None, None

    def __init__(self, save_dir, version):
        super().__init__()
        self.save_dir, self.version, self.steps = str(save_dir), version, []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step):
        if "rmt/lambda_max" in metrics:
            self.steps.append(step)

    def log_image(self, *args, **kwargs):
        raise ConnectionError("server is down")


def test_runs_that_share_a_folder_keep_their_readings_apart(tmp_path):
    for run in ("abc", 3):
        fit(monitor(), tmp_path, logger=Recorder(tmp_path, run))
    assert sorted(path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("step_00000000.npz")) == [
        "project/abc/rmt", "project/version_3/rmt",
    ]  # fmt: skip


def test_what_cannot_be_written_ends_neither_the_training_nor_the_rest_of_the_writing(tmp_path):
    logger, in_the_way = Recorder(tmp_path, "x"), tmp_path / "project" / "x" / "rmt"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    watch = SpectrumMonitor(every_n_steps=5, lanczos_steps=5, figures_every=1)
    with pytest.warns(UserWarning, match="could not write") as caught:
        trainer = fit(watch, tmp_path, logger=logger, max_epochs=1)
    said = " ".join(str(w.message) for w in caught)
    assert "FileExistsError" in said
    assert "server is down" in said
    assert trainer.global_step == 12
    assert logger.steps == [0, 5, 10]


def test_a_window_cut_by_a_resume_is_noted(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(monitor(batches=3), tmp_path, callbacks=[saving], enable_checkpointing=True)
    resumed = monitor(batches=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(callbacks used to create|before the epoch ended).*")
        fit(resumed, tmp_path, ckpt_path=tmp_path / "step=6.ckpt", max_steps=8)
    assert resumed.reading.step == 7
    assert "2 of 3 curvature batches" in resumed.reading.notes[0]


def test_max_time_is_told_to_the_schedule(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "lightning_rmt.live.schedule.Schedule.decide",
        lambda self, step, total_steps, seconds_left: told.append(seconds_left) or Decision(step + 1000, 0),
    )
    fit(monitor(every_n_steps=None), tmp_path, max_time={"hours": 1})
    fit(monitor(every_n_steps=None), tmp_path)
    assert 3500 < told[0] <= 3600
    assert told[-1] == float("inf")


@pytest.mark.parametrize("kind", ["tqdm", "rich"])
def test_progress_bars_keep_working(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_rmt.live.progress.DELAY_SECONDS", 0.0)
    bar = {"tqdm": pl.callbacks.TQDMProgressBar, "rich": pl.callbacks.RichProgressBar}[kind]()
    fit(monitor(), tmp_path, callbacks=[bar], enable_progress_bar=True, max_epochs=2)
    if kind == "tqdm":
        assert "measuring the curvature" in capsys.readouterr().err


def test_readings_of_a_watched_run_plot_without_a_trainer(tmp_path):
    from lightning_rmt.__main__ import main

    trainer = fit(monitor(), tmp_path)
    assert main(["plot", str(trainer.log_dir), "--output", str(tmp_path / "figures")]) in (0, None)
    assert list((tmp_path / "figures").rglob("*.png"))
