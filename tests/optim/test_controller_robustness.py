"""T5: a Kronecker-factored optimizer from dampings that are decades apart; the controller makes all runs one.

What no start has a say in can't be told apart by it: after the first step the runs are the same bit for bit, so the spread
over seven starts is exactly 1. How good that one run is, is measured against the best fixed damping of a grid of one value
per decade; over 1e-6 to 10 that is 1 on all three tasks (docs/damping.md has the whole table).
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from kronecker_harness import SCHEDULE, KroneckerSGD, Task, train

from lightning_rmt import DampingController

STARTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BEST = (0.1, 1.0)  # of the grid, and the one below
SEEDS = (0, 1, 2)
TASKS = tuple(SCHEDULE)


@cache
def controlled(kind, seed, guard=1.5):
    steps, rate = SCHEDULE[kind]
    return train(kind, 1e-6, steps, rate, seed, DampingController(mode="control", guard=guard))[0]


@cache
def best_fixed(kind, seed):
    steps, rate = SCHEDULE[kind]
    return min(train(kind, damping, steps, rate, seed)[0] for damping in BEST)


def weights_after(kind, start, steps):
    task = Task(kind, 0)
    optimizer = KroneckerSGD(task.model, SCHEDULE[kind][1], start)
    control = DampingController(mode="control").attach(optimizer)
    for _ in range(steps):
        rows, others = task.batch(), task.batch()
        output = task.model(task.x[rows])
        loss = task.loss(rows, output)
        optimizer.zero_grad()
        optimizer.observe(task.sampled_loss(output), len(rows))
        loss.backward()
        control.step(partial(task.loss, rows), partial(task.loss, others), before=loss)
    state = {**control.state_dict(), "ratios": None}
    return torch.cat([p.detach().flatten() for p in task.model.parameters()]), state


@pytest.mark.parametrize("kind", TASKS)
def test_after_its_first_step_a_run_has_forgotten_where_it_started(kind):
    weights, state = weights_after(kind, STARTS[0], 3)
    for start in STARTS[1:]:
        others, other_state = weights_after(kind, start, 3)
        assert torch.equal(weights, others)
        assert state == other_state


# seed by seed; measured 0.91 to 0.96, 0.16 to 0.76 and 0.94 to 1.25
@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_it_ends_near_the_best_fixed_damping(kind):
    ratios = [controlled(kind, seed) / best_fixed(kind, seed) for seed in SEEDS]
    assert max(ratios) < 1.5, ratios


@pytest.mark.slow
def test_without_the_guard_it_does_not():
    # the autoencoder and two seeds of the classifier never need it
    worst = {kind: max(controlled(kind, seed, guard=None) / best_fixed(kind, seed) for seed in SEEDS) for kind in TASKS}
    assert worst["classifier"] > 1000, worst
    assert worst["characters"] > 5, worst


# measured: 1.2 and 36 times the best fixed damping
@pytest.mark.slow
def test_a_rise_that_no_single_step_shows_is_taken_back():
    def run(**options):
        return train("classifier", 1e-6, 300, 0.3, 2, refresh=1, **options)[0]

    best = train("classifier", 1.0, 300, 0.3, 2, refresh=1)[0]
    assert run(controller=DampingController(mode="control")) < 2 * best
    assert run(controller=DampingController(mode="control", rewind=None)) > 10 * best


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_small_dampings_that_are_kept_diverge(kind):
    steps, rate = SCHEDULE[kind]
    assert train(kind, 1e-4, steps, rate)[0] > 10 * best_fixed(kind, 0)
