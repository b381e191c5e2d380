from __future__ import annotations

from lightning_rmt.report.once import Once, OnChange


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


def test_a_bounded_number_is_a_number():
    once = Once()
    assert once.is_new("ratio 0.5, p < 1e-4")
    assert not once.is_new("ratio 0.6, p = 0.00013")


def test_a_verdict_is_said_whenever_it_changes_so_that_the_last_one_said_holds():
    verdicts = OnChange()
    assert verdicts.is_new("levels repel, p = 0.3", "goe/head")
    assert not verdicts.is_new("levels repel, p < 1e-4", "goe/head")
    assert verdicts.is_new("intermediate", "goe/head")
    assert verdicts.is_new("levels repel, p = 0.2", "goe/head")  # said before, and not what was said last
    assert verdicts.is_new("levels repel, p = 0.2", "goe/body")
    assert not OnChange(verdicts.last).is_new("levels repel, p = 0.9", "goe/head")
