"""The code in docs/damping.md and examples/damped_optimizers.py does what is said there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from digits_runs import DigitsRun
from torch import nn

from lightning_rmt import DampingController

os.environ.setdefault("DDE_BACKEND", "pytorch")  # else DeepXDE asks for one

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "damping.md").read_text(encoding="utf-8").split("## With libraries")[1]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)

LIBRARIES = ["deepxde", "singd", "curvlinops", "pytorch_optimizer"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True:UserWarning",
    "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning",  # DeepXDE's own step
)


def test_every_library_has_a_block():
    assert [re.search(r"from (\w+)", block)[1] for block in BLOCKS] == LIBRARIES


@pytest.mark.parametrize("block", BLOCKS, ids=LIBRARIES)
def test_a_block_of_the_documentation_trains(block, capsys):  # DeepXDE prints
    run = DigitsRun()
    batches = [[(run.x[rows], run.y[rows]) for rows in (run.rows(), run.rows())] for _ in range(10)]
    names = {
        "model": run.model,
        "loss": lambda batch: nn.functional.cross_entropy(run.model(batch[0]), batch[1]),
        "batches": batches,
        "DampingController": DampingController,
        "torch": torch,
        "nn": nn,
    }
    before = run.final()
    exec(block, names)
    assert run.final() < before
    report = names["controller"].report
    assert report.refused is None
    assert report.mode == "control"


def test_the_example_shows_that_absurd_dampings_are_left_behind(capsys):
    path = ROOT / "examples" / "damped_optimizers.py"
    spec = importlib.util.spec_from_file_location("damped_optimizers", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.STARTS = (100.0,)
    rows = example.main(steps=40)
    assert len(rows) == len(example.TRAINED)
    for _, _, alone, controlled, damping in rows:
        assert controlled < 0.8 * alone
        assert 1e-4 < damping < 100
    assert "curvlinops KFAC inverse" in capsys.readouterr().out
