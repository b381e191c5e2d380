from __future__ import annotations

import itertools
import json
import math

import pytest

from lightning_rmt.live.schedule import MAX_BORROWED, STEPS_TO_MEASURE, Schedule


def probes(schedule, steps, accumulate=1):
    return [step for step in range(steps) if schedule.due(step, accumulate)]


def collected(schedule, steps, accumulate=1):
    return [step for step in range(steps) if schedule.collects(step, accumulate)]


def test_every_n_steps_starts_at_zero():
    assert probes(Schedule(10, 0.05, 1), 35) == [0, 10, 20, 30]
    assert collected(Schedule(10, 0.05, 1), 35) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("batches", "accumulate", "window", "due"),
    [(4, 1, [0, 1, 2, 3, 10, 11, 12, 13], [3, 13]), (4, 2, [0, 1, 10, 11], [1, 11]), (3, 4, [0, 10], [0, 10])],
)
def test_batches_are_collected_over_the_steps_before_the_probe(batches, accumulate, window, due):
    schedule = Schedule(10, 0.05, batches)
    assert collected(schedule, 20, accumulate) == window
    assert probes(schedule, 20, accumulate) == due


def simulate(schedule, steps, step_seconds, probe_seconds, total=math.inf):
    """Runs a training with these costs; returns the steps probed and the measured overhead."""
    probed = []
    for step in range(steps):
        schedule.stepped(step_seconds(step) if callable(step_seconds) else step_seconds)
        if schedule.due(step, 1):
            probed.append(step)
            schedule.probed(step, probe_seconds)
        elif schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, total))
    return probed, schedule.overhead


@pytest.mark.parametrize("max_overhead", [0.02, 0.05, 0.5])
def test_budget_is_kept_and_used(max_overhead):
    probed, overhead = simulate(Schedule(None, max_overhead, 1), 40_000, 0.01, 0.8)
    assert probed[0] == 0
    assert probed[1] == pytest.approx(0.8 / (0.01 * max_overhead), abs=2)
    assert overhead == pytest.approx(max_overhead, rel=0.1)


@pytest.mark.parametrize("batches", [1, 3])
def test_known_length_spreads_the_same_budget_with_more_at_the_beginning(batches):
    steps = 10_000
    probed, overhead = simulate(Schedule(None, 0.05, batches), steps, 0.01, 0.5, total=steps)
    assert overhead == pytest.approx(0.05, rel=0.1)
    assert len(probed) == pytest.approx(10, abs=1)
    distances = [b - a for a, b in itertools.pairwise(probed)]
    assert distances == sorted(distances)
    assert distances[0] <= steps / 20
    assert probed[-1] == steps - 1


@pytest.mark.parametrize("steps", [1000, 10_000, 100_000])
def test_a_training_that_ends_early_has_not_paid_for_one_to_the_end(steps):
    """The Trainer's default of 1000 epochs, and somebody who stops it."""
    probed, overhead = simulate(Schedule(None, 0.05, 1), steps, 0.01, 0.5, total=1_000_000)
    assert len(probed) > 1
    assert overhead <= MAX_BORROWED * 0.05 * 1.01


def test_a_limit_of_time_is_an_end_too():
    """`max_time` stops a training that by its epochs would go on for a hundred times as long."""
    schedule, probed, limit = Schedule(None, 0.05, 1), [], 100.0
    for step in range(1_000_000):
        schedule.stepped(0.01)
        left = limit - schedule.training_seconds - schedule.probe_seconds
        if left < 0:
            break
        if schedule.due(step, 1):
            probed.append(step)
            schedule.probed(step, 0.5)
        elif schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, 1_000_000, left))
    assert len(probed) > 5
    assert schedule.overhead == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("total", [20_000, math.inf])
def test_steps_that_get_slower_are_noticed(total):
    """At first the whole budget seems to be two probes; later it is many."""
    probed, overhead = simulate(
        Schedule(None, 0.05, 1), 20_000, lambda step: 0.005 if step < 1000 else 0.05, 2.0, total=total
    )
    assert 0.04 < overhead < 0.055
    assert len(probed) > 15


def test_the_next_probe_is_looked_at_a_few_times_only():
    schedule, looks = Schedule(None, 0.05, 1), 0
    schedule.probed(0, 100.0)
    for step in range(1, 20_000):
        schedule.stepped(0.1)
        if schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, math.inf))
            looks += 1
    assert schedule.due(20_000, 1)
    assert looks < 25


def test_a_training_too_short_for_a_second_probe_gets_one():
    probed, _ = simulate(Schedule(None, 0.05, 1), 100, 0.01, 0.5, total=100)
    assert probed == [0]


def test_budget_never_probes_before_it_has_measured():
    probed, _ = simulate(Schedule(None, 1.0, 1), 100, 1.0, 1e-9)
    assert all(b - a > STEPS_TO_MEASURE for a, b in itertools.pairwise(probed))


def test_one_slow_step_does_not_spoil_the_decision():
    schedule = Schedule(None, 0.05, 1)
    schedule.probed(0, 1.0)
    for seconds in [5.0] + [0.01] * (STEPS_TO_MEASURE - 1):  # the first step waits for data
        schedule.stepped(seconds)
    assert schedule.decide(STEPS_TO_MEASURE, math.inf) == 2000


def test_state_is_plain_and_carries_the_budget_over_a_resume():
    one = Schedule(None, 0.05, 1)
    simulate(one, 500, 0.01, 0.1)
    state = json.loads(json.dumps(one.state_dict()))
    other = Schedule(None, 0.05, 1)
    other.load_state_dict(state)
    assert other.state_dict() == one.state_dict()
    assert probes(other, 5000)[:1] == probes(one, 5000)[:1]
