"""examples/tune_damping.py at a small size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt


def test_the_controlled_runs_end_alike_and_where_they_start_too_small_far_below_the_fixed_ones(tmp_path, capsys):
    path = Path(__file__).parents[1] / "examples" / "tune_damping.py"
    spec = importlib.util.spec_from_file_location("tune_damping", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    drawing = tmp_path / "drawn.png"
    rows = example.main(["--starts", "1e-6", "1", "--seeds", "0", "--steps", "30", "--output", str(drawing)])
    (_, [small_fixed], *one), (_, [large_fixed], *other) = rows
    assert one == other
    ((controlled,), (damping,)) = one
    assert controlled < min(small_fixed / 10, large_fixed / 2, 0.2), rows
    assert 1e-3 < damping < 10
    assert plt.imread(drawing).std() > 0.05
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(("1e-06", "1  "))]) == 2
