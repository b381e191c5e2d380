"""`preconditioned=True`: the spectrum of P^-1/2 H P^-1/2, with the P that the optimizer's own last step shows."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from bitwise_cases import CASES, gradient_scaler
from harness import Case, differences, train
from live_models import Classifier, vectors
from pytorch_lightning.loggers import CSVLogger
from several_ranks import on_two_ranks
from test_bitwise_distributed import CASES as ON_TWO_RANKS
from torch import nn, optim

import lightning_rmt.optim.diagonal_metric as diagonal_metric
from lightning_rmt import Hessian, LocalLawDamping, SpectralPreconditioner, SpectrumMonitor
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.reading import Reading
from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.scalars import split

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
STEPS = 8


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(16, 4, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(3, (16,), generator=generator)


class Module(pl.LightningModule):
    """Notes the gradient and the step of its last optimizer step, as anyone outside the optimizer can."""

    def __init__(self, optimizers):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.optimizers_of = optimizers

    def loss(self, data):
        return nn.functional.cross_entropy(self.net(data[0]), data[1])

    def training_step(self, data, _):
        return self.loss(data)

    def flat(self, gradients=False):
        return torch.cat([(p.grad if gradients else p).detach().reshape(-1).clone() for p in self.parameters()])

    def on_before_optimizer_step(self, optimizer):
        self.before, self.gradient = self.flat(), self.flat(gradients=True)

    def on_before_zero_grad(self, optimizer):
        self.taken = self.before - self.flat() if hasattr(self, "before") else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.taken = self.before - self.flat()

    def configure_optimizers(self):
        return self.optimizers_of(self)


def monitor(**options):
    settings = {"every_n_steps": STEPS - 1, "lanczos_steps": 60, "on_error": "raise", "preconditioned": True}
    return SpectrumMonitor(**{**settings, **options})


def fit(directory, optimizers, watch=None, steps=STEPS, **options):
    module = Module(optimizers)
    watch = watch or monitor()
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[watch, *options.pop("callbacks", [])],
        logger=CSVLogger(directory),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=directory,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=None))
    return module, watch, trainer


def hessian(module):
    with Hessian(module.loss, module.named_parameters(), [Data()[STEPS - 1]]) as operator:
        return operator.matmat(torch.eye(operator.size, dtype=torch.float64))


def momentum(optimizer):
    return torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in optimizer.param_groups[0]["params"]])


def mean(module, optimizer):
    """Adam's corrected mean of gradients."""
    return momentum(optimizer) / (1 - 0.9**STEPS)


def nesterov_mean(module, optimizer):
    mu = [0.9 * (1 - 0.5 * 0.96 ** (t * 4e-3)) for t in range(1, STEPS + 2)]
    own = (1 - mu[-2]) / (1 - np.prod(mu[:-1]))
    return own * module.gradient + mu[-1] / (1 - np.prod(mu)) * momentum(optimizer)


def gradient(module, optimizer):
    return module.gradient


# What the step is P^-1 times of, and the limit times the learning rate, 0.01
ADAM = 2 * 1.9 / 0.1 * (1 - 0.9**STEPS)
OPTIMIZERS = {
    "Adam": (partial(optim.Adam, betas=(0.9, 0.95)), mean, ADAM),
    "Adam, amsgrad, eps": (partial(optim.Adam, amsgrad=True, eps=1e-3), mean, ADAM),
    "AdamW, foreach": (partial(optim.AdamW, weight_decay=0.0, foreach=True), mean, ADAM),
    "AdamW, fused": (partial(optim.AdamW, weight_decay=0.0, fused=True), mean, ADAM),
    "NAdam": (optim.NAdam, nesterov_mean, None),
    "RAdam, rectified": (optim.RAdam, mean, ADAM),
    "Adamax": (optim.Adamax, mean, ADAM),
    "RMSprop": (optim.RMSprop, gradient, 2),
    "RMSprop, centered": (partial(optim.RMSprop, centered=True, alpha=0.5), gradient, 2),
    "Adagrad": (partial(optim.Adagrad, lr_decay=0.1), gradient, 2 * (1 + 0.1 * (STEPS - 1))),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_dense_matrix_with_the_p_of_the_last_step(name, tmp_path):
    """P is what the optimizer's last step divided by: direction over step, whatever its state is called."""
    kind, direction, limit = OPTIMIZERS[name]
    module, watch, trainer = fit(tmp_path, lambda module: kind(module.parameters(), lr=0.01))
    optimizer = trainer.optimizers[0]
    rate = 0.01 / (1 + 0.1 * (STEPS - 1)) if name == "Adagrad" else 0.01
    root = (rate * direction(module, optimizer) / module.taken).rsqrt()
    exact = torch.linalg.eigvalsh(root[:, None] * hessian(module) * root).numpy()
    reading = watch.reading
    assert reading.spectrum.lambda_max.certified
    assert reading.spectrum.lambda_max.value == pytest.approx(exact[-1], rel=1e-7)
    found = [level.value for level in reading.spectrum.top[:5]]
    np.testing.assert_allclose(found, exact[::-1][: len(found)], rtol=1e-7)
    assert reading.spectrum.lambda_min.value == pytest.approx(exact[0], rel=1e-6)
    assert reading.preconditioned == type(optimizer).__name__
    if limit is not None:
        assert reading.stability_limit == pytest.approx(limit / 0.01)
    sharpness = reading.sharpness_over_limit
    assert sharpness.value == pytest.approx(exact[-1] / reading.stability_limit, rel=1e-7)
    assert sharpness.residual == reading.spectrum.lambda_max.residual / reading.stability_limit


def test_a_wrong_bias_correction_is_seen(tmp_path, monkeypatch):
    """The negative control of the test above."""
    right = diagonal_metric.adam_denominator

    def one_step_off(state, group, dtype):
        return right({**state, "step": state["step"] + 1}, group, dtype)

    monkeypatch.setattr(diagonal_metric, "adam_denominator", one_step_off)
    with pytest.raises(AssertionError):
        test_it_is_the_dense_matrix_with_the_p_of_the_last_step("Adam", tmp_path)


def test_groups_and_several_optimizers(tmp_path):
    """Relative rates are part of P: one matrix, one limit."""

    def optimizers(module):
        first, last = module.net[0], module.net[2]
        adam = optim.Adam([{"params": [first.weight]}, {"params": [first.bias], "lr": 0.1, "eps": 1e-2}], lr=0.01)
        return [adam, optim.RMSprop([last.weight], lr=0.001)]  # and the last bias in none

    class Manual(Module):
        automatic_optimization = False

        def training_step(self, data, _):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(self.loss(data))
            for optimizer in self.optimizers():
                optimizer.step()

        on_before_zero_grad = on_before_optimizer_step = on_train_batch_end = lambda self, *_: None

    module = Manual(optimizers)
    watch = monitor(loss_fn=lambda module, batch: module.loss(batch))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpectrumMonitor 'rmt': no gradient reaches")
        trainer = pl.Trainer(
            max_steps=2 * STEPS, callbacks=[watch], logger=CSVLogger(tmp_path), accelerator="cpu", **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=None))
    adam, rms = trainer.optimizers
    first, last = module.net[0], module.net[2]

    def root(moment, correction, eps):
        return (moment / correction).sqrt().add(eps).reshape(-1)

    gain = 0.1 / 1.9 / (1 - 0.9**STEPS)  # of Adam's mean
    rates = [0.01 * gain, 0.1 * gain, 0.001]
    roots = [
        root(adam.state[first.weight]["exp_avg_sq"], 1 - 0.999**STEPS, 1e-8),
        root(adam.state[first.bias]["exp_avg_sq"], 1 - 0.999**STEPS, 1e-2),
        root(rms.state[last.weight]["square_avg"], 1, 1e-8),
    ]
    scale = torch.cat([(rate / max(rates) / p).sqrt() for rate, p in zip(rates, roots, strict=True)] + [torch.zeros(3)])
    exact = torch.linalg.eigvalsh(scale[:, None] * hessian(module) * scale)
    assert watch.reading.spectrum.lambda_max.value == pytest.approx(float(exact[-1]), rel=1e-7)
    assert watch.reading.stability_limit == pytest.approx(2 / max(rates))
    assert watch.reading.preconditioned == "Adam and RMSprop"
    assert any("no step moves net.2.bias" in note for note in watch.reading.notes)


def adam(module):
    return optim.Adam(module.parameters(), lr=0.01)


def test_what_is_logged_and_saved(tmp_path):
    _, watch, _ = fit(tmp_path, adam)
    reading = watch.reading
    values, reasons = split(reading)
    assert values["rmt/preconditioned/limit"] == reading.stability_limit
    sharpness = values["rmt/preconditioned/sharpness_over_limit"]
    assert sharpness == pytest.approx(values["rmt/lambda_max"] / reading.stability_limit)
    assert values["rmt/preconditioned/sharpness_over_limit_residual"] >= 0
    for tag in ("sharpness_times_lr", "two_over_lr", "local_law_damping"):
        assert f"rmt/{tag}" not in values
        assert "metric" in reasons[f"rmt/{tag}"]
    assert values["rmt/noise_scale"] > 0  # in the metric, as all the rest
    assert not reading.levels
    reading.save(tmp_path / "reading.npz")
    loaded = Reading.load(tmp_path / "reading.npz")
    assert loaded.preconditioned == "Adam"
    assert loaded.sharpness_over_limit.value == reading.sharpness_over_limit.value
    entry = HistoryEntry.from_reading(reading)
    assert HistoryEntry.from_dict(entry.to_dict()) == entry
    assert entry.two_over_lr is None
    assert entry.limit == reading.stability_limit
    assert entry.limit_name == "Adam's limit"


def test_light_probes_groups_and_gauss_newton(tmp_path):
    """What goes with it: products of a group, of the Gauss-Newton matrix, and probes that end early."""
    watch = monitor(
        every_n_steps=6, light_every_n_steps=3, curvature="ggn", blocks=["net.2.*"], probes=2, outputs_fn=outputs
    )
    module, _, trainer = fit(tmp_path, adam, watch, steps=7)
    assert {entry.speed for entry in watch.history} == {"full", "light"}
    assert all(entry.stability_limit for entry in watch.history)
    assert watch.light_reading.sharpness_over_limit.value > 0
    optimizer, correction = trainer.optimizers[0], 1 - 0.999**7
    last = list(module.net[2].parameters())
    p = torch.cat([(optimizer.state[q]["exp_avg_sq"] / correction).sqrt().add(1e-8).reshape(-1) for q in last])
    inputs, _ = Data()[6]
    hidden = torch.cat([module.net[1](module.net[0](inputs)), torch.ones(16, 1, dtype=torch.float64)], dim=1)
    chances = module.net(inputs).softmax(1).detach()
    inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
    dense = torch.einsum("ni,nj,nkl->kilj", hidden, hidden, inner).detach() / 16  # class, input, class, input
    order = [*[6 * k + i for k in range(3) for i in range(5)], *[6 * k + 5 for k in range(3)]]  # weight, then bias
    matrix = dense.reshape(18, 18)[order][:, order]
    exact = torch.linalg.eigvalsh(matrix / p.sqrt() / p.sqrt()[:, None])
    assert watch.reading.blocks["net.2"].lambda_max.value == pytest.approx(float(exact[-1]), rel=1e-7)


def outputs(module, batch):
    return module.net(batch[0]), lambda logits: nn.functional.cross_entropy(logits, batch[1])


def test_sgd_has_the_ordinary_spectrum_and_its_own_limit(tmp_path):
    def sgd(module):
        return optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    with pytest.warns(UserWarning, match="SGD doesn't scale the gradient"):
        _, watch, _ = fit(tmp_path / "metric", sgd)
    _, plain, _ = fit(tmp_path / "plain", sgd, monitor(preconditioned=False))
    np.testing.assert_array_equal(watch.reading.spectrum.nodes, plain.reading.spectrum.nodes)
    assert watch.reading.stability_limit == pytest.approx(2 * 1.9 / 0.01)
    assert plain.reading.sharpness_limit == pytest.approx(3.8)
    assert plain.history[-1].limit == pytest.approx(watch.reading.stability_limit)
    _, of_adam, _ = fit(tmp_path / "adam", adam, monitor(preconditioned=False))
    assert of_adam.reading.sharpness_limit is of_adam.history[-1].limit is None


class FullBatch(torch.utils.data.Dataset):
    """Sixty digits, again and again."""

    def __init__(self):
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        self.inputs = torch.tensor(images[:60] / 16)
        self.labels = nn.functional.one_hot(torch.tensor(digits[:60]), 10).double()

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return self.inputs, self.labels


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()

    def training_step(self, data, _):
        return 5 * nn.functional.mse_loss(self.net(data[0]), data[1])

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=0.01, betas=(0.9, 0.99))


def test_adam_trains_at_the_edge_of_stability(tmp_path):
    """Cohen et al. 2022, on full batches of digits: the ratio rises to 1 and stays there, though nothing was told of it."""
    watch = SpectrumMonitor(
        every_n_steps=400, light_every_n_steps=20, lanczos_steps=30, preconditioned=True, noise=False, figures_every=0
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=400, callbacks=[watch], logger=CSVLogger(tmp_path), accelerator="cpu", **quiet)
    trainer.fit(Digits(), torch.utils.data.DataLoader(FullBatch(), batch_size=None))
    ratios = np.array([entry.lambda_max / entry.stability_limit for entry in watch.history])
    assert ratios[1:4].min() < 0.7  # it is no property of the start
    assert 0.9 < np.median(ratios[-10:]) < 1.05
    assert ratios[-10:].max() < 1.3


def two_owners(module):
    return [optim.Adam(module.parameters()), optim.Adam(module.net[0].parameters())]


class Own(optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        (
            lambda module: optim.LBFGS(module.parameters()),
            "how LBFGS scales the gradient. Known are torch.optim's Adagrad",
        ),
        (lambda module: Own(module.parameters()), "how Own scales"),
        (lambda module: SpectralPreconditioner(adam(module)), "how SpectralPreconditioner scales"),
        (lambda module: optim.Adam(module.parameters(), maximize=True), "climbs"),
        (lambda module: optim.Adam([nn.Parameter(torch.zeros(1))]), "no optimizer of the Trainer moves any"),
    ],
)
def test_optimizers_that_are_refused_before_the_first_step(optimizers, words, tmp_path):
    with pytest.raises(MisconfigurationException, match=words) as refused:
        fit(tmp_path, optimizers)
    assert "preconditioned=False" in str(refused.value)


def test_another_optimizers_parameters_may_be_anything(tmp_path):
    def optimizers(module):
        return [Own(module.net[0].parameters()), adam(module.net[2])]

    class Both(Module):
        automatic_optimization = False

        def training_step(self, data, _):
            self.manual_backward(self.loss(data))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        on_before_zero_grad = on_before_optimizer_step = on_train_batch_end = lambda self, *_: None

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

    def run(optimizers, **options):
        watch = monitor(every_n_steps=1, loss_fn=lambda module, batch: module.loss(batch), **options)
        trainer = pl.Trainer(max_steps=2, callbacks=[watch], logger=CSVLogger(tmp_path), accelerator="cpu", **quiet)
        trainer.fit(Both(optimizers), torch.utils.data.DataLoader(Data(), batch_size=None))
        return watch.reading

    assert run(optimizers, parameters=["net.2.*"]).preconditioned == "Adam"
    with pytest.raises(MisconfigurationException, match="how Own scales"):
        run(optimizers)
    with pytest.raises(MisconfigurationException, match=r"two optimizers move net\.0\.weight"):
        run(two_owners)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curvature": "gradient_covariance"}, "about the curvature of the loss"),
        ({"product": "finite_difference"}, "takes exact products"),
        ({"levels": ["net.0"]}, "exact blocks"),
    ],
)
def test_arguments_that_do_not_go_with_it(options, words):
    with pytest.raises(ValueError, match=words):
        SpectrumMonitor(preconditioned=True, **options)


def test_what_else_does_not_go_with_it(tmp_path):
    with pytest.raises(MisconfigurationException, match="never tested in an optimizer's metric"):
        fit(tmp_path, adam, monitor(batch_law_every=1))
    damping = LocalLawDamping(target="eps")
    with pytest.raises(MisconfigurationException, match="in the plain coordinates"):
        fit(tmp_path, adam, callbacks=[LocalLawDamping(local_law())])
    fit(tmp_path, adam, callbacks=[damping])
    assert damping._reading is None  # though there is a monitor of its name


def local_law():
    from lightning_rmt import DampingController

    return DampingController("eps", method="local-law")


def test_a_probe_before_the_first_state_is_skipped_once(tmp_path):
    """A gradient scaler that skips the first steps: no failure, nothing turned off, not even with on_error="raise"."""
    watch = SpectrumMonitor(every_n_steps=1, lanczos_steps=5, preconditioned=True, on_error="raise")
    case = Case("scaler", Adam, vectors, skipping_scaler)
    with pytest.warns(UserWarning, match="skips its probe after step 0: no optimizer has taken a step") as told:
        probed = train(case, tmp_path, watch)
    assert len([w for w in told if "skips its probe" in str(w.message)]) == 1
    assert watch.history[0].step > 2
    assert differences(probed, train(case, tmp_path)) == []


def skipping_scaler():
    """Begins with a scale at which float32 gradients overflow."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000, backoff_factor=2.0**-40)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


class Adam(Classifier):
    """Whatever the classifier trains with otherwise."""

    kind = partial(optim.AdamW, lr=0.01)

    def configure_optimizers(self):
        return self.kind(self.parameters())


class Fused(Adam):
    kind = partial(optim.AdamW, lr=0.01, fused=True)


class Foreach(Adam):
    kind = partial(optim.Adam, lr=0.01, amsgrad=True, foreach=True)


class Root(Adam):
    kind = partial(optim.RMSprop, lr=0.01, momentum=0.9)


BITWISE = (
    next(case for case in CASES if case.name == "mlp, Adam, scheduler, torchmetrics"),
    Case("fused", Fused, vectors),
    Case("foreach, amsgrad", Foreach, vectors),
    Case("RMSprop", Root, vectors),
    # whose scaler skips some first steps, and the probes after them; a fused step that is skipped leaves a state of zeros
    Case("gradient scaler", Adam, vectors, gradient_scaler, ignore=("SpectrumMonitor 'rmt' skips",)),
    Case(
        "gradient scaler, fused",
        Fused,
        vectors,
        lambda: {"plugins": gradient_scaler()["plugins"]},
        ignore=("SpectrumMonitor 'rmt' skips",),
    ),
    Case("bf16-true", Adam, vectors, lambda: {"precision": "bf16-true"}),
)


@pytest.mark.parametrize("case", BITWISE, ids=str)
def test_training_is_the_same(case, tmp_path):
    watch = SpectrumMonitor(every_n_steps=3, lanczos_steps=4, preconditioned=True, on_error="raise")
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert watch.reading.stability_limit > 0


def test_the_harness_sees_a_state_that_is_written_to(tmp_path, monkeypatch):
    right = diagonal_metric.adam_denominator

    def written(state, group, dtype):
        if "exp_avg_sq" in state:
            state["exp_avg_sq"].mul_(1 + 2**-20)
        return right(state, group, dtype)

    case = BITWISE[2]
    plain = train(case, tmp_path)
    monkeypatch.setattr(diagonal_metric, "adam_denominator", written)
    watch = SpectrumMonitor(every_n_steps=3, lanczos_steps=4, preconditioned=True, on_error="raise")
    assert {"optimizers"} <= set(differences(train(case, tmp_path, watch), plain))


def on_this_rank(directory):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    ddp = next(case for case in ON_TWO_RANKS if case.name == "ddp")
    case = Case("ddp", Adam, vectors, ddp.trainer)
    watch = SpectrumMonitor(every_n_steps=3, lanczos_steps=30, preconditioned=True, on_error="raise")
    seen = {"rank": rank, "differences": differences(train(case, directory, watch), train(case, directory))}
    reading = watch.reading
    seen["numbers"] = (reading.stability_limit, reading.spectrum.lambda_max.value, reading.noise.mean)
    right = diagonal_metric.diagonal_metric

    def local(optimizers, block):
        found = right(optimizers, block)
        return found if torch.distributed.get_rank() == 0 else replaced(found)

    import lightning_rmt.live.optimizer_metric as live

    live.diagonal_metric = local
    try:
        train(case, directory, SpectrumMonitor(every_n_steps=3, preconditioned=True, on_error="raise"))
    except Exception as error:
        seen["unequal"] = str(error)
    finally:
        live.diagonal_metric = right
    sharded = next(case for case in ON_TWO_RANKS if case.name == "fsdp2")
    try:
        train(sharded, directory, watch)
    except MisconfigurationException as error:
        seen["refused"] = str(error)
    return seen


def replaced(metric):
    from dataclasses import replace

    return replace(metric, scale=1.01 * metric.scale)


def test_two_ranks_have_one_metric_and_sharded_states_are_refused(tmp_path):
    one, two = on_two_ranks(on_this_rank, tmp_path, tmp_path)
    assert one["differences"] == two["differences"] == []
    assert one["numbers"] == two["numbers"]
    for rank in (one, two):
        assert "states differ between the ranks" in rank["unequal"]
        assert "needs the optimizer's whole state on every rank, and that of" in rank["refused"]
