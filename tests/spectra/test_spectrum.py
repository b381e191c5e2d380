"""The `Spectrum` as a whole: what it holds, how it is saved, what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from known_spectra import NOISE, hessian_like, lanczos_of, power_law, semicircle, spectrum_of

from lightning_rmt.krylov.tridiagonal import Tridiagonal
from lightning_rmt.spectra.spectrum import FORMAT_VERSION, Spectrum

EIGENVALUES = hessian_like(1000, np.random.default_rng(0))


@pytest.fixture(scope="module")
def spectrum():
    runs = (lanczos_of(EIGENVALUES, 60, 0), lanczos_of(EIGENVALUES, 40, 1, reorthogonalise=False))
    return Spectrum(runs, 1000, 100, NOISE)


def everything(s):
    """All that a spectrum says, flattened."""
    x = np.linspace(-1, 60, 20)
    found = [s.nodes, s.weights, s.trace, s.frobenius, s.lambda_max, s.lambda_min, *s.top, *s.bottom, s.bulk_edges]
    for side in (s.outliers.high, s.outliers.low):
        found += [getattr(side, field.name) for field in dataclasses.fields(side)]
    found += [s.zero_mass, s.zero_width, s.zero_mass_bounds, s.negative_mass, s.negative_mass_bounds, s.atoms]
    found += [s.negative_mass_stderr]
    found += [s.density(x), s.density_band(x), s.cdf(x), s.cdf_band(x), s.quantile(0.9), s.quantile_bounds(0.9)]
    return [*found, s.moment(3), s.free_cumulants()]


def test_saved_and_loaded_it_says_the_same(spectrum, tmp_path):
    path = tmp_path / "spectrum.npz"
    spectrum.save(path)
    again = Spectrum.load(path)
    assert (again.size, again.products, again.noise) == (1000, 100, NOISE)
    assert [run.reorthogonalised for run in again.runs] == [True, False]
    for mine, theirs in zip(everything(again), everything(spectrum), strict=True):
        np.testing.assert_equal(mine, theirs)  # bit by bit: all is derived from the same coefficients


def test_the_path_is_taken_as_it_is(spectrum, tmp_path):
    spectrum.save(tmp_path / "no_suffix")
    assert (tmp_path / "no_suffix").exists()
    assert Spectrum.load(str(tmp_path / "no_suffix")).size == 1000


def test_only_the_measurement_is_saved(spectrum):
    assert set(spectrum.to_arrays()) == {
        "spectrum_format",
        "size",
        "products",
        "noise",
        "steps",
        "reorthogonalised",
        "alpha",
        "beta",
    }
    assert all(array.dtype != object for array in spectrum.to_arrays().values())


def test_members_that_are_not_ours_are_ignored(spectrum, tmp_path):
    path = tmp_path / "reading.npz"
    np.savez(path, step=np.array(7), loss=np.zeros(3), **spectrum.to_arrays())
    assert Spectrum.load(path).trace == spectrum.trace


def test_a_pickle_in_the_archive_is_never_opened(spectrum, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "bomb.npz"
    np.savez(path, **{**spectrum.to_arrays(), "alpha": np.array([Bomb()], dtype=object)})
    with pytest.raises(ValueError, match="not a saved spectrum"):
        Spectrum.load(path)


class TestDamagedFiles:
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Spectrum.load(tmp_path / "missing.npz")

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
    def test_cut_short(self, spectrum, tmp_path, share):
        path = tmp_path / "spectrum.npz"
        spectrum.save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="not a saved spectrum"):
            Spectrum.load(path)

    def test_flipped_bytes(self, spectrum, tmp_path):
        path = tmp_path / "spectrum.npz"
        spectrum.save(path)
        content = bytearray(path.read_bytes())
        for position in range(40, len(content), 97):
            damaged = content.copy()
            damaged[position] ^= 0xFF
            path.write_bytes(damaged)
            try:
                loaded = Spectrum.load(path)
            except ValueError:
                continue
            # What isn't noticed isn't in the data: zip metadata such as time stamps.
            assert loaded.trace == spectrum.trace

    def test_something_else(self, tmp_path):
        path = tmp_path / "text.npz"
        path.write_text("not an archive")
        with pytest.raises(ValueError, match="not a saved spectrum"):
            Spectrum.load(path)
        np.savez(path, weights=np.ones(3))
        with pytest.raises(ValueError, match="spectrum_format"):
            Spectrum.load(path)
        with open(path, "wb") as file:
            np.save(file, np.ones(3))
        with pytest.raises(ValueError, match=r"not an \.npz archive"):
            Spectrum.load(path)

    def test_a_newer_format(self, spectrum):
        arrays = {**spectrum.to_arrays(), "spectrum_format": np.array(FORMAT_VERSION + 1)}
        with pytest.raises(ValueError, match="newer"):
            Spectrum.from_arrays(arrays)

    @pytest.mark.parametrize("member", ["size", "products", "noise", "steps", "reorthogonalised", "alpha", "beta"])
    def test_a_member_is_missing(self, spectrum, member):
        arrays = spectrum.to_arrays()
        del arrays[member]
        with pytest.raises(ValueError, match=f"damaged.*{member}"):
            Spectrum.from_arrays(arrays)

    @pytest.mark.parametrize(
        ("member", "value"),
        [
            ("alpha", np.zeros(3)),
            ("steps", np.array([60, 41])),
            ("steps", np.array([160, -60])),
            ("reorthogonalised", np.array([True])),
            ("beta", np.full(100, np.nan)),
            ("size", np.array([1, 2])),
            ("noise", np.array("much")),
        ],
    )
    def test_members_that_do_not_fit(self, spectrum, member, value):
        with pytest.raises(ValueError, match=r".+"):
            Spectrum.from_arrays({**spectrum.to_arrays(), member: value})


def test_nodes_and_weights_of_runs_of_different_length(spectrum):
    assert spectrum.nodes.shape == spectrum.weights.shape == (2, 60)
    assert (spectrum.nodes[1, 40:] == spectrum.nodes[1, 39]).all()
    assert (spectrum.weights[1, 40:] == 0).all()
    assert spectrum.weights.sum(axis=1) == pytest.approx([1, 1])
    assert (np.diff(spectrum.nodes, axis=1) >= 0).all()


def test_levels_come_from_the_first_reorthogonalised_run(spectrum):
    swapped = Spectrum(spectrum.runs[::-1], 1000, 100, NOISE)
    assert swapped.top == spectrum.top
    assert swapped.trace.mean == pytest.approx(spectrum.trace.mean)


def test_what_it_refuses():
    run = lanczos_of(semicircle(100), 10)
    with pytest.raises(ValueError, match="at least one"):
        Spectrum((), 100, 0, NOISE)
    with pytest.raises(ValueError, match="size"):
        Spectrum((run,), 0, 10, NOISE)
    for noise in (-1.0, 0.3, np.nan):
        with pytest.raises(ValueError, match="noise"):
            Spectrum((run,), 100, 10, noise)
    with pytest.raises(ValueError, match="not finite"):
        Tridiagonal(np.array([np.nan]), np.array([0.0]))


def test_it_is_frozen_and_takes_any_sequence_of_runs():
    spectrum = Spectrum([lanczos_of(semicircle(100), 10)], 100, 10, NOISE)  # type: ignore[arg-type]
    assert isinstance(spectrum.runs, tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectrum.size = 3


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        semicircle(50),
        power_law(50, 1.0),
        -power_law(50, 1.0),
        np.zeros(50),
        np.ones(50),
        np.array([2.0]),
        np.array([-1.0, 1.0]),
    ],
)
def test_very_short_runs_answer_everything(eigenvalues, steps):
    spectrum = spectrum_of(eigenvalues, steps, probes=2)
    for probe_set in (spectrum, Spectrum(spectrum.runs[:1], spectrum.size, steps, NOISE)):
        x = np.linspace(-3, 3, 7)
        lower, upper = probe_set.cdf_band(x)
        assert ((lower >= 0) & (lower <= upper) & (upper <= 1)).all()
        assert np.isfinite(probe_set.density(x)).all()
        assert np.isfinite([*probe_set.density_band(x)]).all()
        assert probe_set.cdf(10.0) == pytest.approx(1)
        assert probe_set.cdf(-10.0) == 0
        assert np.isfinite(probe_set.quantile(0.5))
        low, high = probe_set.quantile_bounds(0.5)
        assert low <= high
        assert 0 <= probe_set.zero_mass <= 1
        assert 0 <= probe_set.negative_mass <= 1
        assert np.isfinite([probe_set.trace.mean, probe_set.trace.stderr, probe_set.frobenius.stderr]).all()
        assert probe_set.outliers.high.verdict
        assert probe_set.lambda_max.value >= probe_set.lambda_min.value
        probe_set.free_cumulants()


def test_importing_it_needs_no_torch():
    code = "import sys, lightning_rmt.spectra.spectrum; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
