"""What training loops do to an optimizer: schedulers, scalers, groups, frozen parameters, late groups, bad batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preconditioner_cases import (
    BASES,
    Matrix,
    batch,
    flat,
    loss_of,
    network,
    preconditioned,
    quadratic,
    same_weights,
    spiked,
    train,
    weights,
)

from lightning_rmt.curvature.hessian import Hessian
from lightning_rmt.krylov.eigenpairs import EigenPairs, top_eigenpairs
from lightning_rmt.optim.progress import Progress
from lightning_rmt.optim.spectral_preconditioner import SpectralPreconditioner
from lightning_rmt.probe import estimate_spectrum
from lightning_rmt.reading import Reading
from lightning_rmt.spectra.spectrum import Spectrum


def refreshed(model, optimizer, seed=1000):
    return optimizer.refresh(Hessian(loss_of(model), model.named_parameters(), [batch(seed)]))


def test_schedulers_change_the_bases_rate():
    model = network()
    base = BASES["sgd"](model.parameters(), lr=0.1)
    optimizer = preconditioned(base)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    refreshed(model, optimizer)
    for expected in (0.1, 0.05, 0.025):
        assert base.param_groups[0]["lr"] == expected
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
            base.state.clear()
        optimizer.step()
        length = float((weights(model) - before).norm())
        assert length < expected * np.sqrt(before.numel())
        assert length > 0.3 * expected * np.sqrt(before.numel())
        scheduler.step()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)  # cycles the momentum too
    assert base.param_groups[0]["momentum"] == 0.95


def test_with_a_gradient_scaler_it_is_the_unscaled_run():
    first, second = network(), network()
    optimizers = [preconditioned(BASES["adamw"](model.parameters())) for model in (first, second)]
    train(first, optimizers[0], 10, refresh_at=(3,))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(10):
        if step == 3:
            refreshed(second, optimizers[1], 1003)
            assert optimizers[1].active
        optimizers[1].zero_grad()
        scaler.scale(loss_of(second)(batch(step))).backward()
        scaler.step(optimizers[1])
        scaler.update()
    assert same_weights(first, second)
    next(second.parameters()).grad.fill_(torch.inf)
    before, steps = weights(second), optimizers[1].steps
    scaler.scale(torch.zeros(()))
    scaler.step(optimizers[1])
    assert torch.equal(before, weights(second))
    assert optimizers[1].steps == steps


def test_decoupled_decay_isnt_shrunk():
    model = network()
    optimizer = preconditioned(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    train(model, optimizer, 1)
    optimizer.refresh(Hessian(loss_of(model), model.named_parameters(), [batch(0)]))
    assert optimizer.active
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["exp_avg"].zero_()
    before = weights(model)
    optimizer.step()
    torch.testing.assert_close(weights(model), before * (1 - 0.1 * 0.5), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("said", [True, None])
def test_decay_of_an_optimizer_from_elsewhere_has_to_be_said(said):
    class Decaying(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])

    matrix = spiked(200)[0]
    parameters, backward = quadratic(matrix, (200,))
    optimizer = SpectralPreconditioner(Decaying(parameters, lr=0.1, weight_decay=0.5), decoupled_weight_decay=said)
    optimizer.refresh(Matrix(matrix))
    assert optimizer.active
    backward()
    before = flat(parameters)
    optimizer.step()
    assert torch.allclose(flat(parameters), before * 0.95, rtol=0, atol=1e-12) == (said is True)


@pytest.mark.parametrize("base", BASES)
def test_frozen_and_unused_parameters_dont_move(base):
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = preconditioned(BASES[base](model.parameters()))
    train(model, optimizer, 3)
    refreshed(model, optimizer)
    assert optimizer.active
    model[0].weight.requires_grad_(False)  # frozen after the basis was measured
    frozen = [model[0].weight.clone(), model[0].bias.clone()]
    moving = model[2].weight.clone()
    train(model, optimizer, 3, start=3)
    assert torch.equal(model[0].weight, frozen[0])
    assert torch.equal(model[0].bias, frozen[1])
    assert not torch.equal(model[2].weight, moving)


def test_an_operator_on_some_parameters_leaves_the_others_to_the_base():
    first, second = network(), network()
    optimizer = preconditioned(BASES["sgd"](second.parameters()))
    train(first, BASES["sgd"](first.parameters()), 1)
    optimizer.refresh(Hessian(loss_of(second), [("out", second[2].weight)], [batch(0)]))
    assert optimizer.active
    train(second, optimizer, 1)
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[2].bias, second[2].bias)
    assert not torch.equal(first[2].weight, second[2].weight)


def test_the_operators_order_of_parameters_is_followed():
    first, second = network(), network()
    for model, order in ((first, 1), (second, -1)):
        optimizer = preconditioned(BASES["sgd"](model.parameters()))
        optimizer.refresh(Hessian(loss_of(model), list(model.parameters())[::order], [batch(0)]), steps=100)
        train(model, optimizer, 1)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=1e-5)
    plain = network()
    train(plain, BASES["sgd"](plain.parameters()), 1)
    assert (weights(plain) - weights(first)).abs().max() > 1e-3  # the tolerance above tells them apart


def test_an_operator_on_more_parameters_is_cut_to_the_optimizers():
    """As with two optimizers for one model, or with frozen parameters that only the operator lists."""
    found = []
    for own_only in (True, False):
        model = network()
        optimizer = preconditioned(BASES["sgd"](model[2].parameters()))
        parameters = (model[2] if own_only else model).named_parameters()
        found.append(optimizer.refresh(Hessian(loss_of(model), parameters, [batch(0)]), steps=50).curvature)
        assert optimizer.active
        train(model, optimizer, 2)
        optimizer.load_state_dict(optimizer.state_dict())  # the vectors that it saves run over its own parameters
        train(model, optimizer, 2)
        found.append(weights(model).numpy())
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[3], found[1], atol=1e-4)
    pairs = top_eigenpairs(Hessian(loss_of(model), model.named_parameters(), [batch(0)]), 5)
    spectrum = Spectrum((pairs.run,), pairs.vectors.shape[1], 20, 1e-6)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is in the eigenvectors but not in this optimizer"):
        optimizer.update(spectrum, pairs, parameters=model.named_parameters())


def test_a_group_added_later_takes_the_bases_steps():
    model = network()
    optimizer = preconditioned(BASES["sgd"](model[0].parameters()))
    optimizer.refresh(Hessian(loss_of(model), model[0].parameters(), [batch(0)]))
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.01})
    assert len(optimizer.base.param_groups) == 2
    assert optimizer.param_groups is optimizer.base.param_groups
    before = model[2].weight.clone()
    train(model, optimizer, 1)
    torch.testing.assert_close(model[2].weight, before - 0.01 * model[2].weight.grad)


def test_a_gradient_that_isnt_finite_spoils_its_own_parameter_only():
    model = network()
    optimizer = preconditioned(BASES["sgd"](model.parameters()))
    refreshed(model, optimizer)
    assert optimizer.active
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].bias.grad[0] = torch.nan
    optimizer.step()
    assert int(weights(model).isfinite().logical_not().sum()) == 1


def turned(matrix, seed):
    rotation = torch.linalg.qr(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed)).to(matrix))[0]
    return rotation @ matrix @ rotation.T


def test_directions_that_turned_away_are_left_alone_until_the_next_refresh():
    matrix = spiked(200)[0]
    parameters, backward = quadratic(matrix, (200,))
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3), refresh=10)
    optimizer.refresh(Matrix(matrix))
    assert optimizer.active
    assert optimizer.cosine is None
    optimizer.refresh(Matrix(turned(matrix, 0)))
    assert optimizer.cosine < 0.1
    assert not optimizer.active
    assert "turn faster" in optimizer.reason
    backward()
    before, gradient = flat(parameters), parameters[0].grad.clone()
    for step in range(5):
        assert optimizer.due == (step == 5)
        optimizer.step()
    torch.testing.assert_close(flat(parameters), before - 5e-3 * gradient, rtol=0, atol=1e-12)
    assert optimizer.due  # halved, to 5
    optimizer.refresh(Matrix(turned(matrix, 0)))
    assert optimizer.cosine > 0.99
    assert optimizer.active
    assert optimizer._progress.every == 10


def test_the_interval_is_halved_and_doubled_within_its_bounds():
    progress = Progress(20)
    matrix = spiked(200)[0]
    parameters, _ = quadratic(matrix, (200,))
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3), refresh=20)
    optimizer._progress = progress
    intervals = []
    for seed in range(5):
        optimizer.refresh(Matrix(turned(matrix, seed)))
        intervals.append(progress.every)
    assert intervals == [20, 10, 5, 2, 2]
    for _ in range(4):
        optimizer.refresh(Matrix(turned(matrix, 4)))
        intervals.append(progress.every)
    assert intervals[5:] == [4, 8, 16, 20]


def test_adam_has_no_metric_before_its_first_step():
    model = network()
    optimizer = preconditioned(BASES["adam"](model.parameters()))
    assert not optimizer.due
    with pytest.raises(RuntimeError, match=r"Adam's metric needs second moments.*ask `due`"):
        refreshed(model, optimizer)
    train(model, optimizer, 1)
    assert optimizer.due


# --- update with what was measured elsewhere ---------------------------------------------------------------------------


def measured(matrix, optimizer, steps=60, count=5):
    operator = optimizer.in_metric(Matrix(matrix))
    return estimate_spectrum(operator, steps=steps, seed=3), top_eigenpairs(operator, count, steps=steps)


def test_update_takes_a_spectrum_or_a_reading_and_gives_what_refresh_does():
    matrix = spiked(200)[0]
    found = []
    for way in ("refresh", "spectrum", "reading"):
        parameters, _ = quadratic(matrix, (200,))
        optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3))
        spectrum, pairs = measured(matrix, optimizer)
        if way == "reading":
            spectrum = Reading(0, 0, spectrum, "hessian", "rmt", 0.0, 1)
        deflation = (
            optimizer.refresh(Matrix(matrix), noise=0.5, steps=60)
            if way == "refresh"
            else optimizer.update(spectrum, pairs, noise=0.5)
        )
        found.append(np.concatenate([deflation.curvature, [deflation.edge]]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)  # two start vectors sample the bulk
    np.testing.assert_array_equal(found[1], found[2])
    assert found[0].size == 4


def test_what_doesnt_fit_is_explained():
    matrix = spiked(200)[0]
    parameters, _ = quadratic(matrix, (120, 80))
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3))
    spectrum, pairs = measured(matrix, optimizer)
    with pytest.raises(TypeError, match="which has no eigenvectors, got NoneType"):
        optimizer.update(spectrum)
    with pytest.raises(TypeError, match=r"expected a lightning_rmt\.Spectrum, got str"):
        optimizer.update("reading", pairs)
    with pytest.raises(ValueError, match="have 200 entries and the parameters 80"):
        optimizer.update(spectrum, pairs, parameters=parameters[1:])
    with pytest.raises(ValueError, match="size 200 and the parameters 80 entries"):
        optimizer.refresh(Matrix(matrix), parameters=parameters[1:])
    with pytest.raises(ValueError, match=r"different matrices.*in_metric"):
        optimizer.update(estimate_spectrum(Matrix(matrix * 100), steps=60), pairs)
    skewed = EigenPairs(pairs.values, pairs.vectors + 0.1, pairs.residuals)
    with pytest.raises(ValueError, match="not orthonormal: the Gram matrix is"):
        optimizer.update(spectrum, skewed)
    light = Reading(0, 0, spectrum, "hessian", "rmt", 0.0, 1, speed="light")
    with pytest.raises(ValueError, match="light reading"):
        optimizer.update(light, pairs)
    other = [torch.nn.Parameter(torch.ones(200, dtype=torch.float64))]
    nowhere = EigenPairs(pairs.values, 0 * pairs.vectors, pairs.residuals)
    with pytest.raises(ValueError, match="none of the operator's parameters"):
        optimizer.update(spectrum, nowhere, parameters=other)

    class Spread(Matrix):
        shards = SimpleNamespace(local_size=100)

    with pytest.raises(ValueError, match="spread over processes; build it with sharded=False"):
        optimizer.refresh(Spread(matrix))
    assert optimizer.deflation is None  # nothing of it was taken over


def test_vectors_are_made_orthonormal():
    """U'U = I to 1e-5 where Lanczos in low precision, or another metric by now, left them off by more."""
    matrix = spiked(200)[0]
    parameters, _ = quadratic(matrix, (200,))
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3))
    spectrum, pairs = measured(matrix, optimizer)
    bent = pairs.vectors * 1.001 + 1e-4 * torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    assert (bent @ bent.T - torch.eye(len(bent))).abs().max() > 1e-3
    optimizer.update(spectrum, EigenPairs(pairs.values, bent, pairs.residuals))
    U = optimizer._progress.active.vectors
    assert (U @ U.T - torch.eye(len(U))).abs().max() < 1e-12


def test_a_callable_damping_is_asked_with_the_number_of_steps():
    matrix = spiked(200)[0]
    parameters, backward = quadratic(matrix, (200,))
    asked = []
    optimizer = SpectralPreconditioner(torch.optim.SGD(parameters, lr=1e-3), damping=lambda n: asked.append(n) or 1.0)
    optimizer.refresh(Matrix(matrix))
    for _ in range(3):
        backward()
        optimizer.step()
    assert asked == [0, 1, 2]


def test_in_the_metric_ranks_still_reserve_memory_and_agree():
    matrix = spiked(200)[0]
    parameters, backward = quadratic(matrix, (200,))
    optimizer = SpectralPreconditioner(torch.optim.Adam(parameters))
    backward()
    optimizer.step()
    asked, reserved = [], []

    class OverRanks(Matrix):
        def agree(self, fine):
            asked.append(fine)
            return fine

        def reserve(self, rows):
            reserved.append(rows)

    optimizer.refresh(OverRanks(matrix))
    assert len(asked) > 1  # on the basis's memory, and on going on
    assert reserved == [1]


def test_a_refresh_keeps_no_graph_alive():
    import gc
    import weakref

    model = network()
    optimizer = preconditioned(BASES["sgd"](model.parameters()))
    operator = Hessian(loss_of(model), model.named_parameters(), [batch(0)])
    optimizer.refresh(operator)
    alive = weakref.ref(operator)
    del operator
    gc.collect()
    assert alive() is None
