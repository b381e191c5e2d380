"""Sentences that are said once, however their numbers change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_INDEX = re.compile(r"/\d+$")
_RELATION = re.compile(r"[<>=]=? #")
_NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")


class Once:
    """Remembers what has been said.

    Args:
        said: what was said before, as `said` gave it.
    """

    def __init__(self, said: Iterable[str] = ()) -> None:
        self._said = set(said)

    @property
    def said(self) -> list[str]:
        """What has been said, without its numbers; plain strings, for a checkpoint."""
        return sorted(self._said)

    def is_new(self, sentence: str, tag: str = "") -> bool:
        """Whether this hasn't been said of this tag, be it with other numbers; from now on it has.

        Args:
            sentence: what is to be said.
            tag: what it is about; ``top/4`` and ``top/5`` are the same, ``q01`` and ``q99`` are not.
        """
        key = f"{_INDEX.sub('/#', tag)}: {without_numbers(sentence)}"
        new = key not in self._said
        self._said.add(key)
        return new


class OnChange:
    """Remembers what was said last of each tag: for verdicts, of which the last one said must be the one that holds.

    Args:
        last: what was said last, by tag, as `last` gave it.
    """

    def __init__(self, last: Mapping[str, str] | None = None) -> None:
        self.last = dict(last or {})

    def is_new(self, sentence: str, tag: str) -> bool:
        """Whether the last sentence of this tag was another one, numbers aside; from now on it is this one."""
        words = without_numbers(sentence)
        changed = self.last.get(tag) != words
        self.last[tag] = words
        return changed


def without_numbers(sentence: str) -> str:
    """The sentence with ``#`` for every number, and for one that is only bounded."""
    return _RELATION.sub("#", _NUMBER.sub("#", sentence))
