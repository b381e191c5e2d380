"""The rules are NumPy: importing them loads neither torch nor SciPy."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_rules_loads_nothing_heavy():
    code = "import lightning_rmt.local_law, sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "pytorch_lightning", "matplotlib"} & set(done.stdout.split())


def test_all_names_resolve():
    from lightning_rmt import local_law

    assert list(local_law.__all__) == sorted(local_law.__all__)
    for name in local_law.__all__:
        assert getattr(local_law, name).__doc__
