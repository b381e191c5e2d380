"""The noise of the curvature under a Trainer: the right number, on any number of ranks, and words where there is none."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Case, differences, train
from level_modules import CASE, Headed, monitor, spied
from live_models import Classifier, vectors
from several_ranks import on_two_ranks
from test_bitwise_distributed import ddp
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_rmt.live import noise as live_noise
from lightning_rmt.live.training import dataset_size
from lightning_rmt.local_law import noise_edge, self_consistent_damping
from lightning_rmt.reading import Reading
from lightning_rmt.report.scalars import scalars


def watcher(**options: Any) -> Any:
    return monitor(**{"levels": None, "lanczos_steps": 60, **options})


def dense(module: Any, batch: Any) -> torch.Tensor:
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(module(batch[0].double()), batch[1]), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def test_against_dense_halves_of_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(live_noise, "RANDOM", 200)
    watch = watcher()
    spy = spied(tmp_path, watch)
    step, reading = watch.reading.step, watch.reading
    twin = copy.deepcopy(Headed()).double()
    twin.load_state_dict(spy.states[step])
    x, y = spy.batches[step]
    half = (len(y) + 1) // 2
    difference = dense(twin, (x[:half], y[:half])) - dense(twin, (x[half:], y[half:]))
    levels, u = torch.linalg.eigh(dense(twin, (x, y)))
    count = reading.spectrum.outliers.high.count
    kept = min(len(reading.spectrum.top), live_noise.UNCOUNTED) if count is None else count
    away = torch.eye(len(levels)) - u[:, -kept:] @ u[:, -kept:].T
    exact = float(((away @ difference @ away) ** 2).sum()) / (len(levels) - kept)  # s^2 of the difference
    # its two halves of 2: per sample s^2 = exact / (1/2 + 1/2), and a step's batch has all 4, of 24 samples
    assert reading.noise.mean**2 == pytest.approx(exact * (1 / 4 - 1 / 24), rel=0.05)
    assert reading.curvature_noise.mean == pytest.approx(reading.noise.mean)  # a step has one batch
    moved = difference @ u[:, -2:]
    along = (u[:, -2:] * moved).sum(0)
    across = ((moved**2).sum(0) - along**2) / 2
    assert reading.noise.anisotropy == pytest.approx(float(across.mean()) / (exact / 2), rel=0.2)


def test_a_loader_of_whole_batches_does_not_say_how_many_samples_there_are():
    data = TensorDataset(torch.zeros(7, 3))
    for loader, size in ((DataLoader(data, 2), 7), (DataLoader(data, batch_size=None), math.inf), ([1], math.inf)):
        assert dataset_size(SimpleNamespace(train_dataloader=loader, overfit_batches=0.0)) == size


def test_a_sampler_says_how_many_samples_it_draws_from():
    data = TensorDataset(torch.zeros(7, 3))
    samplers = (SubsetRandomSampler([0, 2, 4]), 3), (WeightedRandomSampler([1.0] * 7, 7), math.inf)
    for sampler, size in samplers:
        loader = DataLoader(data, 2, sampler=sampler)
        assert dataset_size(SimpleNamespace(train_dataloader=loader, overfit_batches=0.0)) == size


def with_options(**options: Any) -> Case:
    ignored = "You requested to overfit", "The number of training batches"
    return replace(CASE, trainer=lambda: {**CASE.trainer(), **options}, ignore=(*CASE.ignore, *ignored))


def test_one_batch_again_and_again_has_no_noise(tmp_path):
    """Lightning leaves the data set as it was: 24 samples, of which the training sees 4 or 8."""
    watch = watcher()
    train(with_options(overfit_batches=1), tmp_path, watch)
    assert watch.reading.noise.mean == watch.reading.curvature_noise.mean == 0.0
    train(with_options(overfit_batches=2), tmp_path, watch)
    assert watch.reading.noise.mean > 0.0


def test_accumulated_batches_are_one_batch(tmp_path):
    watch = watcher(every_n_steps=1)
    train(with_options(accumulate_grad_batches=3), tmp_path, watch)
    noise, of_curvature = watch.reading.noise, watch.reading.curvature_noise
    assert noise.batch_size == 12
    assert (noise.mean / of_curvature.mean) ** 2 == pytest.approx((1 / 12 - 1 / 24) / (1 / 4 - 1 / 24))


def test_a_step_takes_no_more_samples_than_there_are(tmp_path):
    """An epoch of 6 batches ends before 12 are accumulated."""
    watch = watcher(every_n_steps=1)
    train(with_options(accumulate_grad_batches=12), tmp_path, watch)
    assert watch.reading.noise.mean == 0.0
    assert watch.reading.noise.batch_size == 24
    assert watch.reading.curvature_noise.mean > 0.0


def test_what_is_logged_and_saved(tmp_path):
    watch = watcher()
    train(CASE, tmp_path, watch)
    reading = watch.reading
    got = scalars(reading)
    assert got["rmt/noise_scale"] == reading.noise.mean > 0
    assert got["rmt/noise_scale_stderr"] == reading.noise.stderr > 0
    assert got["rmt/noise_edge"] == noise_edge(reading.noise.mean)
    assert got["rmt/anisotropy"] == reading.noise.anisotropy
    damping = self_consistent_damping(reading.noise.mean, reading.spectrum, spectrum_noise=reading.curvature_noise.mean)
    assert got["rmt/local_law_damping"] == pytest.approx(damping)
    reading.save(tmp_path / "reading.npz")
    back = Reading.load(tmp_path / "reading.npz")
    assert back.noise == reading.noise
    assert back.curvature_noise == reading.curvature_noise


def test_four_products_and_two_evaluations_of_the_loss(tmp_path, monkeypatch):
    from lightning_rmt.curvature.hessian import Hessian

    taken, product = [], Hessian._matmat

    def counted(self, V):
        taken.append((self.samples, len(V)))
        return product(self, V)

    monkeypatch.setattr(Hessian, "_matmat", counted)
    counts = []
    for noise in (False, True):
        calls: list[int] = []
        taken.clear()

        def loss_fn(module, batch, calls=calls):
            calls.append(1)
            return F.cross_entropy(module(batch[0]), batch[1])

        watch = watcher(noise=noise, loss_fn=loss_fn, every_n_steps=100, lanczos_steps=20)
        train(CASE, tmp_path / str(noise), watch)
        counts.append((len(calls), sum(samples * k for samples, k in taken) / watch.reading.samples))
    assert counts[1][0] - counts[0][0] == 2
    assert counts[1][1] - counts[0][1] <= 4


def test_a_note_says_why_there_is_none(tmp_path):
    watch = watcher(product="finite_difference")
    train(CASE, tmp_path, watch)
    (said,) = (note for note in watch.reading.notes if "no noise scale" in note)
    assert "finite differences are too imprecise" in said
    assert watch.reading.noise is None


def test_a_loss_of_one_batch_size_says_that_it_was_given_half(tmp_path):
    def loss_fn(module, batch):
        return F.cross_entropy(module(batch[0].view(4, -1)), batch[1])

    for batches, words in ((1, "on half of the batch the loss fails; with batches=2"), (2, None)):
        watch = watcher(loss_fn=loss_fn, batches=batches)
        train(CASE, tmp_path / str(batches), watch)
        said = [note for note in watch.reading.notes if "no noise scale" in note]
        assert (watch.reading.noise is None) == bool(said) == (words is not None)
        assert words is None or words in said[0]


def test_a_single_sample_has_no_halves():
    from lightning_rmt.live.batches import CapturedBatch

    one = CapturedBatch((torch.ones(1, 3), torch.ones(1)), 0)
    with pytest.raises(live_noise.RefusedError, match="no halves"):
        live_noise._halves([one])
    assert live_noise._halves([one, one]) == ([one], [one])


def test_not_asked_for_or_not_of_gradients(tmp_path):
    for name, options in (("off", {"noise": False}), ("covariance", {"curvature": "gradient_covariance"})):
        watch = watcher(**options)
        train(CASE, tmp_path / name, watch)
        assert watch.reading.noise is None
        assert not any("noise" in tag for tag in scalars(watch.reading))


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    control = train(case, directory)
    watch = watcher()
    seen = {"differences": differences(train(case, directory, watch), control)}
    return {**seen, "noise": watch.reading.noise, "samples": watch.reading.samples}


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_ranks(tmp_path):
    one, two = on_two_ranks(on_this_rank, tmp_path, Case("ddp", Classifier, vectors, ddp()), tmp_path)
    assert one["differences"] == two["differences"] == []
    assert one["noise"] == two["noise"]
    assert one["noise"].batch_size == one["samples"]
    assert np.isfinite(one["noise"].mean)
