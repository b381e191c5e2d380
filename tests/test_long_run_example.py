"""examples/long_run.py at its quick size: it trains, compares, and writes what it measured."""

from __future__ import annotations

import long_run
import long_run_networks
import matplotlib.pyplot as plt
import pytest
import torch

from lightning_rmt.report.wording import with_error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_run")
    found = long_run.main(["--quick", "--output", str(folder / "out"), "--logs", str(folder / "logs")])
    return found, folder / "out"


@pytest.mark.parametrize("name", ["gpt", "cnn"])
def test_all_three_trainings_end_alike_and_the_tables_hold_what_was_measured(written, name):
    found, folder = written
    plain, runs = found[name]
    default, often, *in_metric = runs.values()
    assert default.full[0].step == 0
    assert [reading.step for reading in often.full] == [0, 10, 20]
    assert len(often.readings) > len(often.full)
    costs = (folder / f"{name}_cost.md").read_text(encoding="utf-8")
    assert costs.count("yes, all bits") == len(runs) == (3 if name == "gpt" else 2)
    assert "NO" not in costs
    (largest,) = [
        line for line in (folder / f"{name}_spectrum.md").read_text(encoding="utf-8").splitlines() if "λ_max  " in line
    ]
    levels = [reading.spectrum.lambda_max for reading in often.full]
    assert [cell.strip() for cell in largest.split("|")[2:-1]] == [with_error(a.value, a.residual) for a in levels]
    for picture in ("spectrum_over_time", "eigenvalues_over_time"):
        assert plt.imread(folder / f"{name}_{picture}.png").std() > 0.05
    for run in in_metric:
        rows = [
            line.split("|")[1:-1] for line in (folder / "gpt_metric.md").read_text(encoding="utf-8").splitlines()[2:]
        ]
        sharpness = {r.step: r.sharpness_over_limit for r in run.readings if r.preconditioned == "AdamW"}
        assert {0, 10, 20} <= {int(row[0]) for row in rows}
        assert all(float(row[5]) == pytest.approx(sharpness[int(row[0])].value, rel=0.06) for row in rows)
        # at rate lr, after t steps: 2 (1 + 0.9) (1 - 0.9^t) / (0.1 lr)
        assert float(rows[0][4]) == pytest.approx(2 * 1.9 * 0.1 / 0.1 / float(rows[0][2]), rel=0.01)
        rates = (folder / "gpt_rates.md").read_text(encoding="utf-8").splitlines()
        assert len(rates) == 7
        assert plt.imread(folder / "gpt_metric_eigenvalues_over_time.png").std() > 0.05
    if name == "cnn":
        rates = (folder / "cnn_rates.md").read_text(encoding="utf-8").splitlines()
        assert [row.split("|")[1].strip() for row in rates[2:]] == ["0.0125", "0.05", "0.2", "0.8", "3.2"]
        assert "| 0      | full" in (folder / "cnn_schedule.md").read_text(encoding="utf-8")
    with torch.no_grad():
        next(default.module.parameters()).view(-1)[0] += 1e-6
    assert not long_run.same_weights(plain, default)
    assert long_run.same_weights(plain, often)


def test_the_gpt_sees_nothing_of_the_letters_to_come():
    torch.manual_seed(0)
    gpt = long_run_networks.GPT()
    snippet = torch.randint(long_run_networks.manual()[1], (1, long_run_networks.CONTEXT))
    other = snippet.clone()
    other[0, 20] = (other[0, 20] + 1) % long_run_networks.manual()[1]
    before, after = gpt(snippet), gpt(other)
    assert torch.equal(before[..., :20], after[..., :20])
    assert not torch.equal(before[..., 20:], after[..., 20:])
