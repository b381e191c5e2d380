"""Training with LocalLawDamping in its mode "log" is bitwise training without it; in "control" the harness sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bitwise_cases import CASES
from harness import Case, differences, train
from several_ranks import on_two_ranks
from test_bitwise_distributed import CASES as ON_TWO_RANKS

from lightning_rmt import DampingController, LocalLawDamping
from lightning_rmt.live.namespaces import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")

# every optimizer has a learning rate, which is as good a number to look at as any
NAMES = (
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
    "state in Python attributes",
    "momentum encoder",
    "embeddings, LSTM, attention",
    "deterministic",
)

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


def refused_on_this_rank(case: Case, mode: str, directory: Path) -> list[str]:
    import warnings

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
