"""What importing the package costs on top of torch and Lightning: CPU seconds in fresh processes, from bytecode, medians.

Run by hand: ``python benchmarks/import_time.py``. Each process imports torch, then Lightning (by both of its names
where both are installed: the callbacks are callbacks of both), then every public name.
"""

from __future__ import annotations

import argparse
import compileall
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

import lightning_rmt

TARGET = 0.3  # seconds
IMPORTS = {
    "torch": "import torch",
    "pytorch_lightning": "import pytorch_lightning",
    "lightning.pytorch": "try:\n    import lightning.pytorch\nexcept ImportError:\n    pass",
    "lightning_rmt": "import lightning_rmt",
    "SpectrumMonitor": "lightning_rmt.SpectrumMonitor",
    "every public name": "import lightning_rmt.laws\n[getattr(lightning_rmt, name) for name in lightning_rmt.__all__]",
}


def one_process() -> list[float]:
    """CPU seconds of each of ``IMPORTS``, one after the other in one new process."""
    code = "import time\nprocess_time = time.process_time\nlast = process_time()\n"
    for statement in IMPORTS.values():
        code += f"{statement}\nnow = process_time()\nprint(now - last)\nlast = now\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    # an installer does so too; Python itself does not where PYTHONDONTWRITEBYTECODE is set
    compileall.compile_dir(Path(lightning_rmt.__file__).parent, quiet=1)
    one_process()  # fills the file cache
    rows = [one_process() for _ in range(repeats)]
    print(f"Python {platform.python_version()}, {platform.machine()}; CPU seconds, {repeats} processes")
    for name, values in zip(IMPORTS, zip(*rows, strict=True), strict=True):
        print(f"{name:>18}: median {median(values):.3f}, min {min(values):.3f}, max {max(values):.3f}")
    total = median(sum(row[3:]) for row in rows)
    print(f"on top of torch and Lightning: {total:.3f} s; target {TARGET:g} s: {'met' if total < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
