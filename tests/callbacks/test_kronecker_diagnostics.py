"""The diagnostics on real Trainers: what they write, of which gradients, and what they refuse."""

from __future__ import annotations

import json
import warnings

import lightning.pytorch as lightning_pl
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt import KroneckerDiagnostics, SpectrumMonitor
from lightning_rmt.callbacks.kronecker_diagnostics import CLIPPED, SAME_DATA
from lightning_rmt.curvature.gradient_factors import GradientFactors
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.local_law.kronecker import read_matrix

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*logging interval.*")


class Mixed:
    """A network with one of everything; `optimizer` of (parameters) decides how it trains."""

    def __init__(self, optimizer=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = optimizer or (lambda parameters: torch.optim.AdamW(parameters, 0.01))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Module(Mixed, pl.LightningModule):
    pass


class OtherModule(Mixed, lightning_pl.LightningModule):
    pass


class Still(torch.optim.SGD):
    """The weights stay, whatever the gradients are: those of all steps are of the same network."""

    def step(self, closure=None):
        return None if closure is None else closure()


class ScalesItself(Still):
    """Leaves unscaling to its step, as fused Adam does."""

    _step_supports_amp_scaling = True


def frozen_sgd(parameters):
    return Still(parameters, 0.1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_module():
    torch.manual_seed(0)
    return Module(frozen_sgd)


def loader(batches=24, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()), batch_size=size)


def fit(callbacks, tmp_path, module=None, namespace=pl, data=None, ckpt_path=None, **options):
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    namespace.seed_everything(0, verbose=False)
    module = module if module is not None else Module()
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path, "logger": True,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = namespace.Trainer(callbacks=callbacks, **{**defaults, **options})
    trainer.fit(module, data if data is not None else loader(), ckpt_path=ckpt_path)
    return trainer


def diagnostics(**options):
    return KroneckerDiagnostics(**{"factor_steps": 12, "held_out_steps": 8, "on_error": "raise", **options})


def events(directory):
    accumulator = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def texts(board, tag):
    return [
        event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")
    ]  # of every step


def by_hand(module, batches, group=1):
    """Readings from gradients of the module as it is, without any Trainer; `group` batches are one step."""
    weights = {"net.0": module.net[0].weight, "net.2": module.net[2].weight}
    factors = {
        n: GradientFactors(tuple(w.shape), factor_steps=12, held_out_steps=8, beta=0.95) for n, w in weights.items()
    }
    for i in range(0, group * 20, group):
        loss = sum(module.training_step(batch, 0) for batch in batches[i : i + group]) / group
        for (_, one), gradient in zip(factors.items(), torch.autograd.grad(loss, weights.values()), strict=True):
            one.add(gradient)
    return {name: read_matrix(one.moments()) for name, one in factors.items()}


@pytest.mark.parametrize(
    ("namespace", "kind"), [(pl, Module), (lightning_pl, OtherModule)], ids=["pytorch_lightning", "lightning.pytorch"]
)
def test_one_line_on_a_real_trainer_and_read_back(namespace, kind, tmp_path):
    watch = diagnostics()
    trainer = fit(watch, tmp_path, kind(), namespace)
    board = events(trainer.log_dir)
    assert watch.reading.step == 19
    assert set(watch.reading.layers) == {"net.0", "net.2"}
    for layer, found in watch.reading.layers.items():
        prefix = f"rmt/kronecker/{layer}"
        expected = {
            "rotation_gain": found.rotation_gain.mean, "rotation_gain_stderr": found.rotation_gain.stderr,
            "q_left": found.left.q, "q_right": found.right.q,
            "effective_samples_left": found.left.effective_samples.mean,
            "effective_samples_right": found.right.effective_samples.mean,
            "effective_samples_left_stderr": found.left.effective_samples.stderr,
            "eigenvalue_bias_left": found.left.bias, "eigenvalue_bias_right": found.right.bias,
            "eigenvalue_bias_left_held_out": found.left.bias_held_out.mean,
            "eigenvalue_bias_right_held_out_stderr": found.right.bias_held_out.stderr,
        }  # fmt: skip
        for tag, value in expected.items():
            (event,) = board.Scalars(f"{prefix}/{tag}")
            assert (event.step, event.value) == (19, pytest.approx(value, rel=1e-6)), tag
    assert board.Scalars("rmt/kronecker/rotation_gain")[0].value == pytest.approx(watch.reading.rotation_gain.mean)
    (verdict,) = texts(board, "rmt/kronecker/verdict")
    assert "net.0" in verdict
    (note,) = texts(board, "rmt/kronecker/notes")
    assert "net.0.bias, net.2.bias: a vector: no basis to rotate to" in note


def test_gradients_are_those_of_the_steps(tmp_path):
    module = Module(frozen_sgd)
    watch = diagnostics()
    fit(watch, tmp_path, module)
    for layer, found in by_hand(module, list(loader())).items():
        seen = watch.reading.layers[layer]
        assert seen.rotation_gain.mean == pytest.approx(found.rotation_gain.mean, rel=1e-5)
        assert seen.left.effective_samples.mean == pytest.approx(found.left.effective_samples.mean, rel=1e-4)


def test_a_rotated_network_gains_and_says_so(tmp_path, caplog):
    """Inputs of very different scales, rotated: what is a coordinate for SOAP is none for Adam."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 6, generator=generator) * 3.0 ** -torch.arange(6.0)
    rotated = x @ torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    y = torch.randint(3, (640,), generator=generator)
    gains = []
    for inputs in (x, rotated):
        watch = diagnostics()
        module = same_module()
        data = DataLoader(TensorDataset(inputs, y), batch_size=32)
        with caplog.at_level("INFO"):
            fit(watch, tmp_path, module, data=data)
        gains.append(watch.reading.layers["net.0"])
    assert gains[1].rotation_gain.mean / gains[0].rotation_gain.mean > 1.5
    assert gains[1].word == "gains"
    said = [r.getMessage() for r in caplog.records if "would gain from an optimizer that rotates" in r.getMessage()]
    assert "net.0" in said[-1]
    assert "no speed-up of as much" in said[-1]


def test_accumulated_batches_are_one_gradient(tmp_path):
    module = Module(frozen_sgd)
    watch = diagnostics()
    fit(watch, tmp_path, module, data=loader(40), accumulate_grad_batches=2)
    assert watch.reading.step == 19
    for layer, found in by_hand(module, list(loader(40)), group=2).items():
        assert watch.reading.layers[layer].rotation_gain.mean == pytest.approx(found.rotation_gain.mean, rel=1e-5)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize(
    ("batches", "options", "same"),
    [(1, {}, True), (24, {"overfit_batches": 1}, True), (2, {}, False), (2, {"accumulate_grad_batches": 2}, True),
     (2, {"limit_train_batches": 1}, False)],
)  # fmt: skip
def test_steps_on_the_same_data_are_said_to_be(batches, options, same, tmp_path):
    watch = diagnostics()
    fit(watch, tmp_path, data=loader(batches), max_epochs=20, **options)
    assert watch.reading.notes == ((SAME_DATA,) if same else ())


def test_gradients_are_taken_before_clipping_and_it_says_so(tmp_path):
    plain, clipped = diagnostics(), diagnostics()
    fit(plain, tmp_path, same_module())
    trainer = fit(clipped, tmp_path, same_module(), gradient_clip_val=1e-3)
    one, other = (watch.reading.layers["net.0"].rotation_gain.mean for watch in (plain, clipped))
    assert other == one
    assert plain.reading.notes == ()
    assert clipped.reading.notes == (CLIPPED,)
    assert CLIPPED in texts(events(trainer.log_dir), "rmt/kronecker/notes")[0]


@pytest.mark.parametrize("optimizer", [frozen_sgd, lambda p: ScalesItself(p, 0.1)], ids=["trainer", "optimizer"])
def test_gradients_are_unscaled_under_a_gradient_scaler(optimizer, tmp_path):
    """With a scale that changes in the window, whoever takes it off; the error is float16's."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    watch, plain = diagnostics(), diagnostics()
    fit(plain, tmp_path, same_module())
    module = same_module()
    module.optimizer = optimizer
    fit(watch, tmp_path, module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() > 2.0**12
    for layer, found in plain.reading.layers.items():
        seen = watch.reading.layers[layer]
        assert seen.rotation_gain.mean == pytest.approx(found.rotation_gain.mean, rel=0.02)
        assert seen.left.effective_samples.mean == pytest.approx(found.left.effective_samples.mean, rel=0.05)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    data = [[x.clone(), y] for x, y in loader(23)]
    for i, bad in ((2, float("nan")), (9, float("inf")), (15, float("nan"))):
        data[i][0][0, 0] = bad
    kept = [batch for i, batch in enumerate(data) if i not in (2, 9, 15)]
    watch, module = diagnostics(), Module(frozen_sgd)
    trainer = fit(watch, tmp_path, module, data=DataLoader(data, batch_size=None))
    assert watch.reading.not_finite == 3
    assert watch.reading.step == 22
    for layer, found in by_hand(module, kept).items():
        assert watch.reading.layers[layer].rotation_gain.mean == pytest.approx(found.rotation_gain.mean, rel=1e-5)
    board = events(trainer.log_dir)
    assert board.Scalars("rmt/kronecker/not_finite_steps")[0].value == 3
    assert "3 steps with NaN or infinite gradients are left out" in texts(board, "rmt/kronecker/notes")[0]


class Peculiar(Module):
    """Embeddings dense and sparse, a convolution, a frozen layer, an unused one and one used every other time."""

    def __init__(self):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, 0.01))
        self.embedding, self.bag = nn.Embedding(5, 6), nn.Embedding(5, 6)
        self.sparse = SparseRows()
        self.conv = nn.Conv1d(2, 4, 3)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.sometimes = nn.Linear(6, 6)

    def training_step(self, batch, batch_idx):
        x = self.frozen(batch[0]) + self.embedding(batch[1]) + self.sparse(batch[1])
        x = x + self.conv(x.view(-1, 2, 3)).view(-1, 4).sum(1, keepdim=True)
        if batch_idx % 2:
            x = self.sometimes(x)
        return cross_entropy(self.net(x), batch[1])


class SparseRows(nn.Module):
    """A sparse gradient of something that isn't called an embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, index):
        return nn.functional.embedding(index, self.weight, sparse=True)


def test_what_is_skipped_has_a_reason(tmp_path):
    watch = diagnostics(max_dim=7)
    fit(watch, tmp_path, Peculiar(), data=loader(60))
    assert set(watch.reading.layers) == {"conv", "sometimes"}
    reasons = {
        "embedding.weight": "an embedding", "sparse": "its gradient is sparse", "frozen.weight": "frozen",
        "unused": "no gradient reached it", "net.0.weight": "8 x 6 as a matrix, over max_dim=7", "conv.bias": "a vector",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert watch.reading.skipped[name].startswith(reason), name
    assert watch.reading.step == 39  # waits for `sometimes`, and no longer for `unused`


def test_measurements_come_again_and_only_news_is_said(tmp_path):
    watch = diagnostics(every_n_steps=30)
    trainer = fit(watch, tmp_path, data=loader(85))
    assert [reading.step for reading in watch.history] == [19, 49, 79]
    board = events(trainer.log_dir)
    assert [event.step for event in board.Scalars("rmt/kronecker/net.0/rotation_gain")] == [19, 49, 79]
    assert len(texts(board, "rmt/kronecker/verdict")) == 3
    assert sum("a vector" in note for note in texts(board, "rmt/kronecker/notes")) == 1
    once = diagnostics(every_n_steps=None)
    fit(once, tmp_path, data=loader(85))
    assert [reading.step for reading in once.history] == [19]


def test_a_training_that_is_too_short_says_so(tmp_path):
    watch = diagnostics()
    trainer = fit(watch, tmp_path, data=loader(5))
    assert watch.reading.layers == {}
    board = events(trainer.log_dir)
    assert "only 5 of 20 gradients came" in texts(board, "rmt/kronecker/notes")[0]
    assert "no weight matrix could be measured" in texts(board, "rmt/kronecker/verdict")[0]
    assert "rmt/kronecker/rotation_gain" not in board.Tags()["scalars"]


def test_a_resumed_run_begins_a_cut_measurement_again(tmp_path):
    checkpoints = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit([diagnostics(), checkpoints], tmp_path / "a", data=loader(15), enable_checkpointing=True)
    cut = diagnostics(every_n_steps=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(cut, tmp_path / "b", data=loader(15), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert [reading.step for reading in cut.history] == [34]  # begins at 15; the next one is due after 60
    state = cut.state_dict()
    assert json.loads(json.dumps(state)) == state
    again = diagnostics()
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.load_state_dict({"version": 0})
    assert again.state_dict()["due"] == 0


def test_other_loggers_get_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path)
    watch = diagnostics()
    fit(watch, tmp_path, logger=logger)
    logger.save()
    rows = np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    assert float(rows["rmt/kronecker/net.0/rotation_gain"]) == pytest.approx(
        watch.reading.layers["net.0"].rotation_gain.mean
    )


def test_lbfgs_asks_again_for_the_same_batch(tmp_path):
    watch = diagnostics()
    lbfgs = lambda parameters: torch.optim.LBFGS(parameters, 0.01, max_iter=3)  # noqa: E731
    fit(watch, tmp_path, Module(lbfgs))
    assert watch.reading.step == 19


def test_an_optimizer_within_backward_gives_no_gradients(tmp_path):
    watch = diagnostics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(watch, tmp_path, Module(lambda parameters: None))
    assert set(watch.reading.skipped.values()) >= {"no gradient reached it"}


def test_suggested_learning_rate_for_sgd(tmp_path):
    monitor = SpectrumMonitor(every_n_steps=5, figures_every=0, levels=None, on_error="raise")
    watch = diagnostics()
    sgd = Module(lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9))
    trainer = fit([watch, monitor], tmp_path, sgd)
    board = events(trainer.log_dir)
    first = board.Scalars("rmt/lambda_max")[0].value
    (rate,) = board.Scalars("rmt/suggested_lr")
    assert rate.value == pytest.approx(2 / first, rel=1e-6)
    (note,) = texts(board, "rmt/suggested_lr_note")
    assert "2.2 times that of a tuned one" in note


@pytest.mark.parametrize(
    ("monitor", "optimizer", "words"),
    [
        (None, frozen_sgd, "takes a SpectrumMonitor of the Hessian of all parameters"),
        ({"curvature": "gradient_covariance"}, frozen_sgd, "takes a SpectrumMonitor of the Hessian"),
        ({"parameters": ["net.0.*"]}, frozen_sgd, "takes a SpectrumMonitor of the Hessian of all parameters"),
        ({"batches": 12}, frozen_sgd, "lambda_max was measured after step 11"),
        ({}, None, None),  # Adam
    ],
)
def test_no_learning_rate_and_why(monitor, optimizer, words, tmp_path):
    callbacks = [diagnostics()]
    if monitor is not None:
        options = {"every_n_steps": 12, "figures_every": 0, "levels": None, "lanczos_steps": 30, **monitor}
        callbacks.append(SpectrumMonitor(on_error="raise", **options))
    board = events(fit(callbacks, tmp_path, Module(optimizer)).log_dir)
    assert "rmt/suggested_lr" not in board.Tags()["scalars"]
    tag = "rmt/suggested_lr_note"
    if words is None:
        assert f"{tag}/text_summary" not in board.Tags()["tensors"]
    else:
        assert words in texts(board, tag)[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1"),
        ({"every_n_steps": 19}, "12 \\+ 8 steps, which don't fit into every_n_steps=19"),
        ({"factor_steps": 1}, "factor_steps must be at least 2"),
        ({"factor_steps": 2.5}, "factor_steps must be an integer"),
        ({"held_out_steps": 7}, "held_out_steps must be at least 8"),
        ({"beta": 1.0}, "beta is the decay"),
        ({"beta": float("nan")}, "beta is the decay"),
        ({"max_dim": 0}, "max_dim must be an integer of at least 1"),
        ({"max_memory_mib": 0.0}, "max_memory_mib must be above 0"),
        ({"parameters": []}, "parameters must be a list of name patterns"),
        ({"parameters": "net"}, "parameters must be a list of name patterns"),
        ({"name": "../x"}, "name becomes a tag prefix"),
        ({"on_error": "ignore"}, "on_error must be one of"),
    ],
)
def test_bad_values_are_refused_early(options, words):
    with pytest.raises(ValueError, match=words):
        diagnostics(**options)


def test_patterns(tmp_path):
    watch = diagnostics(parameters=["net.2.*"])
    fit(watch, tmp_path)
    assert set(watch.reading.layers) == {"net.2"}
    with pytest.raises(MisconfigurationException, match=r"KroneckerDiagnostics\(parameters=\['nte.*'\]\)"):
        fit(diagnostics(parameters=["nte.*"]), tmp_path)


class FakeStrategy:
    pass


@pytest.mark.parametrize("kind", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused(kind):
    trainer = type("Trainer", (), {"strategy": type(kind, (FakeStrategy,), {})()})()
    with pytest.raises(MisconfigurationException, match=f"needs whole gradients, and under {kind}"):
        diagnostics().setup(trainer, None, "fit")
    diagnostics().setup(trainer, None, "test")


def test_a_failure_is_a_warning_and_the_training_goes_on(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(GradientFactors, "add", fails)
    watch = diagnostics(on_error="warn")
    with pytest.warns(UserWarning, match=r"could not take gradients and is off now.*RuntimeError: out of luck") as told:
        trainer = fit(watch, tmp_path, data=loader(44))
    assert sum("KroneckerDiagnostics" in str(warning.message) for warning in told) == 1
    assert trainer.global_step == 44
    assert watch.reading is None
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(diagnostics(), tmp_path)


def test_barebones_and_fast_dev_run_do_nothing(tmp_path):
    for options in (
        {"barebones": True, "logger": None, "enable_checkpointing": None},
        {"fast_dev_run": True, "logger": None},
    ):
        watch = diagnostics()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(watch, tmp_path, **options)
        assert watch.reading is None


def test_nothing_of_the_module_is_kept(tmp_path):
    watch = diagnostics()
    fit(watch, tmp_path)
    assert watch._window is None
    assert "log" not in watch.__dict__
    again = fit(watch, tmp_path)  # and it watches a second training afresh
    assert [reading.step for reading in watch.history] == [19]
    assert len(texts(events(again.log_dir), "rmt/kronecker/notes")) == 1


def test_parameters_that_the_module_shards_itself_are_refused(tmp_path):
    module = Module()
    module.net[2].weight._local_tensor = None  # what a DTensor has
    with pytest.raises(MisconfigurationException, match=r"net\.2\.weight is sharded \(DTensor\)"):
        fit(diagnostics(), tmp_path, module)
