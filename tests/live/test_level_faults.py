"""What goes wrong with level statistics is a note beside the spectrum; training never notices."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from harness import Fingerprint, differences, train
from level_modules import CASE, monitor, note
from test_faults import watched
from torch import nn
from torch.nn import functional as F

from lightning_rmt import SpectrumMonitor
from lightning_rmt.curvature import double_precision


@pytest.fixture(autouse=True)
def money_is_no_object(monkeypatch):
    """The clock of a test machine decides nothing, unless a test says so."""
    monkeypatch.setattr("lightning_rmt.live.levels.TIME_SHARE", 1e6)


@pytest.fixture(scope="module")
def control(tmp_path_factory) -> Fingerprint:
    return train(CASE, tmp_path_factory.mktemp("control"))


class Told(SpectrumMonitor):
    """Fails where training is in float64, by the function that it is given, and counts how often it is asked."""

    def __init__(self, act: Any, **options: Any) -> None:
        self.asked = 0

        def loss_fn(module, batch):
            if batch[0].dtype == torch.float64:
                self.asked += 1
                return act(module, batch)
            return F.cross_entropy(module(batch[0]), batch[1])

        super().__init__(every_n_steps=2, lanczos_steps=4, loss_fn=loss_fn, **options)


def out_of_memory(module, batch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def other_dtype(module, batch):
    return F.cross_entropy(F.linear(batch[0], torch.ones(15, 6, dtype=torch.float32)) + module(batch[0]), batch[1])


def half_way(module, batch):
    return F.cross_entropy(module.net[4](module.net[:4](batch[0])).float(), batch[1])


def no_second_derivative(module, batch):
    return torch.cdist(module(batch[0]), module(batch[0]) + 1).mean()


def not_finite(module, batch):
    return module(batch[0]).square().mean() * float("nan")


def raises(module, batch):
    raise KeyError("weights")


def independent(module, batch):
    return module.net[0](batch[0]).square().mean()


FAULTS = {
    out_of_memory: "memory ran out",
    other_dtype: "expected m1 and m2 to have the same dtype",
    half_way: "the loss is computed in torch.float32 between the block and its value",
    no_second_derivative: "no second derivative of `_cdist_backward`",
    not_finite: "an entry of the exact Hessian is NaN or infinite",
    raises: "'weights'",
    independent: "the loss of batch 0 has no graph",  # but in what isn't differentiated here
}


@pytest.mark.parametrize("act", FAULTS, ids=lambda act: act.__name__)
def test_a_failure_is_a_note_beside_the_spectrum(act, control, tmp_path):
    watch = Told(act)
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    assert said == []
    assert len(watch.history) == 6
    assert watch.reading.spectrum.lambda_max.value != 0
    assert note(watch).startswith("no level statistics: ")
    assert FAULTS[act] in note(watch)
    assert watch.asked == 1  # and never again
    assert torch.get_default_dtype() == torch.float32


def test_one_block_fails_and_the_other_is_there(control, tmp_path):
    watch = Told(independent, levels=["net.0", "net.4"])
    prints, said = watched(CASE, tmp_path, watch)
    assert differences(prints, control) == []
    assert said == []
    assert [block.name for block in watch.reading.levels] == ["net.0"]
    assert any(n.startswith("no level statistics of net.4: ") for n in watch.reading.notes)


@pytest.mark.parametrize("share", [1e-9, 1e-3])
def test_a_block_that_is_too_dear(share, control, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rmt.live.levels.TIME_SHARE", share)
    watch = monitor()
    assert differences(train(CASE, tmp_path, watch), control) == []
    words = r"256 parameters of net\.4, the layers nearest to the loss, would take [\d.e-]+ s, more than .* of the rest"
    assert re.search(words, note(watch))


def test_memory_that_is_not_there(control, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rmt.live.levels.free_bytes", lambda device: 4 * 8 * 315**2)
    watch = monitor()
    assert differences(train(CASE, tmp_path, watch), control) == []
    assert "a copy of the model in float64 and the block take 0.003 GiB, of 0.003 GiB free" in note(watch)


def test_harness_sees_parameters_that_are_not_put_back(control, tmp_path, monkeypatch):
    """Equal ones, but not the very objects that the optimizer has."""

    def forget(table, originals):
        table.update({k: v if v is None else nn.Parameter(v.detach().clone()) for k, v in originals.items()})

    monkeypatch.setattr(double_precision, "_put_back", forget)
    seen = differences(train(CASE, tmp_path, monitor()), control)
    assert {"weights", "loss"} <= set(seen)
