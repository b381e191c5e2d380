"""Training with KroneckerDiagnostics is bitwise training without it; two ranks have the same numbers; FSDP2 is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwise_cases import CASES, REPRESENTATIVE
from harness import Case, differences, train
from live_models import Classifier, vectors
from several_ranks import on_two_ranks
from test_bitwise_distributed import CASES as ON_TWO_RANKS

from lightning_rmt import KroneckerDiagnostics
from lightning_rmt.curvature.gradient_factors import GradientFactors
from lightning_rmt.live.namespaces import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")

NAMES = (*REPRESENTATIVE, "optimizer in backward")


def diagnostics() -> KroneckerDiagnostics:
    return KroneckerDiagnostics(factor_steps=2, held_out_steps=8, on_error="raise")


def longer(case: Case) -> Case:
    """Epochs enough for a measurement."""
    accumulated = case.trainer().get("accumulate_grad_batches", 1)
    return replace(case, trainer=lambda: {**case.trainer(), "max_epochs": 2 + 2 * accumulated})


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_same(name, tmp_path):
    case = longer(next(case for case in CASES if case.name == name))
    watch = diagnostics()
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    if name == "optimizer in backward":
        assert "no gradient reached it" in watch.reading.skipped.values()
    else:
        assert watch.reading.layers


def test_the_harness_sees_a_gradient_that_is_written_to(tmp_path, monkeypatch):
    add = GradientFactors.add

    def scaled(self, gradient, scale=1.0):
        add(self, gradient.mul_(1 + 2**-20), scale)

    case = longer(Case("mlp, SGD", Classifier, vectors))
    plain = train(case, tmp_path)
    monkeypatch.setattr(GradientFactors, "add", scaled)
    assert {"weights", "gradients"} <= set(differences(train(case, tmp_path, diagnostics()), plain))


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    watch = diagnostics()
    seen: dict[str, Any] = {"differences": differences(train(case, directory, watch), train(case, directory))}
    seen["gains"] = {layer: found.rotation_gain for layer, found in watch.reading.layers.items()}
    seen["said"] = watch._report.said
    seen["rank"] = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    return seen


@pytest.mark.parametrize("name", ["ddp", "ddp, accumulate 2"])
def test_two_ranks_have_the_same_numbers_and_rank_zero_writes(name, tmp_path):
    case = longer(next(case for case in ON_TWO_RANKS if case.name == name))
    one, two = on_two_ranks(on_this_rank, tmp_path, case, tmp_path)
    assert one["differences"] == two["differences"] == []
    assert set(one["gains"]) == {"net.0", "net.3"}
    assert one["gains"] == two["gains"]
    assert one["said"]
    assert not two["said"]


def refused_on_this_rank(case: Case, directory: Path) -> str:
    try:
        train(case, directory, diagnostics())
    except MisconfigurationException as error:
        return str(error)
    return "trained"


def test_fsdp2_is_refused(tmp_path):
    case = next(case for case in ON_TWO_RANKS if case.name == "fsdp2")
    for said in on_two_ranks(refused_on_this_rank, tmp_path, case, tmp_path):
        assert "KroneckerDiagnostics needs whole gradients, and under ModelParallelStrategy" in said
