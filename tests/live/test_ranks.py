from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist
from several_ranks import on_two_ranks

from lightning_rmt.live.ranks import OtherRankFailedError, Ranks


def pair():
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    return Ranks(dist.group.WORLD)


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    assert (ranks.size, ranks.rank, ranks.group) == (1, 0, None)
    assert ranks.all_ok(True)
    assert not ranks.all_ok(False)
    assert ranks.from_first((7, 1)) == [7, 1]
    assert ranks.together(lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0)


def agree():
    ranks = pair()
    return [ranks.size, ranks.all_ok(True), ranks.all_ok(ranks.rank == 0), ranks.from_first((10 + ranks.rank, 5))]


def test_two_ranks_agree(tmp_path):
    assert on_two_ranks(agree, tmp_path) == [[2, True, False, [10, 5]]] * 2


def one_fails():
    ranks = pair()
    seen = []
    for failing in (0, 1):

        def stage(failing=failing):
            if ranks.rank == failing:
                raise ValueError(f"no luck on {failing}")
            return "fine"

        try:
            ranks.together(stage)
        except Exception as error:
            seen.append(type(error).__name__)
    return seen, ranks.together(lambda: "after")  # nothing is left in the queue of collectives


def test_a_stage_that_fails_on_one_rank_fails_on_all(tmp_path):
    first, second = on_two_ranks(one_fails, tmp_path)
    assert first == (["ValueError", OtherRankFailedError.__name__], "after")
    assert second == ([OtherRankFailedError.__name__, "ValueError"], "after")


def agrees_three_times():
    """A stage with three agreements, left by one rank or the other before each of them."""
    ranks = pair()
    seen = []
    for failing in (0, 1):
        for place in range(4):

            def stage(failing=failing, place=place):
                for number in range(3):
                    if (ranks.rank, number) == (failing, place):
                        raise ValueError(f"before {number}")
                    assert ranks.agree(5 + ranks.rank) == 5
                return "fine"

            try:
                seen.append(ranks.together(stage))
            except Exception as error:
                seen.append(f"{type(error).__name__}: {error}")
    return seen, ranks.together(lambda: "after")


def test_a_stage_may_be_left_before_any_of_its_agreements(tmp_path):
    one, two = on_two_ranks(agrees_three_times, tmp_path)
    own = [f"ValueError: before {n}" for n in range(3)]
    others = [
        [f"OtherRankFailedError: the probe failed on rank {rank} ({words}). All ranks skip this one" for words in own]
        for rank in (0, 1)
    ]
    assert one == ([*own, "fine", *others[1], "fine"], "after")
    assert two == ([*others[0], "fine", *own, "fine"], "after")


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def words_that_fail():
    ranks = pair()

    def stage():
        if ranks.rank == 1:
            raise Speechless

    with pytest.raises(Exception) as caught:  # noqa: PT011
        ranks.together(stage)
    return type(caught.value).__name__, "" if ranks.rank else str(caught.value)


def test_an_exception_without_words(tmp_path):
    one, two = on_two_ranks(words_that_fail, tmp_path)
    assert one == ("OtherRankFailedError", "the probe failed on rank 1 (Speechless). All ranks skip this one")
    assert two == ("Speechless", "")


def test_an_interrupt_is_not_held_back():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ranks().together(interrupted)
