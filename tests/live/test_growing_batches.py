"""The outlier map under a Trainer: eigenvalues of parts of the batches, a law that was put in, words where there is none."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from harness import Case, differences, train
from level_modules import CASE, monitor, spied
from live_models import Classifier, Metered, cnn, images, vectors
from several_ranks import on_two_ranks
from test_bitwise_distributed import ddp
from test_curvature_noise import dense
from torch.utils.data import DataLoader, TensorDataset

from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.live import batch_law as live_law
from lightning_rmt.live import measurement
from lightning_rmt.live.batch_law import GROUPS, MOST_SIZES, SAMPLES_FOR_MOST, Turns, most_products
from lightning_rmt.live.batches import CapturedBatch
from lightning_rmt.live.namespaces import MisconfigurationException
from lightning_rmt.live.ranks import RefusedError
from lightning_rmt.reading import Reading
from lightning_rmt.report.scalars import refusals, scalars


def many() -> DataLoader:
    return vectors(16)


class Small(Classifier):
    def __init__(self) -> None:
        super().__init__(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)))


LARGER = Case("small, 16 samples a batch", Small, many)


def watcher(**options: Any) -> Any:
    return monitor(**{"levels": None, "lanczos_steps": 60, "noise": False, "batch_law_every": 1, **options})


# --- which samples ------------------------------------------------------------------------------------------------------


def captured(*sizes: int) -> list[CapturedBatch]:
    """Batches of these sizes; every sample is another number."""
    numbers = torch.arange(sum(sizes)).split(list(sizes))
    return [CapturedBatch((part,), i) for i, part in enumerate(numbers)]


def samples_of(part: Any) -> list[int]:
    return [int(x) for one in part.captured for x in one.batch[0]]


@pytest.mark.parametrize("sizes", [(16,), (8, 8), (64,), (40, 40, 7), (4,) * 16, (3,) * 40, (70, 70)])
def test_groups_share_no_samples_and_hold_their_halves(sizes):
    parts = live_law._nested(captured(*sizes), int)
    halvings = max(part.halvings for part in parts)
    assert halvings == (MOST_SIZES if sum(sizes) >= SAMPLES_FOR_MOST else 3) - 1
    assert Counter((part.group, part.halvings) for part in parts) == {
        (group, step): 2**step for group in range(GROUPS) for step in range(halvings + 1)
    }
    whole = {part.group: samples_of(part) for part in parts if part.halvings == 0}
    used = [x for own in whole.values() for x in own]
    assert len(used) == len(set(used)) > sum(sizes) / 2
    for part in parts:
        assert len(samples_of(part)) == len(whole[0]) / 2**part.halvings
    for group, own in whole.items():
        for step in range(1, halvings + 1):
            halves = [samples_of(part) for part in parts if (part.group, part.halvings) == (group, step)]
            assert [x for half in halves for x in half] == own


def test_batches_that_fit_are_not_cut():
    whole = captured(*(3,) * 16)
    smallest = [part for part in live_law._nested(whole, int) if part.halvings == 2]
    assert all(part.captured[0].batch is one.batch for part, one in zip(smallest, whole, strict=True))


def test_ranks_take_as_many_samples_as_the_poorest():
    answers = iter([16, 1 + 1, 1])  # samples, the size of a part (plus 1), parts of it
    parts = live_law._nested(captured(48), lambda mine: min(mine, next(answers)))
    assert {len(samples_of(part)) for part in parts} == {4, 2, 1}


@pytest.mark.parametrize("sizes", [(15,), (1,) * 15])
def test_too_few_samples(sizes):
    with pytest.raises(RefusedError, match="16 parts of one size can't be cut from 15 samples a rank"):
        live_law._nested(captured(*sizes), int)


# --- what is measured ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A monitor, a spy, the directory, and the samples that each product of the last fit was with."""
    directory, taken = tmp_path_factory.mktemp("law"), []
    watch = watcher(batches=2, every_n_steps=100, noise=True)
    with pytest.MonkeyPatch.context() as patch:
        product, fit = Hessian._matmat, measurement.measure_batch_law

        def counted(self: Hessian, V: torch.Tensor) -> torch.Tensor:
            taken.append(self.samples * len(V))
            return product(self, V)

        def fitted(*arguments: Any, **options: Any) -> Any:
            taken.clear()
            patch.setattr(Hessian, "_matmat", counted)
            found = fit(*arguments, **options)
            patch.setattr(Hessian, "_matmat", product)
            return found

        patch.setattr(measurement, "measure_batch_law", fitted)
        return watch, spied(directory, watch, LARGER), directory, taken


def test_against_dense_hessians_of_parts_of_the_batches(measured):
    watch, spy, _, _ = measured
    reading = watch.reading
    law, step = reading.batch_law, reading.step
    twin = copy.deepcopy(Small()).double()
    twin.load_state_dict(spy.states[step])
    x, y = (torch.cat(column) for column in zip(*spy.batches[step - 1 : step + 1], strict=True))
    assert len(y) == reading.samples
    unit = int(law.batch_sizes.min())
    group = torch.arange(len(y))[: 4 * unit]  # of the first group: it whole, its halves, its quarters
    chosen = [part for parts in (1, 2, 4) for part in group.chunk(parts)]
    for row, part in enumerate(chosen):
        exact = torch.linalg.eigvalsh(dense(twin, (x[part], y[part]))).flip(0)[: law.eigenvalues.shape[1]]
        np.testing.assert_allclose(law.eigenvalues[row], exact.numpy(), rtol=1e-4)
        assert law.batch_sizes[row] == len(part)
    assert law.groups[: len(chosen)].tolist() == [0] * len(chosen)
    assert law.dataset_size == 96
    assert law.sample_noise.mean == pytest.approx(reading.noise.mean / (1 / 16 - 1 / 96) ** 0.5)


def test_what_is_logged_and_saved(measured, tmp_path):
    watch, _, directory, _ = measured
    reading = watch.reading
    got = scalars(reading)
    for i, fit in enumerate(reading.batch_law.fits, start=1):
        assert got[f"rmt/batch_law/{i}/theta"] == fit.theta[0].mean
        assert got[f"rmt/batch_law/{i}/r_squared_stderr"] == fit.r_squared_stderr
        assert got[f"rmt/batch_law/{i}/anisotropy_stderr"] == fit.anisotropy.stderr > 0
    (path,) = directory.rglob(f"step_{reading.step:08d}.npz")
    back = Reading.load(path)
    assert back.batch_law.fits == reading.batch_law.fits
    assert scalars(back) == got


class Known(pl.LightningModule):
    """A quadratic loss whose matrix is the mean of the batch's own: two outliers with GOE(sigma) noise on every sample's."""

    size, theta, sigma, count = 80, (9.0, 6.0), 12.0, 480

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(self.size))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.5 * torch.einsum("i,bij,j->b", self.x, batch[0], self.x).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)

    @classmethod
    def matrices(cls) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(cls.count, cls.size, cls.size, generator=generator)
        truth = torch.diag(torch.tensor([*cls.theta, *[0.0] * (cls.size - 2)]))
        return truth + cls.sigma * (noise + noise.transpose(1, 2)) / (2 * cls.size) ** 0.5


def test_a_law_that_was_put_in(tmp_path, monkeypatch):
    """Of GOE noise: theta is the whole data set's, alpha the variance that was put in, so that the anisotropy is 1."""
    monkeypatch.setattr(live_law, "SAMPLES_FOR_MOST", 1000)  # three sizes take half the time
    data = Known.matrices()
    case = Case("known", Known, lambda: DataLoader(TensorDataset(data), batch_size=240))
    watch = watcher(every_n_steps=100, batches=2, noise=True, lanczos_steps=40)
    train(case, tmp_path, watch)
    law = watch.reading.batch_law
    assert np.unique(law.batch_sizes).tolist() == [30, 60, 120]
    assert law.dataset_size == 480
    exact = torch.linalg.eigvalsh(data.mean(0).double()).flip(0)[:2].numpy()
    for fit, theta in zip(law.fits[:2], exact, strict=False):
        assert abs(fit.theta[0].mean - theta) < 3 * fit.theta[0].stderr + 0.02 * theta
        assert fit.alpha.mean == pytest.approx(Known.sigma**2, rel=0.2)
        assert fit.anisotropy.mean == pytest.approx(1, abs=0.25)
        assert fit.exponent.mean == pytest.approx(0.5, abs=0.15)
        assert fit.r_squared > 0.97


def test_its_products_are_what_is_said(measured):
    watch, _, _, taken = measured
    law = watch.reading.batch_law
    whole = law.batch_sizes[law.batch_sizes == law.batch_sizes.max()].sum()
    assert law.products == pytest.approx(sum(taken) / whole)
    assert law.products <= most_products(watch._settings)


def test_it_comes_at_every_so_many_full_probes(tmp_path):
    watch = watcher(batches=3, every_n_steps=4, light_every_n_steps=None, batch_law_every=2, lanczos_steps=4)
    seen = []
    take = watch._take
    watch._take = lambda *arguments: seen.append((watch._settings.batch_law, take(*arguments)))
    train(CASE, tmp_path, watch)
    assert [law for law, _ in seen] == [True, False, True][: len(seen)]
    assert len(seen) > 1


def test_a_schedule_expects_its_share_of_a_fit():
    turns = Turns(4)
    assert [turns.due(probes) for probes in range(6)] == [True, False, False, False, True, False]
    assert turns.on_average(3.0, 2.0) == 1.0 + 2.0 / 4
    assert turns.on_average(1.2, 0.0) == 1.2 + 2.0 / 4
    assert Turns(None).on_average(3.0, 0.0) == 3.0
    assert not Turns(None).due(0)


@pytest.mark.parametrize(
    "case",
    [
        Case("dropout, torchmetrics", Metered, many),
        Case("batch norm", lambda: Classifier(cnn()), lambda: images(32)),  # of single samples there is no variance
    ],
    ids=str,
)
def test_training_is_the_same(case, tmp_path, monkeypatch):
    monkeypatch.setattr(live_law, "MOST_STEPS", 4)
    ran: list[int] = []
    largest = live_law._largest
    monkeypatch.setattr(live_law, "_largest", lambda *arguments: ran.append(1) or largest(*arguments))
    watch = watcher(every_n_steps=100)
    assert differences(train(case, tmp_path, watch), train(case, tmp_path)) == []
    assert len(ran) == 28


# --- where there is none --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": 1}, "16 parts of one size can't be cut from 4 samples a rank"),
        ({"batches": 4, "lanczos_steps": 3}, "isn't certified"),
    ],
)
def test_a_note_says_why(options, words, tmp_path):
    watch = watcher(**options)
    train(CASE, tmp_path, watch)
    (said,) = (note for note in watch.reading.notes if "no outlier law" in note)
    assert words in said or "no positive eigenvalue is certified" in said
    assert watch.reading.batch_law is None
    assert not any("batch_law" in tag for tag in {**scalars(watch.reading), **refusals(watch.reading)})


@pytest.mark.parametrize(
    "options", [{"curvature": "gradient_covariance"}, {"product": "finite_difference"}], ids=lambda o: next(iter(o))
)
def test_what_can_never_be_had_is_refused_before_the_first_step(options, tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_law_every"):
        train(CASE, tmp_path, watcher(**options))


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_bad_values(every):
    with pytest.raises(ValueError, match="batch_law_every must be an integer of at least 1"):
        watcher(batch_law_every=every)


# --- two ranks ------------------------------------------------------------------------------------------------------------


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def on_this_rank(case: Case, directory: Path) -> dict[str, Any]:
    """A law, and then one rank that runs out of memory for one of its batches, or in one of its products."""
    live_law.MOST_OUTLIERS = 1  # takes half the products
    control = train(case, directory)
    watch = watcher(every_n_steps=100)
    seen: dict[str, Any] = {"differences": [differences(train(case, directory, watch), control)], "notes": []}
    law = watch.reading.batch_law
    seen |= {"law": None if law is None else law.to_dict(), "said": watch.reading.notes}
    for owner, name, number in (
        (live_law, "build_operator", 3),
        (Hessian, "_matmat", 9),
    ):
        original, calls = getattr(owner, name), iter(range(1, 10**6))
        fit = measurement.measure_batch_law

        def sometimes(*arguments: Any, original=original, calls=calls, number=number, **options: Any) -> Any:
            return (no_memory if next(calls) == number else original)(*arguments, **options)

        def fitted(*arguments: Any, owner=owner, name=name, sometimes=sometimes, fit=fit, **options: Any) -> Any:
            if int(os.environ["LOCAL_RANK"]) == 1:
                setattr(owner, name, sometimes)
            return fit(*arguments, **options)

        measurement.measure_batch_law = fitted
        watch = watcher(every_n_steps=100)
        seen["differences"].append(differences(train(case, directory, watch), control))
        seen["notes"].append([note for note in watch.reading.notes if "no outlier law" in note])
        setattr(owner, name, original)
        measurement.measure_batch_law = fit
    return seen


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_on_two_ranks(tmp_path):
    one, two = on_two_ranks(on_this_rank, tmp_path, Case("ddp", Small, many, ddp()), tmp_path)
    assert one["differences"] == two["differences"] == [[]] * 3
    assert one["law"] == two["law"]
    assert one["law"] is not None, one["said"]
    assert sorted(set(one["law"]["batch_sizes"])) == [2, 4, 8]
    assert two["notes"] == [["no outlier law: memory ran out"]] * 2
    for (said,) in one["notes"]:
        assert "no outlier law: it failed on rank 1 (" in said
