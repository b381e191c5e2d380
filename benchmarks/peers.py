"""Cost of a Lanczos step, of certified outliers, and of memory: ours and three other libraries, side by side.

Run by hand (`make bench`), never as a test; README.md beside this file says what is measured and how. Parts can be run
alone; each stores its figures in build/bench.json, and the report is written from all that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from models import CASES, DESCRIPTIONS, Case, trained_mlp
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "build" / "bench.json"
REPORT = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "hessian-eigenthings", "PyHessian", "curvlinops-for-pytorch", "scipy", "numpy")
OUTLIERS, TOLERANCE, SEEDS = 9, 1e-4, 3

warnings.filterwarnings("ignore")


# --- the contenders: each makes its operator, takes `steps` Lanczos steps from every start, returns the largest node ---


def ours(case: Case, steps: int, probes: int) -> float:
    from lightning_rmt import Hessian, estimate_spectrum

    with Hessian(case.loss, case.parameters, [case.batch]) as H:
        return float(estimate_spectrum(H, steps=steps, probes=probes).nodes.max())


def differences(case: Case, steps: int, probes: int) -> float:
    from lightning_rmt import estimate_spectrum
    from lightning_rmt.curvature.finite_difference import FiniteDifferenceHessian

    with FiniteDifferenceHessian(case.loss, case.parameters, [case.batch], scheme="forward") as H:
        return float(estimate_spectrum(H, steps=steps, probes=probes).nodes.max())


def eigenthings(case: Case, steps: int, probes: int) -> float:
    from hessian_eigenthings.algorithms.spectral_density import spectral_density

    found = spectral_density(
        _eigenthings_operator(case), num_runs=probes, lanczos_steps=steps, num_grid_points=2, seed=0
    )
    return float(found.raw_eigenvalues.max())


def _eigenthings_operator(case: Case) -> Any:
    from hessian_eigenthings.operators.hessian import HessianOperator

    return HessianOperator(case.model, [case.batch], lambda _, batch: case.loss(batch))


def pyhessian(case: Case, steps: int, probes: int) -> float:
    nodes, _ = _pyhessian(case).density(iter=steps, n_v=probes)
    return float(max(max(run) for run in nodes))


def _pyhessian(case: Case) -> Any:
    module = import_module("pyhessian.hessian")  # the package hides it behind a class of the same name
    case.model.zero_grad(set_to_none=True)  # or its Hessian counts twice
    if _eig_is_gone():
        module.torch = _TorchWithEig()
    return module.hessian(case.model, case.criterion, data=case.batch, cuda=False)


def _eig_is_gone() -> bool:
    try:
        torch.eig(torch.eye(2), eigenvectors=True)
    except (AttributeError, RuntimeError):
        return True
    return False


class _TorchWithEig:
    """torch with `torch.eig`, which PyHessian 0.1 calls on its small tridiagonal matrix and PyTorch has removed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def eig(T: torch.Tensor, eigenvectors: bool) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


def curvlinops(case: Case, steps: int, probes: int) -> float:
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = _curvlinops_operator(case)
    return max(float(fast_lanczos(operator, steps)[0].max()) for _ in range(probes))


def _curvlinops_operator(case: Case) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        case.model,
        case.criterion,
        case.parameters,
        [case.batch],
        check_deterministic=False,
        num_data=len(case.batch[0]),
    )


CONTENDERS: dict[str, tuple[Callable[[Case, int, int], float], int]] = {
    "ours, 2 probes": (ours, 2),
    "ours, 1 probe": (ours, 1),
    "ours, finite differences, 2 probes": (differences, 2),
    "hessian-eigenthings": (eigenthings, 2),
    "PyHessian": (pyhessian, 2),
    "curvlinops": (curvlinops, 2),
}
PEERS = list(CONTENDERS)[3:]
SMOOTH = ("gpt", "lstm")  # finite differences refuse the kinks of the others


def contenders(key: str) -> list[str]:
    """Those that can take on a model."""
    return [name for name in CONTENDERS if CONTENDERS[name][0] is not differences or key in SMOOTH]


@contextmanager
def portable_kernels(enabled: bool) -> Iterator[None]:
    """What a user of a peer does when a kernel has no second derivative: no oneDNN, plain attention."""
    if not enabled:
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


def run(name: str, case: Case, steps: int, portable: bool) -> float:
    torch.manual_seed(0)
    contender, probes = CONTENDERS[name]
    try:
        with portable_kernels(portable):
            return contender(case, steps, probes)
    finally:
        case.model.zero_grad(set_to_none=True)  # PyHessian leaves a gradient with its graph


def choose_kernels(name: str, case: Case) -> tuple[bool, str, bool]:
    """(does it run, the error as installed, does it need portable kernels), from two steps each."""
    error = ""
    for portable in (False, True):
        try:
            run(name, case, 2, portable)
            return True, error, portable
        except Exception as problem:
            error = error or f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"
    return False, error, False


def gradient(case: Case) -> None:
    torch.autograd.grad(case.loss(case.batch), case.parameters)


# --- time -------------------------------------------------------------------------------------------------------------


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def elapsed(action: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = clocks()
    action()
    cpu_after, wall_after = clocks()
    return cpu_after - cpu, wall_after - wall


def time_case(key: str, steps: int, repeats: int) -> dict[str, Any]:
    case = CASES[key]()
    able = {}
    rows: dict[str, Any] = {}
    for name in contenders(key):  # also warms up
        works, error, portable = choose_kernels(name, case)
        rows[name] = {"error": error, "portable": portable, "works": works}
        if works:
            able[name] = portable
    names = list(able)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    gradients: list[tuple[float, float]] = []
    portable_gradients: list[tuple[float, float]] = []
    once = elapsed(lambda: gradient(case))[1]
    inner = max(3, min(50, int(0.15 / once)))
    for repeat in range(repeats):
        for index in range(len(names)):
            name = names[(repeat + index) % len(names)]
            cpu, wall = elapsed(lambda: [gradient(case) for _ in range(inner)])
            gradients.append((cpu / inner, wall / inner))
            with portable_kernels(True):
                portable_gradients.append(elapsed(lambda: gradient(case)))
            values: list[float] = []
            used = elapsed(lambda name=name, values=values: values.append(run(name, case, steps, able[name])))
            products = steps * CONTENDERS[name][1]
            samples[name].append((used[0] / products, used[1] / products))
            rows[name]["largest"] = values[0]
    unit = [statistics.median(sample[clock] for sample in gradients) for clock in (0, 1)]
    for name in names:
        for clock, label in enumerate(("cpu", "wall")):
            ratios = [sample[clock] / unit[clock] for sample in samples[name]]
            rows[name][label] = statistics.median(ratios)
            rows[name][label + "_range"] = [min(ratios), max(ratios)]
    return {
        "parameters": case.size,
        "tensors": len(case.parameters),
        "steps": steps,
        "repeats": repeats,
        "gradient_ms": [1e3 * seconds for seconds in unit],
        "portable_gradient": statistics.median(sample[0] for sample in portable_gradients) / unit[0],
        "rows": rows,
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def memory_of(name: str, key: str, steps: int) -> dict[str, Any]:
    """Growth of the resident high-water mark in a run, in this process."""
    case = CASES[key]()
    works, _, portable = (True, "", False) if name == "gradient" else choose_kernels(name, case)
    if not works:
        return {}
    gradient(case)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    if name == "gradient":
        gradient(case)
    else:
        run(name, case, steps, portable)
    return {"bytes": status("VmHWM") - before}


def measure_memory(key: str, steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": steps}
    # Small allocations go back to the system at once, so that what a warm-up left behind isn't counted as free.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in ("gradient", *contenders(key)):
        command = [sys.executable, __file__, "--child", name, "--models", key, "--steps", str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            found[name] = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:160]}
        else:
            found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- products to certify ----------------------------------------------------------------------------------------------


def certify() -> dict[str, Any]:
    """Products until the nine largest eigenvalues of the trained MLP are certified, by each library's own notion."""
    from lightning_rmt import Hessian, Spectrum, estimate_spectrum
    from lightning_rmt.krylov.tridiagonal import Tridiagonal

    case = trained_mlp()
    double = trained_mlp()
    double.model.double()
    x, y = double.batch
    double = double._replace(batch=(x.double(), y))
    with Hessian(double.loss, double.parameters, [double.batch]) as H:
        reference = estimate_spectrum(H, steps=120)
    truth = torch.tensor([level.value for level in reference.top])
    next_largest = float(truth[OUTLIERS]) if len(truth) > OUTLIERS else float("nan")
    truth = truth[:OUTLIERS]

    def error(values: list[float]) -> float:
        got = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)[: len(truth)]
        return float(((got - truth) / truth).abs().max()) if len(got) == len(truth) else float("nan")

    def run_ours(seed: int) -> tuple[int, float]:
        with Hessian(case.loss, case.parameters, [case.batch]) as H:
            whole = estimate_spectrum(H, steps=60, seed=seed)
        run = whole.runs[0]
        for m in range(OUTLIERS, run.steps + 1):
            spectrum = Spectrum((Tridiagonal(run.alpha[:m], run.beta[:m]),), whole.size, m, whole.noise)
            if len(spectrum.top) >= OUTLIERS:
                return m, error([level.value for level in spectrum.top[:OUTLIERS]])
        raise RuntimeError("not certified in 60 products")

    def run_eigenthings(seed: int) -> tuple[int, float]:
        from hessian_eigenthings.algorithms.lanczos import lanczos

        for m in range(OUTLIERS, 61):
            found = lanczos(
                _eigenthings_operator(case),
                k=OUTLIERS,
                max_iter=m,
                tol=TOLERANCE,
                which="LA",
                reorthogonalize=True,
                seed=seed,
            )
            if bool(found.converged.all()):
                return m, error(found.eigenvalues.tolist())
        raise RuntimeError("not converged in 60 products")

    def run_pyhessian(seed: int) -> tuple[int, float]:
        module = import_module("pyhessian.hessian")
        torch.manual_seed(seed)
        counted = 0
        original = module.hessian_vector_product

        def counting(*arguments: Any) -> Any:
            nonlocal counted
            counted += 1
            return original(*arguments)

        module.hessian_vector_product = counting
        try:
            values, _ = _pyhessian(case).eigenvalues(maxIter=100, tol=1e-3, top_n=OUTLIERS)
        finally:
            module.hessian_vector_product = original
            case.model.zero_grad(set_to_none=True)
        return counted, error(values)

    def run_curvlinops(seed: int) -> tuple[int, float]:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = _curvlinops_operator(case).to_scipy()
        counted = 0

        def product(v: Any) -> Any:
            nonlocal counted
            counted += 1
            return operator @ v

        start = np.random.default_rng(seed).standard_normal(case.size).astype(np.float32)
        wrapped = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
        values = eigsh(wrapped, k=OUTLIERS, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)
        return counted, error(list(values))

    runs = {
        "ours": run_ours,
        "hessian-eigenthings": run_eigenthings,
        "PyHessian": run_pyhessian,
        "curvlinops": run_curvlinops,
    }
    rows: dict[str, Any] = {}
    for name, measure in runs.items():
        try:
            found = [measure(seed) for seed in range(1, SEEDS + 1)]
            rows[name] = {"products": [m for m, _ in found], "error": max(e for _, e in found)}
        except Exception as problem:
            rows[name] = {"failure": f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"}
    return {"eigenvalues": truth.tolist(), "next": next_largest, "rows": rows}


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def report(store: dict[str, Any]) -> str:
    lines = [
        "# Results",
        "",
        "Written by `make bench`; README.md says how each figure is taken. One thread, CPU, float32, exact products.",
        "**The figures were taken on a shared machine**, with other processes running: CPU time (of the process) is the",
        "figure to read, wall time is given beside it, and differences below some 10 % mean little.",
        "",
        f"- Date: {store['date']}",
        f"- Machine: {store['machine']}",
        f"- Versions: {store['versions']}",
        "",
    ]
    times = store.get("timing", {})
    if times:
        lines += ["## Gradients per Lanczos step, all in", ""]
        lines += ["Median CPU time (least to greatest; wall). One first-order gradient of the same batch is 1.", ""]
        keys = [key for key in CASES if key in times]
        rows = []
        for name in CONTENDERS:
            rows.append([name, *(_time_cell(times[key]["rows"].get(name)) for key in keys)])
        lines += table(["", *keys], rows)
        lines += ["", "Ours with 2 probes over each peer (below 1: ours is faster):", ""]
        rows = [[name, *(_ratio_cell(times[key]["rows"], name) for key in keys)] for name in PEERS]
        lines += table(["", *keys], rows)
        lines.append("")
        for key in keys:
            one = times[key]
            lines.append(
                f"- {key}: {DESCRIPTIONS[key]}; {one['parameters']} parameters in {one['tensors']} tensors. "
                f"{one['steps']} steps per start, {one['repeats']} interleaved repeats. A gradient takes "
                f"{one['gradient_ms'][0]:.1f} ms of CPU time; with the portable kernels "
                f"{one['portable_gradient']:.2f} of that."
            )
        rows = []
        for name in CONTENDERS:
            for key in keys:
                row = times[key]["rows"].get(name, {})
                if row.get("error"):
                    fixed = "runs with portable kernels" if row["works"] else "no figure"
                    rows.append([name, key, f"`{row['error']}`", fixed])
        if rows:
            lines += ["", "\\* fails as installed:", "", *table(["", "model", "error", "then"], rows)]
        if _eig_is_gone():
            lines += [
                "",
                "PyHessian 0.1 as installed fails at the end of `density` on every model, since `torch.eig` is gone;",
                "it is given `torch.linalg.eigh` in its place, on the tridiagonal matrix only.",
            ]
        lines += ["", "Largest Ritz value found, to see that all measure the same matrix (start vectors differ):", ""]
        rows = [
            [name, *(_number(times[key]["rows"].get(name, {}).get("largest"), ".5g") for key in keys)]
            for name in CONTENDERS
        ]
        lines += [*table(["", *keys], rows), ""]
    if "outliers" in store:
        found = store["outliers"]
        values = ", ".join(f"{value:.3g}" for value in found["eigenvalues"])
        lines += [
            "## Products to certify the outliers",
            "",
            f"The nine largest eigenvalues of the trained MLP ({values}; the next is {found['next']:.3g}),",
            "three start vectors, true error against a run in float64.",
            "",
        ]
        notions = {
            "ours": "certified: the interval of the residual holds exactly one eigenvalue",
            "hessian-eigenthings": f"`converged` of all nine (residual below {TOLERANCE:g} of the value)",
            "PyHessian": "no certificate; stops when two estimates differ by less than 1e-3 (power iteration, deflation)",
            "curvlinops": f"through SciPy's `eigsh` (ARPACK), tol={TOLERANCE:g}",
        }
        rows = []
        for name, row in found["rows"].items():
            products = row.get("failure") or ", ".join(map(str, row["products"]))
            rows.append([name, products, _number(row.get("error"), ".1e"), notions[name]])
        lines += [*table(["", "products (three starts)", "largest relative error", "notion"], rows), ""]
    if store.get("memory"):
        keys = [key for key in CASES if key in store["memory"]]
        lines += ["## Peak memory of a run, MB", ""]
        lines += ["Growth of the resident high-water mark over what the process held before, a process per figure."]
        counts = ", ".join(f"{store['memory'][key].get('steps', 20)} ({key})" for key in keys)
        lines += [f"Lanczos steps per start: {counts}.", ""]
        rows = []
        for name in ("gradient", *CONTENDERS):
            rows.append([name, *(_memory_cell(store["memory"][key].get(name)) for key in keys)])
        lines += [*table(["", *keys], rows), ""]
    return "\n".join(lines)


def _memory_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return _number(row["bytes"] / 1e6, ".0f") if "bytes" in row else "fails"


def _time_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "cpu" not in row:
        return "fails*"
    low, high = row["cpu_range"]
    mark = "*" if row["error"] else ""
    return f"**{row['cpu']:.2f}**{mark} ({low:.2f} to {high:.2f}; {row['wall']:.2f})"


def _ratio_cell(rows: dict[str, Any], name: str) -> str:
    mine, other = (rows[row].get("cpu") for row in (next(iter(CONTENDERS)), name))
    return format(mine / other, ".2f") if mine and other else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def load() -> dict[str, Any]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def save(part: str, key: str | None, value: Any) -> None:
    store = load()
    if key is None:
        store[part] = value
    else:
        store.setdefault(part, {})[key] = value
    store |= {"date": date.today().isoformat(), "machine": machine(), "versions": versions()}
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(store, indent=1))
    REPORT.write_text(report(store))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ["timing", "outliers", "memory"]
    parser.add_argument(
        "--parts", nargs="+", default=parts, choices=[*parts, "report"], help="report: only write again"
    )
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps per start vector")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        print(json.dumps(memory_of(arguments.child, arguments.models[0], arguments.steps)))
        return
    for part in arguments.parts:
        for key in {"outliers": [None], "report": []}.get(part, arguments.models):
            print(f"{part} {key or ''}", flush=True)
            if part == "timing":
                save(part, key, time_case(key, arguments.steps, arguments.repeats))
            elif part == "memory":
                save(part, key, measure_memory(key, arguments.steps))
            elif part == "outliers":
                save(part, None, certify())
    REPORT.write_text(report(load()))
    print(f"wrote {REPORT.name}")


if __name__ == "__main__":
    main()
