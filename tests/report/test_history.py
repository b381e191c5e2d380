from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_rmt.report.history import BINS_PER_DECADE, HistoryEntry, LogMasses, bin_edge


def test_masses_are_the_counts_of_the_eigenvalues_per_bin(exact, exact_eigenvalues):
    masses = LogMasses.of(exact.spectrum)
    lowest, highest = masses.lowest_bin, 2 * BINS_PER_DECADE  # up to 100
    outer = [bin_edge(k) for k in range(lowest, highest + 1)]
    edges = [-edge for edge in reversed(outer)] + outer
    expected = np.histogram(exact_eigenvalues, edges)[0] / exact_eigenvalues.size
    assert expected.max() == pytest.approx(1 / 12)  # the bins do tell them apart
    assert masses.pooled(lowest, highest) == pytest.approx(expected, rel=2e-3)


def test_pooling_moves_inner_bins_to_zero_and_keeps_the_rest(exact, exact_eigenvalues):
    masses = LogMasses.of(exact.spectrum)
    pooled = masses.pooled(-1 * BINS_PER_DECADE, 2 * BINS_PER_DECADE)
    inner = (np.abs(exact_eigenvalues) < 0.1).sum() / 12
    assert pooled[pooled.size // 2] == pytest.approx(inner, rel=1e-2)
    assert pooled.sum() == pytest.approx(1.0, rel=1e-2)
    assert pooled[: pooled.size // 2].sum() == pytest.approx(2 / 12, rel=1e-2)  # -3 and -0.5


def test_scale_is_where_the_share_of_what_is_not_zero_lies(reading_of):
    eigenvalues = np.concatenate([np.zeros(500), np.linspace(0.01, 1.0, 100), [-30.0]])
    masses = LogMasses.of(reading_of(eigenvalues, steps=120).spectrum)
    assert masses.scale(0.5) == pytest.approx(0.5, rel=0.25)  # a bin is 21 % wide
    assert masses.scale(0.1) == pytest.approx(0.1, rel=0.25)
    assert LogMasses.of(reading_of(np.zeros(9)).spectrum).scale() < 1e-4  # nothing but zeros: all of it is pooled


def test_a_bin_finer_than_what_is_stored_is_refused(exact):
    masses = LogMasses.of(exact.spectrum)
    with pytest.raises(ValueError, match="pools all bins below"):
        masses.pooled(masses.lowest_bin - 1, 24)


def test_all_mass_is_kept(any_reading):
    entry = HistoryEntry.from_reading(any_reading)
    masses = entry.masses
    stored = [masses.zero, *masses.positive, *masses.negative]
    assert sum(10**value for value in stored) == pytest.approx(1.0, rel=5e-3)
    assert len(stored) == 2 * 5 * BINS_PER_DECADE + 1


def test_fields_come_from_the_spectrum(trained):
    entry = HistoryEntry.from_reading(trained)
    assert (entry.step, entry.outliers_high, entry.outliers_low) == (120, 9, None)
    assert entry.lambda_max == trained.spectrum.lambda_max.value
    assert entry.lambda_min == trained.spectrum.lambda_min.value
    assert entry.top[:3] == pytest.approx((10.4, 9.6, 8.8))
    assert entry.bottom[0] == pytest.approx(-0.3 / 3**0.9)
    assert entry.bulk_edge_high == pytest.approx(0.7)
    assert entry.bulk_edge_low is None
    assert (entry.trace, entry.trace_stderr) == (trained.spectrum.trace.mean, trained.spectrum.trace.stderr)
    assert entry.two_over_lr == pytest.approx(2 / 0.11)


@pytest.mark.parametrize(
    "change", [{"learning_rate": None}, {"learning_rate": 0.0}, {"curvature": "gradient_covariance"}]
)
def test_no_limit_without_a_learning_rate_or_a_curvature_of_the_loss(trained, change):
    assert HistoryEntry.from_reading(replace(trained, **change)).two_over_lr is None


def test_survives_json_and_a_checkpoint_read_with_weights_only(any_reading, tmp_path):
    # NumPy numbers on purpose: they are what a reading may well hold, and what weights_only refuses.
    reading = replace(any_reading, step=np.int64(7), learning_rate=np.float64(0.1), seconds=np.float32(2.0))
    entry = HistoryEntry.from_reading(reading)
    assert HistoryEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
    torch.save({"history": [entry.to_dict()]}, tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)["history"][0]
    assert HistoryEntry.from_dict(loaded) == entry


def test_from_dict_ignores_later_keys_and_names_missing_ones(trained):
    values = HistoryEntry.from_reading(trained).to_dict()
    assert HistoryEntry.from_dict({**values, "later": 1, "masses": {**values["masses"], "later": 1}}).step == 120
    del values["trace"]
    with pytest.raises(ValueError, match="trace missing"):
        HistoryEntry.from_dict(values)


def test_an_entry_is_small(trained):
    assert len(json.dumps(HistoryEntry.from_reading(trained).to_dict())) < 4000
