"""Training with LocalLawDamping in its mode "log" is bitwise training without it; in "control" the harness sees it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from bitwise_cases import CASES, REPRESENTATIVE
from harness import Case, differences, train
from several_ranks import on_two_ranks
from test_bitwise_distributed import CASES as ON_TWO_RANKS

from lightning_rmt import DampingController, LocalLawDamping
from lightning_rmt.live.namespaces import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")

# every optimizer has a learning rate, which is as good a number to look at as any
NAMES = (*REPRESENTATIVE, "state in Python attributes", "momentum encoder")

REFUSED = {"LBFGS": "the step changed no weight", "embeddings, LSTM, attention": "a gradient is sparse"}


def watching(case: Case, mode: str = "log") -> LocalLawDamping:
    controller = DampingController("lr", every=2, mode=mode)
    return LocalLawDamping(controller, loss_fn=case.loss_fn, on_error="raise")


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same(name, tmp_path):
    case = next(case for case in CASES if case.name == name)
    watch = watching(case)
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert watch.report is not None
    if name in REFUSED:
        assert REFUSED[name] in watch.report.refused
    else:
        assert watch.report.products > 0, watch.report.refused


@pytest.mark.filterwarnings("ignore:.*for the 3rd time undone")  # a learning rate is no damping
def test_the_harness_sees_a_damping_that_is_set(tmp_path):
    case = next(case for case in CASES if case.name == "mlp, SGD")
    assert "weights" in differences(train(case, tmp_path, watching(case, "control")), train(case, tmp_path))


def test_an_optimizer_that_steps_in_the_backward_pass_has_no_damping(tmp_path):
    case = next(case for case in CASES if case.name == "optimizer in backward")
    with pytest.raises(MisconfigurationException, match="found no damping"):
        train(case, tmp_path, watching(case))


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    watch = watching(case)
    seen: dict[str, Any] = {"differences": differences(train(case, directory, watch), train(case, directory))}
    return seen | {"report": watch.report, "said": watch._reports.said}


@pytest.mark.parametrize("name", ["ddp", "ddp, accumulate 2"])
def test_two_ranks_agree(name, tmp_path):
    case = next(case for case in ON_TWO_RANKS if case.name == name)
    one, two = on_two_ranks(on_this_rank, tmp_path, case, tmp_path)
    assert one["differences"] == two["differences"] == []
    assert one["report"] == two["report"]
    assert one["report"].ratio is not None
    assert not two["said"]


class Breaking(LocalLawDamping):
    """Fails on one rank alone, in the place that is asked for."""

    place = ""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.place == "batch" and trainer.global_rank == 1:
            self._batches.add = self.broken
        if self.place == "look" and trainer.global_rank == 1:
            self.controller.before_step = self.broken
        if self.place == "write" and trainer.global_rank == 0:
            self._reports.log = self.broken
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def broken(self, *_: Any) -> None:
        raise OSError("no space left")


def broken_on_this_rank(case: Case, place: str, directory: Path) -> dict[str, Any]:
    def trained() -> tuple[Breaking, Any]:
        watch = Breaking(DampingController("lr", every=2))
        watch.place = place
        return watch, train(case, directory, watch)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch, found = trained()
    said = [str(w.message) for w in caught if "LocalLawDamping" in str(w.message)]
    return {"differences": differences(found, train(case, directory)), "off": watch._off, "said": said}


@pytest.mark.parametrize("place", ["batch", "look", "write"])
def test_a_rank_that_fails_alone_keeps_no_other_waiting(place, tmp_path):
    case = next(case for case in ON_TWO_RANKS if case.name == "ddp")
    one, two = on_two_ranks(broken_on_this_rank, tmp_path, case, place, tmp_path)
    assert one["differences"] == two["differences"] == []
    assert one["off"] == two["off"] == (place != "write")
    assert len(one["said"]) == 1
    assert "no space left" in one["said"][0]


def refused_on_this_rank(case: Case, mode: str, directory: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(case, directory, watching(case, mode))
        except MisconfigurationException as error:
            return [str(error)]
    return ["trained", *(str(w.message) for w in caught if "LocalLawDamping" in str(w.message))]


@pytest.mark.parametrize("mode", ["log", "control"])
def test_fsdp2_is_refused_in_control_and_only_warned_of_else(mode, tmp_path):
    case = next(case for case in ON_TWO_RANKS if case.name == "fsdp2")
    one, two = on_two_ranks(refused_on_this_rank, tmp_path, case, mode, tmp_path)
    reason = "LocalLawDamping needs whole gradients, and under ModelParallelStrategy"
    if mode == "control":
        assert reason in one[0]
        assert reason in two[0]
    else:
        assert one[0] == two[0] == "trained"
        assert reason in one[1]
