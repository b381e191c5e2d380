"""What a paper claims beside what was measured: a table, figures, and an exit status that says whether all of it holds.

A claim is one of three: *asserted* (out of its tolerance, the script fails), *negative* (known not to reproduce, and asserted
not to: should it ever hold, the text has to change), or *shown* (a number without a tolerance). `Claims.finish` prints the
table, writes ``<out>/<slug>.md`` with its figures beside it, and returns the exit status.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from tabulate import tabulate

HOLDS, FAILS, NEGATIVE, SHOWN = "holds", "FAILS", "does not reproduce", "shown"


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    where: str
    quantity: str
    expected: str
    ours: str
    verdict: str


class Claims:
    """The claims of one paper.

    Args:
        slug: file name of its page.
        title: of the page.
        reference: how the paper is cited.
        about: a paragraph: what is reproduced, on what, and how.
        arguments: for tests; None: the command line.
    """

    def __init__(self, slug: str, title: str, reference: str, about: str, arguments: list[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=f"{title} ({reference})")
        parser.add_argument("--full", action="store_true", help="the size for a GPU or a patient CPU")
        parser.add_argument("--quick", action="store_true", help="a small size, for tests")
        parser.add_argument("--out", type=Path, default=Path("docs/papers"), help="folder of the page and its figures")
        options = parser.parse_args(arguments)
        self.full: bool = options.full
        self.quick: bool = options.quick
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self._slug, self._title, self._reference, self._about = slug, title, reference, about
        self._claims: list[Claim] = []
        self._figures: list[tuple[str, str]] = []
        self._text: list[str] = []
        self._start = time.perf_counter()

    def near(
        self,
        where: str,
        quantity: str,
        ours: float,
        expected: float,
        *,
        within: float | None = None,
        relative: float | None = None,
        stderr: float | None = None,
        source: str = "",
    ) -> bool:
        """Asserts that a number is what paper or theory says.

        Args:
            where: equation, section or figure of the paper.
            quantity: what it is, in words.
            ours: measured.
            expected: by paper or theory.
            within: absolute tolerance.
            relative: relative tolerance.
            stderr: one standard error of ours, where it has one: shown, no part of the tolerance.
            source: where the expected number is from, if not from the paper.
        """
        if (within is None) == (relative is None):
            raise ValueError("give exactly one of within and relative")
        tolerance = within if within is not None else relative * abs(expected)  # type: ignore[operator]
        shown = f"{expected:.4g} ± {tolerance:.2g}" + (f" ({source})" if source else "")
        return self._add(where, quantity, shown, number(ours, stderr), abs(ours - expected) <= tolerance)

    def between(
        self,
        where: str,
        quantity: str,
        ours: float,
        low: float = -math.inf,
        high: float = math.inf,
        *,
        stderr: float | None = None,
        source: str = "",
    ) -> bool:
        """Asserts that a number lies between two (one may be left out)."""
        shown = (
            f"≤ {high:.4g}" if low == -math.inf else f"≥ {low:.4g}" if high == math.inf else f"{low:.4g} to {high:.4g}"
        )
        shown += f" ({source})" if source else ""
        return self._add(where, quantity, shown, number(ours, stderr), low <= ours <= high)

    def true(self, where: str, quantity: str, expected: str, ours: str, holds: bool) -> bool:
        """Asserts anything else; both sides in words."""
        return self._add(where, quantity, expected, ours, bool(holds))

    def negative(self, where: str, quantity: str, claimed: str, ours: str, refuted: bool) -> bool:
        """A claim that isn't reproduced; fails, should it be.

        Args:
            where: equation, section or figure of the paper.
            quantity: what it is, in words.
            claimed: by the paper.
            ours: measured.
            refuted: whether what was measured contradicts it.
        """
        self._claims.append(Claim(where, quantity, claimed, ours, NEGATIVE if refuted else FAILS))
        return bool(refuted)

    def show(self, where: str, quantity: str, expected: str, ours: str) -> None:
        """A number for the reader, without a tolerance."""
        self._claims.append(Claim(where, quantity, expected, ours, SHOWN))

    def say(self, paragraph: str) -> None:
        """A paragraph below the table: what the numbers mean, what was left out."""
        self._text.append(paragraph)

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """Saves a figure beside the page."""
        path = f"{self._slug}_{name}.png"
        figure.savefig(self.out / path, dpi=130, bbox_inches="tight")
        self._figures.append((path, caption))

    def finish(self) -> int:
        """Prints the table and writes the page.

        Returns:
            0 where all that was asserted holds, else 1.
        """
        rows = [(c.where, c.quantity, c.expected, c.ours, c.verdict) for c in self._claims]
        headers = ("where", "quantity", "paper or theory", "ours", "")
        seconds = time.perf_counter() - self._start
        print(f"\n{self._title} ({self._reference})\n")
        print(tabulate(rows, headers, disable_numparse=True, maxcolwidths=[14, 44, 30, 30, 18]))
        failed = [claim.quantity for claim in self._claims if claim.verdict == FAILS]
        print(
            f"\n{len(rows)} numbers in {seconds:.0f} s; {'out of tolerance: ' + '; '.join(failed) if failed else 'all hold'}"
        )
        page = [f"# {self._title}", f"{self._reference}.", self._about]
        page.append(tabulate(rows, headers, tablefmt="github", disable_numparse=True))
        page += [f"![{caption}](papers/{path})\n\n*{caption}*" for path, caption in self._figures]
        page += self._text
        (self.out / f"{self._slug}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
        return 1 if failed else 0

    def _add(self, where: str, quantity: str, expected: str, ours: str, holds: Any) -> bool:
        self._claims.append(Claim(where, quantity, expected, ours, HOLDS if holds else FAILS))
        return bool(holds)


def number(value: float, stderr: float | None = None) -> str:
    """A number with its standard error, to the digits that the error leaves."""
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"
