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


def test_an_interrupt_is_not_held_back():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ranks().together(interrupted)
