"""Two whole trainings to look at: a character GPT and a CNN, thousands of steps each on one core.

    python examples/long_run.py [--quick] [--only gpt] [--output docs/long_run]

Each is trained three times, and the weights at the end are compared bit by bit: without a monitor, with the default one
(5 % of the time), and with one that looks often, for the pictures; the GPT a fourth time, with the default monitor and a
second one in AdamW's metric. Then both at other learning rates, and the CNN in a longer training with the default monitor.
Tables and figures go to ``--output``, TensorBoard's logs to ``--logs``. The text is Python's own reference manual (the
stdlib's ``pydoc_data.topics``), the images are scikit-learn's digits: nothing is downloaded. Some twenty minutes in all.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from long_run_networks import GPT, ShiftedDigits, Snippets, Training, cnn
from pytorch_lightning.loggers import TensorBoardLogger
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_rmt import Reading, SpectrumMonitor
from lightning_rmt.report.figures import heat_map_figure, outliers_over_time_figure
from lightning_rmt.report.files import load_run
from lightning_rmt.report.history import HistoryEntry
from lightning_rmt.report.wording import number, with_error

MOMENTUM = 0.9


class Plan(NamedTuple):
    """One of the two trainings.

    Attributes:
        title: for the tables.
        data: makes ``steps`` batches.
        steps: of the whole training.
        every: steps between full probes of the monitor that looks often; light ones are five times as many.
        metric: whether to look at the spectrum in the optimizer's metric, too.
        rate: largest learning rate.
        others: rates to try without a monitor, in a quarter of the steps.
        longer: steps of one more training with the default monitor, to see when it looks; 0 for none.
    """

    title: str
    data: type[IterableDataset]
    steps: int
    every: int
    metric: bool
    rate: float
    others: tuple[float, ...] = ()
    longer: int = 0


PLANS = {
    "gpt": Plan("character GPT, AdamW", Snippets, 4000, 400, True, 3e-3, (7.5e-4, 3e-3, 0.012, 0.048, 0.192)),
    "cnn": Plan(
        "CNN, SGD with momentum",
        ShiftedDigits,
        20001,
        2000,
        False,
        0.05,
        (0.0125, 0.05, 0.2, 0.8, 3.2),
        60000,
    ),
}
QUICK = {"lanczos_steps": 10, "levels": None, "figures_every": 0}


def prepare(name: str, steps: int, rate: float) -> Training:
    torch.manual_seed(0)
    if name == "gpt":
        net: nn.Module = GPT()
        return Training(net, torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01), steps)
    net = cnn()
    return Training(net, torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM), steps)


class Run(NamedTuple):
    """What one training left.

    Attributes:
        module: after it.
        wall: seconds that ``fit`` took.
        cpu: seconds of this process's CPU time that ``fit`` took.
        readings: full and light ones, in order; with several monitors, those of the last one.
    """

    module: Training
    wall: float
    cpu: float
    readings: list[Reading]

    @property
    def full(self) -> list[Reading]:
        return [reading for reading in self.readings if not reading.light]

    def loss(self, step: int) -> float:
        """Mean over the (up to) 100 steps before this one, and it."""
        return float(torch.stack(self.module.losses[max(0, step - 99) : step + 1]).mean())


def train(name: str, steps: int, logs: Path, *monitors: SpectrumMonitor, rate: float | None = None) -> Run:
    """With a real Trainer, and the plan's learning rate if no other one is given."""
    module = prepare(name, steps, rate or PLANS[name].rate)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(logs, name=name),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(monitors),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, DataLoader(PLANS[name].data(steps), batch_size=None))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Run(module, wall, cpu, load_run(trainer.log_dir)[monitors[-1].name] if monitors else [])


def same_weights(a: Run, b: Run) -> bool:
    """To the bit."""
    pairs = zip(a.module.state_dict().values(), b.module.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def spectrum_table(run: Run) -> str:
    """Up to six full readings from the first to the last."""
    chosen = sorted({round(i * (len(run.full) - 1) / 5) for i in range(6)})
    rows = [_row(run, run.full[i]) for i in chosen]
    first, *names = rows[0]
    return tabulate(
        [[key, *(row[key] for row in rows)] for key in names], [first, *(row[first] for row in rows)], "pipe"
    )


def _row(run: Run, reading: Reading) -> dict[str, str]:
    spectrum, noise, rate = reading.spectrum, reading.noise, reading.learning_rate or math.nan
    count, tenth = spectrum.outliers.high.count, spectrum.top[9:10]
    low, high = spectrum.quantile_bounds(0.99)
    limit = reading.sharpness_limit
    try:
        damping = number(reading.local_law_damping())
    except ValueError:
        damping = "refused"
    return {
        "step": str(reading.step),
        "loss, mean of 100 steps": number(run.loss(reading.step), 3),
        "λ_max": with_error(spectrum.lambda_max.value, spectrum.lambda_max.residual),
        "learning rate": number(rate),
        f"limit, {limit:.3g} over it" if limit else "2 over it, no limit for AdamW": number((limit or 2.0) / rate),
        "outliers above the bulk": "no gap" if count is None else str(count),
        "10th largest": number(tenth[0].value) if tenth else "not certified",
        "99 % are below": f"{number(low)} to {number(high)}",
        "λ_min": with_error(spectrum.lambda_min.value, spectrum.lambda_min.residual),
        "share at zero": f"{number(100 * spectrum.zero_mass)} %",
        "share below zero": f"{number(100 * spectrum.negative_mass)} %",
        "trace": with_error(spectrum.trace.mean, spectrum.trace.stderr),
        "noise edge": "not measured" if noise is None else number(noise.edge),
        "anisotropy of the noise": "not measured"
        if noise is None or noise.anisotropy is None
        else number(noise.anisotropy),
        "damping by the local law": damping,
    }


def metric_table(run: Run) -> str:
    """Where lambda_max stands against the optimizer's limit: the warm-up's readings, and the full ones."""
    rows = []
    for reading in run.readings:
        sharpness, level = reading.sharpness_over_limit, reading.spectrum.lambda_max
        if sharpness is not None and (not reading.light or reading.step < run.module.steps / 10):
            rate, limit = reading.learning_rate or math.nan, reading.stability_limit or math.nan
            largest, share = with_error(level.value, level.residual), number(sharpness.value, 2)
            rows.append(
                [str(reading.step), number(run.loss(reading.step)), number(rate), largest, number(limit), share]
            )
    heads = ["step", "loss, mean of 100 steps", "learning rate", "λ_max in the metric", "limit", "λ_max over the limit"]
    return tabulate(rows, heads, "pipe", disable_numparse=True)


def cost_table(title: str, plain: Run, runs: dict[str, Run]) -> str:
    rows: list[list[object]] = [
        ["CPU time of the training, s", f"{plain.cpu:.1f}", *(f"{run.cpu:.1f}" for run in runs.values())],
        ["overhead, CPU time", "", *(f"{100 * (run.cpu / plain.cpu - 1):.1f} %" for run in runs.values())],
        ["full probes", "", *(len(run.full) for run in runs.values())],
        ["light probes", "", *(len(run.readings) - len(run.full) for run in runs.values())],
        ["products of all probes", "", *(sum(r.spectrum.products for r in run.readings) for run in runs.values())],
        [
            "same weights at the end",
            "",
            *("yes, all bits" if same_weights(plain, run) else "NO" for run in runs.values()),
        ],
    ]
    return tabulate(rows, [title, "no monitor", *runs], "pipe")


def rates_table(name: str, steps: int, logs: Path, **settings: Any) -> str:
    """The loss of shorter trainings with other learning rates, and how near lambda_max came to the metric's limit."""
    heads, rows = ["learning rate", "loss in the first tenth", "loss in the last tenth"], []
    looks = {"every_n_steps": steps, "light_every_n_steps": max(steps // 10, 5), "lanczos_steps": 30, "levels": None}
    looks |= {"preconditioned": True, "noise": False, "figures_every": 0, **settings}
    for rate in PLANS[name].others:
        run = train(name, steps, logs, *([SpectrumMonitor(**looks)] if PLANS[name].metric else []), rate=rate)
        losses, tenth = torch.stack(run.module.losses), steps // 10
        rows.append([f"{rate:g}", *(number(float(part.mean())) for part in (losses[:tenth], losses[-tenth:]))])
        if PLANS[name].metric:
            shares = [r.sharpness_over_limit.value for r in run.readings if r.light and r.sharpness_over_limit]
            rows[-1].append(f"{number(min(shares), 2)} to {number(max(shares), 2)}" if shares else "none certified")
            heads = [*heads[:3], "λ_max over AdamW's limit, after the first tenth"]
    return tabulate(rows, heads, "pipe", disable_numparse=True)


def schedule_table(run: Run) -> str:
    """When a monitor looked, what at, and what it had cost by then."""
    rows = []
    for reading in run.readings:
        level = reading.spectrum.lambda_max
        largest = with_error(level.value, level.residual) if level.certified else "not certified"
        cost = "not yet" if reading.overhead is None else f"{100 * reading.overhead:.1f} %"
        rows.append([str(reading.step), reading.speed, str(reading.spectrum.products), largest, cost])
    heads = ["step", "probe", "products", "λ_max", "probes so far over training so far"]
    return tabulate(rows, heads, "pipe", disable_numparse=True)


def write(name: str, plain: Run, runs: dict[str, Run], output: Path) -> None:
    """Tables as Markdown, figures as PNG; the spectrum is that of the run that looks often."""
    _, often, *others = runs.values()
    output.mkdir(parents=True, exist_ok=True)
    spectra, costs = spectrum_table(often), cost_table(PLANS[name].title, plain, runs)
    print(spectra, costs, sep="\n\n", end="\n\n")
    (output / f"{name}_spectrum.md").write_text(spectra + "\n", encoding="utf-8")
    (output / f"{name}_cost.md").write_text(costs + "\n", encoding="utf-8")
    draw(often, output, name)
    for metric in others:
        places = metric_table(metric)
        print(places, end="\n\n")
        (output / f"{name}_metric.md").write_text(places + "\n", encoding="utf-8")
        draw(metric, output, f"{name}_metric")


def draw(run: Run, output: Path, name: str) -> None:
    history = [HistoryEntry.from_reading(reading) for reading in run.readings]
    heat_map_figure(history).savefig(output / f"{name}_spectrum_over_time.png", dpi=130)
    outliers_over_time_figure(history).savefig(output / f"{name}_eigenvalues_over_time.png", dpi=130)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Run, dict[str, Run]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: too short to mean anything")
    parser.add_argument("--only", choices=PLANS)
    parser.add_argument("--output", type=Path, default=Path("docs/long_run"))
    parser.add_argument("--logs", type=Path, default=Path("long_run_logs"))
    options = parser.parse_args(arguments)
    for words in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", words)
    torch.set_num_threads(1)
    found = {}
    for name in [options.only] if options.only else PLANS:
        steps, every = (21, 10) if options.quick else (PLANS[name].steps, PLANS[name].every)
        settings = {"custom_scalars": True, **(QUICK if options.quick else {})}
        often = {"every_n_steps": every, "light_every_n_steps": every // 5}
        monitors = {
            "default": [SpectrumMonitor(**settings)],
            f"every {every} and {every // 5} steps": [SpectrumMonitor(**often, **settings)],
        }
        if PLANS[name].metric:
            beside = SpectrumMonitor(preconditioned=True, name="adamw", **often, **{**settings, "levels": None})
            default = SpectrumMonitor(**{**settings, "custom_scalars": False})  # a run has one layout
            monitors["default, and as often in AdamW's metric"] = [default, beside]
        plain = train(name, steps, options.logs)
        runs = {title: train(name, steps, options.logs, *some) for title, some in monitors.items()}
        write(name, plain, runs, options.output)
        if PLANS[name].others:
            rates = rates_table(name, max(steps // 4, 10), options.logs, **(QUICK if options.quick else {}))
            print(rates, end="\n\n")
            (options.output / f"{name}_rates.md").write_text(rates + "\n", encoding="utf-8")
        if PLANS[name].longer:
            longer = 30 if options.quick else PLANS[name].longer
            schedule = schedule_table(train(name, longer, options.logs, SpectrumMonitor(**settings)))
            print(schedule, end="\n\n")
            (options.output / f"{name}_schedule.md").write_text(schedule + "\n", encoding="utf-8")
        found[name] = plain, runs
    return found


if __name__ == "__main__":
    main()
