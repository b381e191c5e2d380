"""Sentences that are said once, however their numbers change."""

from __future__ import annotations

import re
from collections.abc import Iterable

_INDEX = re.compile(r"/\d+$")
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
        key = f"{_INDEX.sub('/#', tag)}: {_NUMBER.sub('#', sentence)}"
        new = key not in self._said
        self._said.add(key)
        return new
