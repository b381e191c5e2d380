from __future__ import annotations

import itertools
import json
import math

import pytest

from lightning_rmt.live.schedule import MAX_BORROWED, MAX_LIGHT, NEVER, STEPS_TO_MEASURE, Decision, Schedule


def probes(schedule, steps, accumulate=1, speed="full"):
    return [step for step in range(steps) if schedule.due(step, accumulate) == speed]


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


def test_light_probes_at_fixed_steps_lie_between_the_full_ones():
    schedule = Schedule(30, 0.05, 2, light_every_n_steps=10)
    assert collected(schedule, 45) == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert probes(schedule, 45) == [1, 31]
    assert probes(schedule, 45, speed="light") == [11, 21, 41]
    assert probes(schedule, 45, accumulate=2) == [0, 30]


def simulate(schedule, steps, step_seconds, full_seconds, light_seconds, total=math.inf):
    """Runs a training with these costs; returns the steps probed, by speed, and the measured overhead."""
    probed = {"full": [], "light": []}
    for step in range(steps):
        schedule.stepped(step_seconds(step) if callable(step_seconds) else step_seconds)
        speed = schedule.due(step, 1)
        if speed:
            probed[speed].append(step)
            schedule.probed(step, full_seconds if speed == "full" else light_seconds, speed=speed)
        elif schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, total))
    return probed["full"], probed["light"], schedule.overhead


def test_a_share_of_the_time_takes_some_steps():
    """The first probe, of 1 s after a step of 0.1 s, isn't 1000 %; and a resumed run remembers what it timed."""
    schedule = Schedule(None, 0.05, 1)
    for step in range(9):
        schedule.stepped(0.1)
        if step == 0:
            schedule.probed(0, 1.0)
        assert schedule.overhead is schedule.overhead_with(1.0) is None
    resumed = Schedule(None, 0.05, 1)
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.overhead is None
    for each in (schedule, resumed):
        each.stepped(0.1)
        assert each.overhead == pytest.approx(1.0)
        assert each.overhead_with(1.0) == pytest.approx(2.0)


def test_how_long_a_training_must_be_for_the_default_budget():
    """With a full probe as long as 340 steps and a light one as long as 36, measured on a small GPT (docs/long_run.md)."""
    probed = {}
    for steps in (4000, 8000, 12_000, 20_000, 60_000):
        schedule = Schedule(None, 0.05, 1)
        full, light, _ = simulate(schedule, steps, 0.01, 3.4, 0.36, total=steps)
        probed[steps] = len(full), len(light)
    assert probed == {4000: (1, 0), 8000: (1, 0), 12_000: (1, 7), 20_000: (1, 18), 60_000: (5, 36)}


@pytest.mark.parametrize(("steps", "found"), [(4000, 340), (20_000, 340), (60_000, None), (math.inf, None)])
def test_a_budget_that_pays_for_no_further_full_probe_is_known_for_that(steps, found):
    schedule = Schedule(None, 0.05, 1)
    simulate(schedule, 15, 0.01, 3.4, 0.36, total=steps)
    assert schedule.steps_of_a_full_probe == (None if found is None else pytest.approx(found))


@pytest.mark.parametrize("max_overhead", [0.02, 0.05, 0.5])
def test_budget_is_kept_and_used(max_overhead):
    full, _, overhead = simulate(Schedule(None, max_overhead, 1), 40_000, 0.01, 0.8, 0.16)
    assert full[0] == 0
    assert full[1] == pytest.approx((0.8 + 5 * 0.16) / (0.01 * max_overhead), abs=10)
    assert overhead == pytest.approx(max_overhead, rel=0.1)


@pytest.mark.parametrize(("light_seconds", "between"), [(0.2, 4), (0.1, 8), (0.01, MAX_LIGHT), (0.41, 1)])
def test_the_budget_goes_in_halves_to_both_speeds_while_light_probes_are_cheap(light_seconds, between):
    full, light, _ = simulate(Schedule(None, 0.05, 1), 100_000, 0.01, 0.8, light_seconds)
    counts = [sum(a < step < b for step in light) for a, b in itertools.pairwise(full)]
    assert counts[1:-1] == [between] * (len(counts) - 2)  # in the first cycle their cost isn't known yet
    if between == 1:  # too dear: tried once in a cycle, to see whether they still are
        return
    late = [step for step in (*full, *light) if full[2] <= step <= full[3]]
    distances = [b - a for a, b in itertools.pairwise(sorted(late))]
    assert max(distances) - min(distances) <= 2


@pytest.mark.parametrize("batches", [1, 3])
def test_known_length_spreads_the_same_budget_with_more_at_the_beginning(batches):
    steps = 10_000
    full, light, overhead = simulate(Schedule(None, 0.05, batches), steps, 0.01, 0.5, 0.1, total=steps)
    assert overhead == pytest.approx(0.05, rel=0.15)
    assert len(full) == pytest.approx(5, abs=1)
    assert len(light) == pytest.approx(20, abs=5)
    distances = [b - a for a, b in itertools.pairwise(full)]
    assert distances == sorted(distances)
    assert distances[0] <= steps / 10
    assert full[-1] == steps - 1


def test_light_probes_go_on_where_no_full_one_is_paid_for():
    full, light, overhead = simulate(Schedule(None, 0.05, 1), 1500, 0.01, 0.5, 0.1, total=1500)
    assert full == [0]
    assert len(light) == 2
    assert overhead <= 0.05


@pytest.mark.parametrize("steps", [1000, 10_000, 100_000])
def test_a_training_that_ends_early_has_not_paid_for_one_to_the_end(steps):
    """The Trainer's default of 1000 epochs, and somebody who stops it."""
    full, light, overhead = simulate(Schedule(None, 0.05, 1), steps, 0.01, 0.5, 0.1, total=1_000_000)
    assert len(full) > 1
    assert len(light) > 4
    assert overhead <= MAX_BORROWED * 0.05 * 1.01


def test_a_limit_of_time_is_an_end_too():
    """`max_time` stops a training that by its epochs would go on for a hundred times as long."""
    schedule, probed, limit = Schedule(None, 0.05, 1), [], 100.0
    for step in range(1_000_000):
        schedule.stepped(0.01)
        left = limit - schedule.training_seconds - schedule.probe_seconds
        if left < 0:
            break
        speed = schedule.due(step, 1)
        if speed:
            probed.append(step)
            schedule.probed(step, 0.5 if speed == "full" else 0.1, speed=speed)
        elif schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, 1_000_000, left))
    assert len(probed) > 5
    assert schedule.overhead == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("total", [20_000, math.inf])
def test_steps_that_get_slower_are_noticed(total):
    """At first the whole budget seems to be two probes; later it is many."""
    full, light, overhead = simulate(
        Schedule(None, 0.05, 1), 20_000, lambda step: 0.005 if step < 1000 else 0.05, 2.0, 0.4, total=total
    )
    assert 0.04 < overhead < 0.055
    assert len(full) > 8
    assert len(light) > 40


def test_the_next_probe_is_looked_at_a_few_times_only():
    schedule, looks = Schedule(None, 0.05, 1), 0
    schedule.probed(0, 100.0)
    for step in range(1, 10_000):
        schedule.stepped(0.1)
        if schedule.undecided(step):
            schedule.set_next(step, schedule.decide(step, math.inf))
            looks += 1
    assert schedule.due(10_000, 1) == "light"
    assert looks < 25


def test_a_training_too_short_for_a_second_probe_gets_one():
    full, light, _ = simulate(Schedule(None, 0.05, 1), 100, 0.01, 0.5, 0.1, total=100)
    assert (full, light) == ([0], [])
    schedule = Schedule(None, 0.05, 1)
    schedule.probed(0, 0.5)
    schedule.stepped(0.01)
    assert schedule.decide(10, 100) == Decision(NEVER, 0)


def test_budget_never_probes_before_it_has_measured():
    full, light, _ = simulate(Schedule(None, 1.0, 1), 100, 1.0, 1e-9, 1e-9)
    assert all(b - a > STEPS_TO_MEASURE for a, b in itertools.pairwise(sorted((*full, *light))))


def test_one_slow_step_does_not_spoil_the_decision():
    schedule = Schedule(None, 0.05, 1)
    schedule.probed(0, 1.0)
    for seconds in [5.0] + [0.01] * (STEPS_TO_MEASURE - 1):  # the first step waits for data
        schedule.stepped(seconds)
    assert schedule.decide(STEPS_TO_MEASURE, math.inf) == Decision(800, 1)  # a fifth of 2 s / (0.05 * 0.01 s)


def test_state_is_plain_and_carries_the_budget_over_a_resume():
    one = Schedule(None, 0.05, 1)
    simulate(one, 500, 0.01, 0.1, 0.02)
    state = json.loads(json.dumps(one.state_dict()))
    other = Schedule(None, 0.05, 1)
    other.load_state_dict(state)
    assert other.state_dict() == one.state_dict()
    assert probes(other, 5000, speed="light")[:1] == probes(one, 5000, speed="light")[:1] != []
