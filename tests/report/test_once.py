from __future__ import annotations

from lightning_rmt.report.once import Once


def test_a_sentence_is_new_once_whatever_its_numbers():
    once = Once()
    assert once.is_new("9 outliers, gap x1.5")
    assert not once.is_new("12 outliers, gap x-2.5e-07")
    assert once.is_new("no outliers")


def test_what_was_said_goes_through_a_checkpoint():
    once = Once()
    once.is_new("trace 3.5")
    assert not Once(once.said).is_new("trace 4")
    assert once.said == [": trace #"]


def test_tags_are_told_apart_but_not_the_places_in_a_row():
    once = Once()
    assert once.is_new("known only between 1 and 2", "rmt/q99")
    assert once.is_new("known only between 1 and 2", "rmt/q01")
    assert once.is_new("only 4 certified", "rmt/top/5")
    assert not once.is_new("only 5 certified", "rmt/top/6")
