"""The script for Pennington and Bahri's paper at its small size, and its tools against known answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("sklearn")
PAPERS = str(Path(__file__).parents[2] / "examples" / "papers")


@pytest.fixture(autouse=True)
def _papers(monkeypatch):
    monkeypatch.syspath_prepend(PAPERS)


def gaussian(count, n, samples, seed=0):
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, n, samples, generator=random, dtype=torch.float64) for _ in range(2))


def test_matrices_of_all_networks_are_each_networks_own():
    from geometry_networks import Networks

    x, y = gaussian(3, 4, 10)
    networks = Networks((x, y), 5, torch.tanh, seed=1)
    H, H0 = networks.dense(networks.hessian((x, y))), networks.dense(networks.gauss_newton((x, y)))
    for r in range(3):

        def outputs(w, r=r):
            return w[20:].reshape(4, 5) @ torch.tanh(w[:20].reshape(5, 4) @ x[r])

        w = networks.weights()[r]
        own = torch.autograd.functional.hessian(lambda w, r=r: (outputs(w) - y[r]).square().sum() / 20, w)
        J = torch.autograd.functional.jacobian(outputs, w).reshape(-1, 40)
        np.testing.assert_allclose(H[r], own, atol=1e-12)
        np.testing.assert_allclose(H0[r], J.T @ J / 10, atol=1e-12)


def test_critical_points_of_linear_networks_have_the_known_energies():
    from geometry_energies import saddle_energies
    from geometry_networks import Networks, find_critical_points

    data = gaussian(4, 2, 8, seed=2)
    found = find_critical_points(Networks(data, 2, lambda z: z, seed=3), data, outer=40, inner=20)
    known = saddle_energies(data)
    # by hand: the least-squares residual is the lowest of the four, the mean square of the targets the highest
    x, y = (part[0].numpy() for part in data)
    left = y - y @ np.linalg.pinv(x) @ x
    np.testing.assert_allclose([known[0].min(), known[0].max()], [np.square(v).mean() / 2 for v in (left, y)])
    assert (found.gradients < 1e-20).all()
    np.testing.assert_allclose(np.abs(found.energies[:, None] - known).min(axis=1), 0, atol=1e-12)
    assert (found.energies > known.min(axis=1) + 1e-3).any()  # the search isn't one for minima
    saddle = found.energies > known.min(axis=1) + 1e-6
    assert (found.index[saddle] > 0).all()


def test_snapshots_are_taken_at_their_level():
    from geometry_networks import Networks, train

    data = gaussian(4, 4, 16)
    networks = Networks(data, 4, torch.tanh, seed=5, levels=torch.tensor([0.45, 0.4, 0.35, -1.0], dtype=torch.float64))
    assert train(networks, data, 120, watch=False) is None
    last = networks.energies(data)
    kept, _ = networks.subset(data, slice(None))
    energies = kept.energies(data)
    assert networks.passed.tolist() == [True, True, True, False]
    assert (energies[:3] <= [0.45, 0.4, 0.35]).all()
    assert (energies[:3] > np.array([0.45, 0.4, 0.35]) - 0.05).all()
    assert energies[3] == last[3]


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_index_fit_finds_exponent_and_threshold(exponent):
    from geometry_index import fit_index

    random = np.random.default_rng(6)
    energies = np.linspace(0.21, 0.5, 60)
    index = 0.6 * (energies - 0.2) ** exponent + 0.002 * random.standard_normal(60)
    fitted = fit_index(energies, index, repeats=40)
    assert fitted.window[1] <= 0.15
    assert abs(fitted.exponent - exponent) < max(3 * fitted.exponent_error, 0.05) < 0.5
    assert abs(fitted.free_critical - 0.2) < max(3 * fitted.free_error, 0.01) < 0.1
    assert (abs(fitted.critical - 0.2) < 0.01) == (exponent == 1.5)


def test_index_bounds_hold_the_share_of_a_start_vector():
    from geometry_index import index_bounds

    random = np.random.default_rng(7)
    levels, start = random.standard_normal(200) + 0.5, random.standard_normal(200) ** 2
    start /= start.sum()
    # Gauss quadrature of six nodes from the moments' Jacobi matrix (Lanczos in the eigenbasis)
    q, T = [np.sqrt(start)], np.zeros((6, 6))
    for k in range(6):
        w = levels * q[k]
        T[k, k] = q[k] @ w
        w -= sum((v @ w) * v for v in q)
        w -= sum((v @ w) * v for v in q)
        if k < 5:
            T[k, k + 1] = T[k + 1, k] = np.linalg.norm(w)
            q.append(w / np.linalg.norm(w))
    nodes, vectors = np.linalg.eigh(T)
    low, high = index_bounds(nodes[None], vectors[:1] ** 2)
    assert low < start[levels < 0].sum() < high
    assert 0 < low < high < 1


@pytest.mark.slow
def test_the_script_holds_at_its_small_size(tmp_path, capsys):
    import geometry_of_loss_surfaces as paper

    threads = torch.get_num_threads()
    try:
        assert paper.main(["--quick", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    page = (tmp_path / "geometry_of_loss_surfaces.md").read_text()
    assert "FAILS" not in page
    assert page.count("does not reproduce") >= 4
    assert len(list(tmp_path.glob("*.png"))) == 6
    assert "all hold" in capsys.readouterr().out


def test_a_wrong_table_fails(tmp_path, monkeypatch):
    import geometry_laws
    from claims import Claims

    claims = Claims("wrong", "t", "r", "a", ["--out", str(tmp_path)])
    critical, alpha0, ratios, slope = geometry_laws.THRESHOLDS[1 / 4]
    monkeypatch.setattr(geometry_laws, "THRESHOLDS", {1 / 4: (critical, alpha0 * 1.001, ratios, slope)})
    geometry_laws.threshold(claims)
    assert claims.finish() == 1
