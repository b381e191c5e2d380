from __future__ import annotations

import subprocess
import sys

import pytest


def modules_after(code):
    listing = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import lightning_rmt")
    assert not {"torch", "numpy", "pytorch_lightning", "matplotlib", "scipy"} & loaded


def test_a_saved_spectrum_needs_no_torch():
    loaded = modules_after("from lightning_rmt import Spectrum, Reading, Estimate, Level")
    assert not {"torch", "pytorch_lightning", "matplotlib"} & loaded


def test_the_operators_need_no_lightning():
    loaded = modules_after("from lightning_rmt import Hessian, GaussNewton, GradientCovariance, estimate_spectrum")
    assert not {"pytorch_lightning", "lightning", "lightning_fabric", "matplotlib"} & loaded


def test_the_monitor_does_not_load_plotting():
    loaded = modules_after("from lightning_rmt import SpectrumMonitor")
    assert "lightning_rmt.report.figures" not in loaded


def test_all_names_resolve():
    import lightning_rmt

    for name in lightning_rmt.__all__:
        assert getattr(lightning_rmt, name) is not None
    assert set(lightning_rmt.__all__) <= set(dir(lightning_rmt))
    with pytest.raises(AttributeError, match="no attribute 'Hesian'"):
        _ = lightning_rmt.Hesian
