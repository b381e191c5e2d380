"""Checkpoints: a resumed run is the uninterrupted one; another model's is refused in words."""

from __future__ import annotations

import io

import pytest
import torch
from preconditioner_cases import BASES, network, preconditioned, same_weights, train

REFRESHES = (5, 12)


def damping(step):
    return 0.1 / (1 + step)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted(base, steps, **settings):
    """Weights and optimizer of a run of 10 steps, resumed from files in new objects for the rest."""
    model = network()
    optimizer = preconditioned(BASES[base](model.parameters()), damping=damping, **settings)
    train(model, optimizer, 10, refresh_at=REFRESHES)
    assert optimizer.active
    resumed = network(seed=1)
    resumed.load_state_dict(through_a_file(model.state_dict()))
    second = preconditioned(BASES[base](resumed.parameters()), damping=damping, **settings)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    return resumed, second, optimizer


@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_is_the_uninterrupted_one(base):
    whole = network()
    reference = preconditioned(BASES[base](whole.parameters()), damping=damping)
    train(whole, reference, 20, refresh_at=REFRESHES)
    resumed, optimizer, _ = interrupted(base, 20)
    assert optimizer.active
    train(resumed, optimizer, 10, start=10, refresh_at=REFRESHES)
    assert same_weights(whole, resumed)
    assert (optimizer.steps, optimizer.cosine, optimizer.due) == (20, reference.cosine, reference.due)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state


def test_without_the_basis_steps_are_the_bases_until_the_next_refresh():
    resumed, optimizer, original = interrupted("sgd", 20, save_basis=False)
    size = sum(p.numel() for p in resumed.parameters())
    numbers = sum(v.numel() for v in original.state_dict()["spectral"].values() if torch.is_tensor(v))
    assert numbers < size
    assert not optimizer.active
    assert optimizer.due
    assert "nothing was measured yet" in optimizer.reason
    plain = network()
    plain.load_state_dict(resumed.state_dict())
    reference = BASES["sgd"](plain.parameters())
    reference.load_state_dict(original.base.state_dict())
    train(plain, reference, 2, start=10)
    train(resumed, optimizer, 2, start=10)
    assert same_weights(plain, resumed)
    train(resumed, optimizer, 1, start=12, refresh_at=REFRESHES)
    assert optimizer.active


def test_the_bases_checkpoint_is_taken_and_the_base_takes_ours():
    _, optimizer, original = interrupted("adamw", 10)
    optimizer.load_state_dict(through_a_file(original.base.state_dict()))
    assert not optimizer.active
    assert optimizer.due
    model = network()
    base = BASES["adamw"](model.parameters())
    base.load_state_dict(through_a_file(original.state_dict()))
    assert len(base.state) == 4


def test_another_models_checkpoint_is_refused_and_nothing_changed():
    _, _, original = interrupted("sgd", 10)
    saved = original.state_dict()
    wide = network(width=13)
    optimizer = preconditioned(BASES["sgd"](wide.parameters(), lr=0.5))
    with pytest.raises(ValueError, match=r"another model: parameter 0 .* \(12, 8\), of this one \(13, 8\); load it"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state
    deep = torch.nn.Sequential(network(), network())
    with pytest.raises(ValueError, match="its optimizer has 4 parameters, this one 8"):
        preconditioned(BASES["sgd"](deep.parameters())).load_state_dict(saved)


def test_a_checkpoint_in_another_metric_warns_and_waits_for_a_refresh():
    _, _, original = interrupted("adam", 10)
    model = network()
    optimizer = preconditioned(BASES["adam"](model.parameters()), metric="identity")
    with pytest.warns(UserWarning, match="of the metric 'adam', not 'identity'"):
        optimizer.load_state_dict(original.state_dict())
    assert not optimizer.active
    assert optimizer.due
    assert optimizer.steps == 10


def test_hooks_on_checkpoints_are_called():
    model = network()
    optimizer = preconditioned(BASES["sgd"](model.parameters()))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load"]
    assert optimizer.param_groups is optimizer.base.param_groups
