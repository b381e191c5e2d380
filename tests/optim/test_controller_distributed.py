"""Two ranks with half a batch each against one process with all of it."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from newton_harness import DampedNewton
from several_ranks import on_two_ranks
from torch import nn

from lightning_rmt import DampingController

STEPS = 8
N = 12


def data(step, which):
    random = torch.Generator().manual_seed(10 * step + which)
    return torch.randn(16, N, dtype=torch.float64, generator=random)


def run(rows, group=None, poison=None, kind="error"):
    """Trains on these rows of every batch; the gradient and the optimizer's Hessian are of all rows, as in DDP."""
    p = nn.Parameter(torch.full((N,), 0.5, dtype=torch.float64))
    optimizer = DampedNewton([p], damping=1e-4)
    control = DampingController(mode="control", every=2, guard_steps="every", guard=1.2).attach(optimizer, group=group)
    seen = []
    for step in range(STEPS):
        own, other = data(step, 0), data(step, 1)

        def loss(x):
            return torch.nn.functional.softplus(x @ p).mean() + 0.05 * (x @ p).square().mean()

        optimizer.loss = lambda own=own, loss=loss: loss(own)
        optimizer.zero_grad()
        optimizer.loss().backward()

        def mine(own=own, loss=loss, step=step):
            if poison == step and kind == "own":
                raise RuntimeError("no such file")
            return loss(own[rows]) * (float("nan") if poison == step and kind == "nan" else 1.0)

        def held_out(other=other, loss=loss, step=step):
            if poison == step and kind == "error":
                raise ValueError("the batch of this rank is broken")
            if poison == step and kind == "unforeseen":
                raise RuntimeError("no such file")
            return loss(other[rows])

        report = control.step(mine, held_out)
        seen.append((report.damping, report.ratio, report.rejected, report.refused is None, report.products))
    return seen, p.detach()


def on_rank(poisoned=None, kind="error"):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    rows = slice(8 * rank, 8 * rank + 8)
    return run(rows, dist.group.WORLD, poisoned if rank == 1 else None, kind)


def test_ranks_decide_as_one(tmp_path):
    """T9: and as one process does on the joined batch."""
    (first, p), (second, q) = on_two_ranks(on_rank, tmp_path)
    alone, r = run(slice(None))
    assert first == second
    assert torch.equal(p, q)
    for ours, theirs in zip(first, alone, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours[1] == (None if theirs[1] is None else pytest.approx(theirs[1], rel=1e-5))
        assert ours[2:] == theirs[2:]
    torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-8)


def drifting_on_rank():
    """Somebody moves the weights after each step from the eighth on, the same on all ranks: no step shows that rise."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    p = nn.Parameter(torch.full((N,), 0.1, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [p], "damping": 1.0}], lr=1e-3)
    control = DampingController(mode="control", search=False).attach(optimizer, group=dist.group.WORLD)
    seen = []
    for step in range(24):
        rows = data(step, 0)
        mine = rows[8 * rank : 8 * rank + 8]
        optimizer.zero_grad()
        (rows @ p).square().mean().backward()
        report = control.step(lambda mine=mine: (mine @ p).square().mean(), before=(mine @ p).square().mean())
        seen.append(report.undone)
        if 8 <= step < 16 and not any(seen):
            with torch.no_grad():
                p.mul_(1.3)
    return seen, p.detach()


def test_ranks_go_back_together(tmp_path):
    (first, p), (second, q) = on_two_ranks(drifting_on_rank, tmp_path)
    assert first == second
    assert torch.equal(p, q)
    assert max(first) > 1
    assert float(p.abs().max()) < 0.11  # where it was before


def test_a_rank_that_fails_makes_all_refuse(tmp_path):
    (first, p), (second, q) = on_two_ranks(on_rank, tmp_path, 4)
    assert [step[:4] for step in first] == [step[:4] for step in second]
    assert not first[4][3]
    assert first[6][3]
    assert torch.equal(p, q)


@pytest.mark.parametrize(("kind", "step"), [("unforeseen", 4), ("own", 4), ("own", 5)])
def test_whatever_a_rank_s_loss_raises_the_others_do_not_wait_for_it(kind, step, tmp_path):
    """In a measured step, and, of its own batch, in one that is only guarded."""
    (first, p), (second, q) = on_two_ranks(on_rank, tmp_path, step, kind)
    assert [seen[:4] for seen in first] == [seen[:4] for seen in second]
    assert [seen[3] for seen in first] == [place != step for place in range(STEPS)]
    assert not first[step][2]
    assert torch.equal(p, q)


def test_alone_it_is_raised():
    with pytest.raises(RuntimeError, match="no such file"):
        run(slice(None), poison=4, kind="unforeseen")


def test_a_loss_that_is_nan_on_one_rank_undoes_the_step_on_all(tmp_path):
    (first, p), (second, q) = on_two_ranks(on_rank, tmp_path, 5, "nan")
    assert [step[2] for step in first] == [step[2] for step in second]
    assert first[5][2]
    assert torch.equal(p, q)
    assert torch.isfinite(p).all()
