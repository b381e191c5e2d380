"""Spectra of groups of parameters under a Trainer, on one rank and on two."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from harness import Case, differences, train
from level_modules import CASE, Headed, monitor, spied
from live_models import vectors
from pytorch_lightning.loggers import TensorBoardLogger
from several_ranks import on_two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_bitwise_distributed import ddp, fsdp2
from test_levels_distributed import Sharded, TwoHeads, plain
from torch import nn
from torch.nn import functional as F

from lightning_rmt.live import blocks
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.reading import Reading
from lightning_rmt.report.scalars import scalars


def watcher(**options: Any) -> Any:
    return monitor(**{"levels": None, "lanczos_steps": 400, **options})


def test_a_group_has_the_spectrum_of_its_block(tmp_path):
    watch = watcher(blocks=["net.4", "*.bias"])
    spy = spied(tmp_path, watch)
    for group, names in (
        ("net.4", ["net.4.bias", "net.4.weight"]),
        ("bias", ["net.0.bias", "net.2.bias", "net.4.bias"]),
    ):
        found = watch.reading.blocks[group]
        (levels,) = spy.levels(Headed(), watch.reading.step, names)
        assert found.size == levels.size
        assert found.lambda_max.value == pytest.approx(levels[-1], rel=1e-5)
        assert found.lambda_min.value == pytest.approx(levels[0], rel=1e-4, abs=1e-6 * levels[-1])
        assert abs(found.trace.mean - levels.sum()) <= 5 * found.trace.stderr + 1e-5 * np.abs(levels).sum()
        got = scalars(watch.reading)
        assert got[f"rmt/blocks/{group}/lambda_max"] == found.lambda_max.value
        assert got[f"rmt/blocks/{group}/trace_stderr"] == found.trace.stderr


def test_training_is_the_same_and_the_loss_runs_no_more_often(tmp_path):
    control, counts = train(CASE, tmp_path / "control"), []
    for groups in (None, ["net.0", "net.2", "net.4", "*.bias"]):
        calls: list[int] = []

        def loss_fn(module, batch, calls=calls):
            calls.append(1)
            return F.cross_entropy(module(batch[0]), batch[1])

        watch = watcher(blocks=groups, lanczos_steps=20, loss_fn=loss_fn)
        assert differences(train(CASE, tmp_path / str(groups), watch), control) == []
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_all_parameters_have_the_whole_spectrum(tmp_path):
    watch = watcher(blocks=["net"], lanczos_steps=10)
    train(CASE, tmp_path, watch)
    assert watch.reading.blocks["net"] is watch.reading.spectrum


def test_groups_are_saved_with_the_reading(tmp_path):
    watch = watcher(blocks=["net.0", "net.4"], lanczos_steps=10)
    train(CASE, tmp_path, watch)
    watch.reading.save(tmp_path / "reading.npz")
    back = Reading.load(tmp_path / "reading.npz")
    assert list(back.blocks) == ["net.0", "net.4"]
    for group, spectrum in back.blocks.items():
        assert np.array_equal(spectrum.nodes, watch.reading.blocks[group].nodes)
        assert spectrum.size == watch.reading.blocks[group].size
    assert back.spectrum.size == watch.reading.spectrum.size


def test_light_readings_have_none(tmp_path):
    watch = watcher(blocks=["net.0"], every_n_steps=6, light_every_n_steps=2, lanczos_steps=10)
    train(CASE, tmp_path, watch)
    assert watch.light_reading.blocks == {}
    assert watch.reading.blocks


def test_a_group_that_fails_is_a_note(tmp_path, monkeypatch):
    control = train(CASE, tmp_path / "control")

    def fails(*arguments, **options):
        raise RuntimeError("no memory for this one")

    monkeypatch.setattr(blocks, "estimate_spectrum", fails)
    watch = watcher(blocks=["net.0"], lanczos_steps=10)
    assert differences(train(CASE, tmp_path / "watched", watch), control) == []
    assert watch.reading.blocks == {}
    assert "no spectrum of net.0: no memory for this one" in watch.reading.notes


@pytest.mark.parametrize(
    ("groups", "words"),
    [(["nett.0"], "matches no parameter"), (["net.0", "net.0*"], "would both be logged as")],
)
def test_refused_before_training(groups, words, tmp_path):
    with pytest.raises(MisconfigurationException, match=words):
        train(CASE, tmp_path, watcher(blocks=groups))


@pytest.mark.parametrize("groups", ["net", [], 3])
def test_refused_at_once(groups):
    with pytest.raises(ValueError, match="blocks must be a list"):
        watcher(blocks=groups)


def test_a_plan_that_fails_is_a_note(tmp_path, monkeypatch):
    def fails(device):
        raise RuntimeError("nobody knows what is free")

    monkeypatch.setattr(blocks, "free_bytes", fails)
    watch = watcher(blocks=["net.0"], lanczos_steps=10)
    train(CASE, tmp_path, watch)
    assert watch.reading.blocks == {}
    assert "no spectrum of net.0: nobody knows what is free" in watch.reading.notes


def test_what_parameters_leaves_out_is_said_to_be_left_out(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'net\.4' is none of what parameters=\['net\.0\.\*'\] leaves"):
        train(CASE, tmp_path, watcher(blocks=["net.4"], parameters=["net.0.*"]))


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    control = train(case, directory)
    watch = watcher(blocks=["net.0", "net.4"], loss_fn=plain, lanczos_steps=60)
    seen: dict[str, Any] = {"differences": differences(train(case, directory, watch), control)}
    seen["groups"] = {name: (s.size, s.nodes, s.weights) for name, s in watch.reading.blocks.items()}

    class Fails(blocks.Restricted):
        """In the products of the first group, on one rank."""

        def _matmat(self, V):
            if self.size == 112 and os.environ["LOCAL_RANK"] == "1":
                raise ValueError("only here")
            return super()._matmat(V)

    blocks.Restricted = Fails  # of this process, which is a fork
    watch = watcher(blocks=["net.0", "net.4"], loss_fn=plain, lanczos_steps=20)
    seen["failing"] = differences(train(case, directory, watch), control)
    seen["left"] = [sorted(watch.reading.blocks), [n for n in watch.reading.notes if "no spectrum of" in n]]

    def fails_to_plan(device):
        if os.environ["LOCAL_RANK"] == "1":
            raise RuntimeError("nobody knows what is free")
        return 2**40

    blocks.Restricted = Fails.__base__
    blocks.free_bytes = fails_to_plan
    watch = watcher(blocks=["net.0", "net.4"], loss_fn=plain, lanczos_steps=20)
    seen["unplanned"] = differences(train(case, directory, watch), control)
    seen["without"] = [dict(watch.reading.blocks), len([n for n in watch.reading.notes if "no spectrum of" in n])]
    return seen


@pytest.mark.parametrize("strategy", [ddp(), fsdp2], ids=["ddp", "fsdp2"])
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks(strategy, tmp_path):
    ignore = ("SpectrumMonitor .* no gradient reaches other",)
    case = Case("two ranks", Sharded if strategy is fsdp2 else TwoHeads, vectors, strategy, ignore=ignore)
    one, two = on_two_ranks(on_this_rank, tmp_path, case, tmp_path)
    for rank in (one, two):
        assert rank["differences"] == []
        assert rank["failing"] == rank["unplanned"] == []
        assert rank["without"] == [{}, 2]
    assert {name: size for name, (size, _, _) in one["groups"].items()} == {"net.0": 112, "net.4": 315}
    for name, (_, nodes, weights) in one["groups"].items():
        assert np.array_equal(nodes, two["groups"][name][1])
        assert np.array_equal(weights, two["groups"][name][2])
    assert one["left"][0] == two["left"][0] == ["net.4"]
    assert two["left"][1] == ["no spectrum of net.0: only here"]
    assert one["left"][1][0].startswith("no spectrum of net.0: ")


def test_the_announcement_counts_the_groups_products(tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(CASE, tmp_path, watcher(blocks=["net.0", "net.4"], lanczos_steps=10, noise=False))
    (said,) = {r.message for r in caplog.records if "the first probe takes" in r.message}
    assert "at most 30 products" in said


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The 'train_dataloader' does not have")
def test_group_tags_in_the_event_file(tmp_path):
    watch = watcher(blocks=["net.4"], lanczos_steps=60)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=logger,
        callbacks=[watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    ).fit(Headed(), vectors())
    board = EventAccumulator(str(tmp_path)).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag.startswith("rmt/blocks/")]
    assert {"lambda_max", "lambda_min", "trace", "trace_stderr"} <= {tag.split("/")[-1] for tag in tags}
    last = board.Scalars("rmt/blocks/net.4/lambda_max")[-1]
    assert (last.step, last.value) == (
        watch.reading.step,
        pytest.approx(watch.reading.blocks["net.4"].lambda_max.value, rel=1e-6),
    )


class FrozenAndTied(Headed):
    """The first layer is frozen; the third's bias is that of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)
        self.net[2] = nn.Linear(16, 15)
        self.net[4] = nn.Linear(15, 15)
        self.net[4].bias = self.net[2].bias


def test_frozen_and_tied_parameters(tmp_path):
    """A frozen group is a note; a tied tensor counts once, in either group that names it."""
    watch = watcher(blocks=["net.0", "net.2", "net.4"])
    case = Case("frozen and tied", FrozenAndTied, vectors)
    train(case, tmp_path, watch)
    assert {name: s.size for name, s in watch.reading.blocks.items()} == {"net.2": 255, "net.4": 240}
    (said,) = (note for note in watch.reading.notes if "no spectrum of net.0" in note)
    assert "frozen" in said or "requires_grad" in said


def test_short_memory_costs_a_group_its_eigenvalues(tmp_path, monkeypatch):
    """Room for the vectors that any run needs, and for none of the basis."""
    monkeypatch.setattr(blocks, "free_bytes", lambda device: 0)
    watch = watcher(blocks=["net.4"], lanczos_steps=40)
    train(CASE, tmp_path, watch)
    assert watch.reading.spectrum.top
    assert watch.reading.blocks["net.4"].top == ()


def test_groups_are_in_the_cost_that_the_schedule_knows(tmp_path, monkeypatch):
    product, pause = blocks.Restricted._matmat, 0.01

    def slow(self, V):
        time.sleep(pause)
        return product(self, V)

    monkeypatch.setattr(blocks.Restricted, "_matmat", slow)
    watch = watcher(blocks=["net.0", "net.2", "net.4"], lanczos_steps=10)
    train(CASE, tmp_path, watch)
    assert watch._schedule.state_dict()["full_cost"] >= 30 * pause
