"""Collects every Python code block of README.md and docs/ as a test: a failure names the page and the line.

The blocks of a page run in order in one namespace, as a reader would type them; tests/docs/pages.py says what is in it
before the first one.
"""

from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

PAGES = ["README.md", "docs/*.md", "docs/**/*.md"]
#: Those whose blocks are run by two processes (gloo), as a launcher would start them.
RANKS = ["docs/recipes/fsdp2.md"]


def begin(namespace: dict[str, Any]) -> None:
    """Before a page's first block; imports PyTorch and Lightning only then."""
    import pages

    pages.begin(namespace)


def end(namespace: dict[str, Any]) -> None:
    """After its last one."""
    import pages

    pages.end(namespace)


def on_ranks(example: Any) -> None:
    """Runs a block in two processes."""
    import pages

    pages.on_ranks(example)


pytest_collect_file = (
    Sybil([PythonCodeBlockParser()], patterns=PAGES, excludes=RANKS, setup=begin, teardown=end)
    + Sybil([CodeBlockParser("python", on_ranks)], patterns=RANKS, setup=begin, teardown=end)
).pytest()
