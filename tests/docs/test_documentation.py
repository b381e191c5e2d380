"""The documentation as a whole: no Python block hides from the tests, no link of the README is dead, no name is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import lightning_rmt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def languages(text):
    """Of the opening fences."""
    return [language for i, language in enumerate(re.findall(r"^[ >]*```+ *(.*)$", text, re.M)) if i % 2 == 0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_one_that_is_executed(page):
    text = page.read_text(encoding="utf-8")
    found = languages(text)
    assert set(found) <= {"python", "sh", "text", "yaml", ""}, found  # "py" or "python title=..." would never run
    collected = list(PythonCodeBlockParser()(Document(text, str(page))))
    assert len(collected) == found.count("python")
    for block in re.findall(r"^```(?:sh|text|yaml|) *\n(.*?)^```", text, re.M | re.S):
        assert not re.search(r"^(import|from \S+ import|def|class|>>>) ", block, re.M), block


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != ROOT / "docs" / "papers"], ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    """Also where the strict build doesn't look: in the README, and of images."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead


def test_the_api_has_a_place_for_every_public_name():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: lightning_rmt\.(\w+)$", pages, re.M))
    assert set(lightning_rmt.__all__) - {"__version__"} <= documented
