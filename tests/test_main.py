from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_rmt.__main__ import main
from lightning_rmt.krylov.lanczos import lanczos, rounding_noise, start_vector
from lightning_rmt.reading import Reading
from lightning_rmt.report.files import save_reading
from lightning_rmt.spectra.spectrum import Spectrum


class Diagonal:
    device, dtype, size = torch.device("cpu"), torch.float64, 400

    def __init__(self, largest):
        self.eigenvalues = torch.cat([torch.linspace(-1, 1, 398), torch.tensor([0.8 * largest, largest])]).double()

    def matmat(self, V):
        return V * self.eigenvalues


OVER_TIME = ("spectrum_over_time", "free_cumulants", "eigenvalues_over_time")


def reading(step, name="rmt"):
    operator = Diagonal(3.0 + step / 100)
    run = lanczos(operator, start_vector(operator, 0), 60)
    spectrum = Spectrum((run,), operator.size, 60, rounding_noise(torch.float64))
    return Reading(
        step=step, epoch=0, spectrum=spectrum, curvature="hessian", name=name, seconds=0.5, samples=8, learning_rate=0.5
    )


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    for step in range(0, 1100, 100):
        save_reading(reading(step), directory / "version_0")
    save_reading(reading(7, name="ggn"), directory / "version_0")
    return directory


def test_draws_the_run_and_prints_its_table(run_directory, capsys):
    assert main(["plot", str(run_directory), "--name", "rmt"]) == 0
    out = capsys.readouterr().out
    folder = run_directory / "rmt_figures" / "rmt"
    pictures = {path.name for path in folder.iterdir()}
    assert pictures == {
        *(f"spectrum_step_{step:08d}.png" for step in (0, 300, 600, 900, 1000)),
        "spectrum_over_time.png",
        "free_cumulants.png",
        "eigenvalues_over_time.png",
    }
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "rmt: 11 readings" in out
    assert "13.00 ± " in out  # the largest eigenvalue at step 1000
    assert f"wrote {folder / 'spectrum_over_time.png'}" in out
    assert "ggn" not in out


def test_every_monitor_is_drawn_unless_one_is_named(run_directory, tmp_path, capsys):
    assert main(["plot", str(run_directory), "--output", str(tmp_path), "--format", "svg", "--every", "100"]) == 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.svg")} == {
        *(f"rmt/{name}.svg" for name in ("spectrum_step_00000000", "spectrum_step_00001000")),
        *(f"{m}/{name}.svg" for m in ("rmt", "ggn") for name in OVER_TIME),
        "ggn/spectrum_step_00000007.svg",
    }
    assert (tmp_path / "rmt" / "spectrum_over_time.svg").read_text().lstrip().startswith("<?xml")
    assert "ggn: 1 reading\n" in capsys.readouterr().out


def test_pdf(run_directory, tmp_path):
    assert main(["plot", str(run_directory), "--output", str(tmp_path), "--format", "pdf", "--name", "ggn"]) == 0
    assert (tmp_path / "ggn" / "spectrum_step_00000007.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plot", "{empty}"], "no readings below"),
        (["plot", "{empty}/nowhere"], "nowhere is not a directory"),
        (["plot", "{run}", "--name", "typo"], "no monitor named 'typo' here; there are: "),
    ],
)
def test_nothing_to_draw_is_an_error_that_says_so(run_directory, tmp_path, capsys, arguments, words):
    filled = [argument.format(empty=tmp_path, run=run_directory) for argument in arguments]
    assert main(filled) == 2
    assert words in capsys.readouterr().err


WRONG = [[], ["plot"], ["draw", "x"], ["plot", "x", "--format", "gif"], ["plot", "x", "--every", "0"]]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: python -m lightning_rmt" in capsys.readouterr().err


def test_help_says_what_is_needed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plot", "--help"])
    assert exit_.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for part in ("RUN_DIRECTORY", "--format {png,pdf,svg}", "default: RUN_DIRECTORY/rmt_figures", "example:"):
        assert part in words


def test_a_damaged_file_does_not_stop_the_rest(run_directory, tmp_path, capsys):
    save_reading(reading(5), tmp_path)
    (tmp_path / "rmt" / "step_00000006.npz").write_bytes(b"broken")
    assert main(["plot", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "rmt: 1 reading\n" in printed.out
    assert printed.err.startswith("python -m lightning_rmt: warning: skipped ")
    assert printed.err.count("step_00000006.npz") == printed.err.count("\n") == 1


def test_figures_that_cannot_be_written_are_an_error_that_says_so(run_directory, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["plot", str(run_directory), "--output", str(tmp_path / "file")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_runs_as_a_module_without_torch(run_directory, tmp_path):
    code = f"""
import sys
from lightning_rmt.__main__ import main
assert main(["plot", {str(run_directory)!r}, "--output", {str(tmp_path)!r}, "--name", "ggn"]) == 0
assert not {{"torch", "lightning", "pytorch_lightning", "tensorboard"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    command = [sys.executable, "-m", "lightning_rmt", "plot", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m lightning_rmt: error: no readings below")
    assert done.stderr.count("\n") == 1
