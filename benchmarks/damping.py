"""The damping controller against every fixed damping of a grid: prints the two tables of docs/damping.md.

Run by hand: ``OMP_NUM_THREADS=1 python benchmarks/damping.py``. One thread, ten to thirty minutes; CPU time. A small
K-FAC on the tasks of tests/optim/kronecker_harness.py.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from lightning_rmt import DampingController

sys.path.append(str(Path(__file__).parents[1] / "tests" / "optim"))
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import tune_damping
from kronecker_harness import SCHEDULE, train

GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: Task and learning rate.
CELLS = (*((kind, rate) for kind, (_, rate) in SCHEDULE.items()), ("autoencoder", 0.3), ("classifier", 0.1))
CONTROLLERS: dict[str, dict[str, Any]] = {
    "held-out, guard as it is by default": {},
    "held-out, guard every step": {"guard_steps": "every"},
    "held-out, no rewinding": {"rewind": None},
    "held-out, no guard": {"guard": None},
    "two-part, guard as it is by default": {"method": "two-part"},
}
#: Where the controller starts: any other of the grid gives the same run, bit for bit (test_controller_robustness.py).
START = GRID[0]
#: Settings that the controller wasn't made on: the classifier, by what is different.
NARROW = (64, 48, 24, 10)
ELSEWHERE: dict[str, dict[str, Any]] = {
    "lr 0.3, inverting in every step": {"lr": 0.3, "refresh": 1},
    "lr 0.3, inverting in every step, narrower": {"lr": 0.3, "refresh": 1, "widths": NARROW},
    "lr 1, no momentum, inverting in every step": {"lr": 1.0, "refresh": 1, "momentum": 0.0},
}
#: Learning rate and momentum of examples/tune_damping.py.
EXAMPLE = ((0.5, 0.0), (0.3, 0.9), (0.1, 0.9))
FEW = (0.01, 0.1, 1.0)
HEADER = ("task", "damping", "median", "by seed", "ratio, median", "ratio, worst", "rejected", "CPU s")


class Row(NamedTuple):
    """Runs of one setting, one per seed."""

    name: str
    losses: tuple[float, ...]
    rejections: tuple[int, ...] | None = None
    seconds: tuple[float, ...] | None = None


def run(kind: str, rate: float, damping: float, seed: int, **options: Any) -> tuple[float, int, float]:
    """Final loss, rejected steps, CPU seconds; without options the damping is fixed."""
    controller = DampingController(mode="control", **options) if options else None
    began = time.process_time()
    loss, _ = train(kind, damping, SCHEDULE[kind][0], rate, seed, controller)
    seconds = time.process_time() - began
    return loss, 0 if controller is None else controller.state_dict()["rejections"], seconds


def measure(kind: str, rate: float, seeds: Sequence[int]) -> tuple[list[Row], tuple[float, ...]]:
    """The rows of one task, and the best loss of the grid for each seed."""
    rows = []
    for damping in GRID:
        losses, _, seconds = zip(*(run(kind, rate, damping, seed) for seed in seeds), strict=True)
        rows.append(Row(f"{damping:g}", losses, None, seconds))
    best = tuple(min(losses) for losses in zip(*(row.losses for row in rows), strict=True))
    rows.append(Row("each seed's best of these", best))
    for name, options in CONTROLLERS.items():
        runs = (run(kind, rate, START, seed, **{"guard": 1.5, **options}) for seed in seeds)
        rows.append(Row(name, *zip(*runs, strict=True)))
    return rows, best


def elsewhere(seeds: Sequence[int]) -> None:
    """Prints the controller, with and without rewinding, beside the best of a few fixed dampings, seed by seed."""

    def harness(options: dict[str, Any]) -> Callable[[float, int, DampingController | None], float]:
        return lambda damping, seed, controller: train(
            "classifier", damping, 300, seed=seed, controller=controller, **options
        )[0]

    def example(lr: float, momentum: float) -> Callable[[float, int, DampingController | None], float]:
        return lambda damping, seed, controller: tune_damping.train(
            damping, controller, steps=200, lr=lr, momentum=momentum, seed=seed
        )[0]

    runs = {f"classifier, {name}": harness(options) for name, options in ELSEWHERE.items()}
    runs |= {f"example, lr {lr:g}, momentum {momentum:g}": example(lr, momentum) for lr, momentum in EXAMPLE}
    print("\n| setting | best fixed | controller | ratios | ratios without rewinding |\n|---|---|---|---|---|")
    for name, run in runs.items():
        best = [min(run(damping, seed, None) for damping in FEW) for seed in seeds]
        losses = {
            rewind: [run(START, seed, DampingController(mode="control", rewind=rewind)) for seed in seeds]
            for rewind in (1.5, None)
        }
        ratios = [[a / b for a, b in zip(losses[rewind], best, strict=True)] for rewind in losses]
        cells = [", ".join(map(shown, values)) for values in (best, losses[1.5], *ratios)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def shown(value: float) -> str:
    """Two digits, as short as they go."""
    if not math.isfinite(value):
        return "inf"
    if value >= 10:
        return f"{value:.0f}"
    digits = 1 - math.floor(math.log10(value))
    return f"{value:.{digits}f}".lstrip("0")


def line(task: str, row: Row, best: Sequence[float]) -> str:
    """One of the table."""
    ratios = [loss / least for loss, least in zip(row.losses, best, strict=True)]
    cells = (
        task,
        row.name,
        shown(median(row.losses)),
        ", ".join(map(shown, row.losses)),
        shown(median(ratios)),
        shown(max(ratios)),
        "" if row.rejections is None else ", ".join(map(str, row.rejections)),
        "" if row.seconds is None else f"{mean(row.seconds):.1f}",
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=tuple(SCHEDULE), default=list(SCHEDULE))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for kind, rate in CELLS:
        if kind not in arguments.tasks:
            continue
        task = f"{kind}, lr {rate:g}, {SCHEDULE[kind][0]} steps"
        rows, best = measure(kind, rate, arguments.seeds)
        for row in rows:
            print(line(task, row, best), flush=True)
            task = ""
    elsewhere(range(6))


if __name__ == "__main__":
    main()
