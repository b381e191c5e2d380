"""Runs the scripts of all papers and joins their pages to docs/papers.md; other arguments than ``--join`` are passed on.

``--join`` runs nothing and joins the pages that are there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "universal_characteristics.py",
    "appearance_of_rmt.py",
    "gan_loss_surfaces.py",
    "beyond_rmt.py",
    "geometry_of_loss_surfaces.py",
    "damping_as_shrinkage.py",
)
INTRODUCTION = """# The papers, reproduced

One script for each, in `examples/papers/`; `make papers` runs them all and writes this page. *holds*: asserted, the script
fails where the number leaves its tolerance. *does not reproduce*: what the paper claims and these runs contradict, asserted
as well. *shown*: no tolerance. Errors are one standard error.
"""


def main() -> int:
    """Exit status: 0 where every script's was."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--join"]
    run = "--join" not in sys.argv
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else Path("docs/papers")
    failed, pages = [], []
    for script in SCRIPTS:
        start = time.perf_counter()
        if run:
            status = subprocess.run([sys.executable, str(HERE / script), *arguments], check=False).returncode
            print(f"{script}: exit status {status} after {time.perf_counter() - start:.0f} s", flush=True)
            if status:
                failed.append(script)
        page = out / f"{Path(script).stem}.md"
        if page.exists():
            pages.append("#" + page.read_text(encoding="utf-8"))  # one level down
    out.with_suffix(".md").write_text("\n".join([INTRODUCTION, *pages]), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
