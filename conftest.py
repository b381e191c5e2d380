"""Collects every Python code block of README.md and docs/ as a test: a failure names the page and the line.

The blocks of a page run in order in one namespace, as a reader would type them; tests/docs/pages.py says what is in it
before the first one.
"""

import warnings
from typing import Any

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.sybil import SybilCollection

PAGES = ["README.md", "docs/*.md", "docs/**/*.md"]
#: Those whose blocks are run by two processes (gloo), as a launcher would start them.
RANKS = ["docs/recipes/fsdp2.md"]
DAMPING = "docs/damping.md"


def begin(namespace: dict[str, Any]) -> None:
    """Before a page's first block; imports PyTorch and Lightning only then."""
    import pages

    pages.begin(namespace)


def begin_damping(namespace: dict[str, Any]) -> None:
    """The same for a page with names of its own."""
    import pages

    pages.begin_damping(namespace)


def end(namespace: dict[str, Any]) -> None:
    """After its last one."""
    import pages

    pages.end(namespace)


def on_ranks(example: Any) -> None:
    """Runs a block in two processes."""
    import pages

    pages.on_ranks(example)


def with_create_graph(example: Any) -> None:
    """Runs a block, AdaHessian's among them, without PyTorch's warning of ``backward(create_graph=True)``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using backward\(\) with create_graph=True")
        PythonEvaluator()(example)


pytest_collect_file = SybilCollection(
    [
        Sybil([PythonCodeBlockParser()], patterns=PAGES, excludes=[*RANKS, DAMPING], setup=begin, teardown=end),
        Sybil([CodeBlockParser("python", with_create_graph)], patterns=[DAMPING], setup=begin_damping, teardown=end),
        Sybil([CodeBlockParser("python", on_ranks)], patterns=RANKS, setup=begin, teardown=end),
    ]
).pytest()
