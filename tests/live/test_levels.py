"""Level statistics of live modules under a Trainer: which block, of which batches, what is refused, what is kept."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, Fingerprint, differences, train
from level_modules import CASE, Headed, agree, monitor, note, spied
from live_models import Classifier, vectors
from torch import nn
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.reading import Reading

HEAD = ["net.4.bias", "net.4.weight"]


@pytest.fixture(autouse=True)
def money_is_no_object(monkeypatch):
    """The clock of a test machine decides nothing, unless a test says so."""
    monkeypatch.setattr("lightning_rmt.live.levels.TIME_SHARE", 1e6)


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Fingerprint:
    return train(CASE, tmp_path_factory.mktemp("control"))


# --- which block --------------------------------------------------------------------------------------------------------


def test_auto_takes_the_head(tmp_path):
    watch = monitor()
    spy = spied(tmp_path, watch)
    (block,) = watch.reading.levels
    assert block.name == "net.4"
    assert block.description == "the 315 parameters in net.4.bias, net.4.weight"
    agree(block.eigenvalues, spy.levels(Headed(), watch.reading.step, HEAD))
    assert 0 < block.noise < 1e-12
    assert 0 < block.seconds < watch.reading.seconds
    assert block.statistics.levels > 0


def test_training_is_the_same(control, tmp_path):
    for levels in ("auto", None, ["net.4", "net.0"], ["*.weight"]):
        watch = monitor(levels=levels, batches=3)
        assert differences(train(CASE, tmp_path / str(levels), watch), control) == []
        assert bool(watch.reading.levels) == (levels is not None)


@pytest.mark.parametrize(
    ("pattern", "tag", "names"),
    [
        ("net.0", "net.0", ["net.0.weight", "net.0.bias"]),
        ("net.2.weight", "net.2.weight", ["net.2.weight"]),
        ("*.bias", "bias", ["net.0.bias", "net.2.bias", "net.4.bias"]),
        ("net.[24]", "net._24", ["net.2.weight", "net.2.bias", "net.4.weight", "net.4.bias"]),
    ],
)
def test_layers_and_patterns(pattern, tag, names, tmp_path):
    watch = monitor(levels=["net.0.weight", pattern])
    spy = spied(tmp_path, watch)
    first, block = watch.reading.levels
    assert (first.name, block.name) == ("net.0.weight", tag)
    agree(first.eigenvalues, spy.levels(Headed(), watch.reading.step, ["net.0.weight"]))
    agree(block.eigenvalues, spy.levels(Headed(), watch.reading.step, names))


def test_several_batches_are_pooled(tmp_path):
    watch = monitor(levels=["net.0"], batches=3)
    spy = spied(tmp_path, watch)
    (block,) = watch.reading.levels
    assert block.eigenvalues.shape == (3, 112)
    agree(block.eigenvalues, spy.levels(Headed(), watch.reading.step, ["net.0.weight", "net.0.bias"], count=3))


def test_parameters_that_are_not_looked_at_are_in_no_block(tmp_path):
    watch = monitor(parameters=["net.0.*", "net.2.*"])
    train(CASE, tmp_path, watch)
    assert watch.reading.levels[0].name == "net.2"
    watch = monitor(parameters=["net.0.*"], levels=["net"])
    train(CASE, tmp_path / "other", watch)
    assert watch.reading.levels[0].eigenvalues.shape == (1, 112)


def test_light_probes_have_none(tmp_path):
    watch = monitor(light_every_n_steps=3)
    train(CASE, tmp_path, watch)
    assert watch.light_reading.levels == ()
    assert watch.reading.levels


def test_the_block_stays_the_same_over_the_training(tmp_path, monkeypatch):
    """As many coordinates as the first probe could pay, and the time isn't asked again."""
    affordable = iter([280])
    monkeypatch.setattr("lightning_rmt.live.levels.rows_affordable", lambda *_: next(affordable))
    seen = []

    class Watch(SpectrumMonitor):
        def _write(self, trainer, reading):
            seen.append(reading.levels[0])

    watch = Watch(every_n_steps=4, lanczos_steps=4, on_error="raise")
    spy = spied(tmp_path, watch)
    assert {(b.name, b.description, b.eigenvalues.shape) for b in seen} == {
        ("net.4", "the first 280 of the 315 parameters in net.4.bias, net.4.weight", (1, 280))
    }
    for step, block in zip((0, 4, 8), seen, strict=True):
        agree(block.eigenvalues, spy.levels(Headed(), step, HEAD, keep=280))


class Dropped(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 15)))


def test_dropout_masks_follow_from_the_step_alone(tmp_path):
    """Not from what an earlier probe has found out already: a resumed run hasn't."""
    one = monitor(batches=2)
    case = Case("dropped", Dropped, vectors)
    forgetful = type("Forgetful", (SpectrumMonitor,), {"_learned": property(lambda s: None, lambda s, v: None)})
    other = forgetful(every_n_steps=6, lanczos_steps=4, figures_every=0, on_error="raise", batches=2)
    assert train(case, tmp_path / "a", one)["loss"] == train(case, tmp_path / "b", other)["loss"]
    assert one.reading.step == other.reading.step > 6
    assert np.array_equal(one.reading.levels[0].eigenvalues, other.reading.levels[0].eigenvalues)
    assert not np.array_equal(*one.reading.levels[0].eigenvalues)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (["net.7"], r"'net\.7' matches no parameter; close to it"),
        (["net.0.bias"], "'net.0.bias' holds 16 parameters.*50 to 4096: name more"),
        (["wide.*"], r"'wide\.\*' holds 5000 parameters.*name fewer.*levels='auto'"),
        (["net.0", "net.0.*"], "under one tag, 'net.0'"),
    ],
)
def test_blocks_that_cannot_be_had_are_refused_before_the_first_step(levels, words, tmp_path):
    class Wide(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(50, 100, bias=False)

    with pytest.raises(MisconfigurationException, match=words):
        train(Case("wide", Wide, vectors), tmp_path, monitor(levels=levels, on_error="warn"))


def test_a_layer_that_is_unfrozen_later_is_waited_for(tmp_path):
    class Thaws(Headed):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

    class Watch(SpectrumMonitor):
        notes = ()

        def _write(self, trainer, reading):
            self.notes = (*self.notes, reading.notes)

    watch = Watch(every_n_steps=6, lanczos_steps=4, levels=["net.0", "net.4"], on_error="raise")
    train(Case("thaws", Thaws, vectors), tmp_path, watch)
    assert (
        "no level statistics of net.0: 'net.0' matches only frozen parameters (requires_grad=False)" in watch.notes[0]
    )
    assert [block.name for block in watch.reading.levels] == ["net.0", "net.4"]


def outputs(module, batch):
    logits = module(batch[0])
    return logits, lambda logits: F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("options", [{"curvature": "ggn", "outputs_fn": outputs}, {"curvature": "gradient_covariance"}])
def test_other_curvatures(options, tmp_path):
    with pytest.raises(ValueError, match="level statistics are those of the Hessian"):
        monitor(levels=["net.4"], **options)
    watch = monitor(**options)
    train(CASE, tmp_path, watch)
    assert watch.reading.levels == ()
    assert not any("level" in n for n in watch.reading.notes)


def test_finite_differences_have_exact_levels_all_the_same(tmp_path):
    watch = monitor(product="finite_difference")
    spy = spied(tmp_path, watch)
    assert watch.reading.product == "finite_difference"
    agree(watch.reading.levels[0].eigenvalues, spy.levels(Headed(), watch.reading.step, HEAD))


def test_too_few_parameters(tmp_path):
    watch = monitor()
    train(Case("few", lambda: Classifier(nn.Linear(6, 3)), vectors), tmp_path, watch)
    assert note(watch) == "no level statistics: too few parameters; 50 levels are needed"


# --- what is kept -------------------------------------------------------------------------------------------------------


def test_a_saved_reading_has_its_levels(tmp_path):
    watch = monitor(levels=["net.4", "net.0"], batches=2)
    train(CASE, tmp_path, watch)
    saved = [Reading.load(path) for path in sorted(tmp_path.rglob("*.npz"))]
    assert len(saved) == 2
    for ours, theirs in zip(watch.reading.levels, saved[-1].levels, strict=True):
        assert (ours.name, ours.description, ours.noise, ours.seconds) == (
            theirs.name,
            theirs.description,
            theirs.noise,
            theirs.seconds,
        )
        assert theirs.eigenvalues.dtype == np.float64
        assert np.array_equal(ours.eigenvalues, theirs.eigenvalues)
        assert ours.statistics == theirs.statistics
