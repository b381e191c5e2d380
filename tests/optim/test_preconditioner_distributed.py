"""Two processes: the same curvature, the same steps, the same weights on both, and those of one process with all data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from preconditioner_cases import BASES, batch, loss_of, network, preconditioned, weights
from several_ranks import on_two_ranks

from lightning_rmt.curvature.distributed import RankSum
from lightning_rmt.curvature.hessian import Hessian

STEPS, REFRESHES = 12, (3, 8)


def trained(base):
    dist.init_process_group("gloo")
    model = network(dtype=torch.float64)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = preconditioned(BASES[base](parallel.parameters()))
    for step in range(STEPS):
        data = batch(2 * step + dist.get_rank(), torch.float64)
        if step in REFRESHES:
            optimizer.refresh(RankSum(Hessian(loss_of(model), model.named_parameters(), [data])))
            assert optimizer.active, optimizer.reason
        optimizer.zero_grad()
        loss_of(parallel)(data).backward()
        optimizer.step()
    return weights(model).numpy(), optimizer.deflation.values


def on_rank(base):
    return trained(base)


def alone(base):
    model = network(dtype=torch.float64)
    optimizer = preconditioned(BASES[base](model.parameters()))
    for step in range(STEPS):
        parts = [batch(2 * step + rank, torch.float64) for rank in range(2)]
        data = tuple(torch.cat(both) for both in zip(*parts, strict=True))
        if step in REFRESHES:
            optimizer.refresh(Hessian(loss_of(model), model.named_parameters(), [data]))
        optimizer.zero_grad()
        loss_of(model)(data).backward()
        optimizer.step()
    return weights(model).numpy()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_two_ranks_have_the_same_weights_and_those_of_one_process(base, tmp_path):
    first, second = on_two_ranks(on_rank, tmp_path, base)
    assert (first[0] == second[0]).all()
    assert (first[1] == second[1]).all()
    assert abs(first[0] - alone(base)).max() < 1e-8


def failing():
    """A refresh in which rank 1's product fails: what each rank is told, and whether it goes on with the base."""
    dist.init_process_group("gloo")
    model = network()
    optimizer = preconditioned(BASES["adamw"](model.parameters()))
    loss_of(model)(batch(0)).backward()
    optimizer.step()
    operator = Hessian(loss_of(model), model.named_parameters(), [batch(0)])
    if dist.get_rank() == 1:
        operator.matmat = broken
    try:
        optimizer.refresh(RankSum(operator))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    optimizer.step()
    return found, optimizer.active


def broken(V):
    raise RuntimeError("no memory left")


def test_a_rank_that_fails_in_a_refresh_says_so_and_no_other_waits_for_it(tmp_path):
    first, second = on_two_ranks(failing, tmp_path)
    assert "NaN or infinity" in first[0]
    assert second[0] == "RuntimeError: no memory left"
    assert not first[1]
    assert not second[1]
