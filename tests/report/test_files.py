from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_rmt.reading import Reading
from lightning_rmt.report.files import load_run, reading_path, save_reading


def test_a_reading_comes_back(exact, tmp_path):
    path = save_reading(replace(exact, step=42, notes=("a note",)), tmp_path)
    assert path == tmp_path / "rmt" / "step_00000042.npz"
    (read,) = load_run(tmp_path)["rmt"]
    assert (read.step, read.notes, read.parameters, read.learning_rate) == (42, ("a note",), ("weight",), 0.1)
    assert np.array_equal(read.spectrum.nodes, exact.spectrum.nodes)


def test_what_is_known_of_the_product_comes_back_and_may_be_missing(exact, tmp_path):
    path = save_reading(replace(exact, product="finite_difference", product_error=2e-3), tmp_path)
    read = Reading.load(path)
    assert (read.product, read.product_error) == ("finite_difference", 2e-3)
    with np.load(path) as archive:
        arrays = dict(archive)
    meta = json.loads(str(arrays["reading"]))
    del meta["product"], meta["product_error"]  # as older versions wrote it
    np.savez(path, **{**arrays, "reading": np.array(json.dumps(meta))})
    old = Reading.load(path)
    assert (old.product, old.product_error, old.step) == ("exact", None, read.step)


def test_steps_are_sorted_as_numbers_and_monitors_kept_apart(exact, tmp_path):
    for name, step in (("rmt", 100_000_000), ("rmt", 99_999_999), ("rmt", 5), ("ggn", 7)):
        save_reading(replace(exact, name=name, step=step), tmp_path / "lightning_logs" / "version_0")
    run = load_run(tmp_path)
    assert {name: [r.step for r in readings] for name, readings in run.items()} == {
        "rmt": [5, 99_999_999, 100_000_000],
        "ggn": [7],
    }


def test_one_name_in_two_versions_is_told_apart_by_folder(exact, tmp_path):
    for version in ("version_0", "version_1"):
        save_reading(exact, tmp_path / version)
    save_reading(replace(exact, name="other"), tmp_path / "version_1")
    assert set(load_run(tmp_path)) == {"version_0/rmt", "version_1/rmt", "other"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(exact, tmp_path, monkeypatch):
    path = save_reading(exact, tmp_path)
    before = path.read_bytes()

    def half(self, target):
        target.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Reading, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_reading(exact, tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_later_reading_of_a_step_replaces_the_earlier(exact, tmp_path):
    save_reading(exact, tmp_path)
    save_reading(replace(exact, seconds=9.0), tmp_path)
    (read,) = load_run(tmp_path)["rmt"]
    assert read.seconds == 9.0


def archive(**members):
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    return buffer.getvalue()


DAMAGE = {
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "something else": lambda raw: b"not a zip file",
    "an archive of other things": lambda raw: archive(reading=np.array("{}"), spectrum_format=np.array(1)),
    "overwritten": lambda raw: raw[:200] + b"\0" * 200 + raw[400:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_skipped(exact, tmp_path, damage):
    save_reading(exact, tmp_path)
    bad = save_reading(replace(exact, step=121), tmp_path)
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.warns(UserWarning, match="step_00000121.npz"):
        run = load_run(tmp_path)
    assert [reading.step for reading in run["rmt"]] == [120]


def test_only_damaged_files_is_an_empty_run(tmp_path):
    (tmp_path / "step_00000001.npz").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="step_00000001"):
        assert load_run(tmp_path) == {}


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_run(tmp_path / "nowhere")


def test_names_make_folders_but_stay_inside(tmp_path):
    assert reading_path(tmp_path, "net/encoder", 3) == tmp_path / "net" / "encoder" / "step_00000003.npz"
    for name in ("../up", "/etc", "", "a/../../b"):
        with pytest.raises(ValueError, match="name"):
            reading_path(tmp_path, name, 3)
