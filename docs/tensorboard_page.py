"""TensorBoard in a headless Chromium: what a run's page shows, and pictures of it for the documentation.

    python docs/tensorboard_page.py [LOGDIR] [--output docs/figures/tensorboard]

Without LOGDIR it first trains examples/demo.py's network for a minute. Needs Debian's chromium and ``pip install
playwright``. The page may ask nothing but this machine for anything.
"""

from __future__ import annotations

import argparse
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: The charts to begin with, as a filter of the time series: of an ordinary spectrum, and of one in an optimizer's metric.
FIRST = ("lambda_max", "sharpness_times_lr", "noise_edge", "spectrum", "spectrum_over_time", "overhead")
FIRST_IN_METRIC = ("lambda_max", "preconditioned/sharpness_over_limit", *FIRST[2:])
#: Titles in the custom scalars, likewise; the one that comes first, and one of the next group.
TITLES = ("lambda_max against 2/lr", "largest eigenvalues")
TITLES_IN_METRIC = ("lambda_max against its limit", "largest eigenvalues")
_START_SECONDS = 60.0
# What a reader sets by hand: all points within the charts (by default those far out are cut off), no settings beside them.
_SETTINGS = """try {
    localStorage.setItem("_ignoreYOutliers", "false");
    localStorage.setItem("_tb_global_settings", '{"ignoreOutliers": false, "settingsPaneOpened": false}');
} catch (error) {}  // about:blank has no storage"""


def find_browser() -> str | None:
    """The path of a Chromium, None without one."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def tensorboard(log_directory: Path) -> Iterator[str]:
    """Runs TensorBoard on ``log_directory`` and gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            [*command, "--logdir", str(log_directory), "--reload_multifile=true"],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            _wait_for(address, server)
            yield address
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
            raise
        finally:
            server.terminate()
            server.wait(10)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"TensorBoard ended with exit code {server.returncode}")
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{address}/data/runs") as answer:
            if b'"' in answer.read():  # it answers before it has read the first run
                return
        time.sleep(0.1)
    raise TimeoutError(f"TensorBoard showed no run within {_START_SECONDS:.0f} s")


@contextmanager
def browser_page(executable: str, *addresses: str, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A page of a headless Chromium that may load from these addresses and from nowhere else."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.add_init_script(_SETTINGS)
            page.route(lambda url: not url.startswith((*addresses, "data:", "blob:")), lambda route: route.abort())
            yield page
        finally:
            browser.close()


class Board:
    """The dashboards of one TensorBoard as a reader sees them; text and elements, not its data API.

    Args:
        page: of a browser.
        address: of the TensorBoard.

    Raises:
        playwright.sync_api.TimeoutError: (every method) something isn't there.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.wait(20.0)

    def wait(self, seconds: float) -> None:
        """Sets how long to wait for what should be there."""
        self.page.set_default_timeout(1000.0 * seconds)

    def open(self, tab: str, query: str = "") -> None:
        """Opens a dashboard afresh (a change of the fragment alone would keep the old page)."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}/?darkMode=false{query}#{tab}")

    def time_series(self, tags: Sequence[str]) -> dict[str, tuple[float, int] | None]:
        """Opens the time series of ``tags`` without smoothing.

        Returns:
            By tag, the last value and its step as written below the scalar's chart; None for an image or a histogram.
        """
        groups = {tag[: tag.rfind("/") + 1] for tag in tags}
        prefix = groups.pop() if len(groups) == 1 else ""  # written once, the filter fits into its field
        pattern = f"^{prefix}({'|'.join(re.escape(tag.removeprefix(prefix)) for tag in tags)})$"
        self.open("timeseries", f"&smoothing=0&tagFilter={quote(pattern)}")
        shown: dict[str, tuple[float, int] | None] = {}
        for tag in tags:
            card = self.page.locator("card-view").filter(has=self.page.locator(f'[title="{tag}"]'))
            card.wait_for()
            card.scroll_into_view_if_needed()  # it is drawn once it is seen
            if card.locator("scalar-card-component").count():
                card.locator("line-chart canvas, line-chart svg path").first.wait_for(state="attached")
                shown[tag] = _last_row(card)
            else:
                card.locator("img, histogram-component svg path").first.wait_for()
                shown[tag] = None
        self._scroll_up()
        return shown

    def custom_scalars(self, titles: Sequence[str]) -> dict[str, int]:
        """Opens the custom scalars; by title, how many series its chart has drawn."""
        self.open("custom_scalars&_smoothingWeight=0")
        drawn = {}
        for title in titles:
            kinds = "tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card"
            card = self.page.locator(kinds).filter(has=self.page.get_by_text(title, exact=True))
            card.wait_for()
            card.scroll_into_view_if_needed()
            drawn[title] = card.locator("path.line").count()
        self._scroll_up()
        return drawn

    def _scroll_up(self) -> None:
        size = self.page.viewport_size
        assert size is not None
        self.page.mouse.move(size["width"] / 2, size["height"] / 2)
        self.page.mouse.wheel(0, -100_000)

    def images(self, tags: Sequence[str]) -> dict[str, tuple[int, int, bytes]]:
        """Opens the images; by tag, width and height of the picture that was loaded, and a PNG of how it is seen."""
        self.open("images")
        pictures = {}
        for tag in tags:
            card = self.page.locator("tf-image-loader").filter(has=self.page.get_by_text(tag, exact=True))
            image = card.locator("img").first
            image.wait_for()
            self.page.wait_for_function("image => image.complete", arg=image.element_handle())
            width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
            pictures[tag] = width, height, image.screenshot()
        self._scroll_up()
        return pictures

    def histogram(self, tag: str) -> int:
        """Opens the histograms; at how many steps there is one of ``tag``."""
        self.open("histograms")
        card = self.page.locator("tf-histogram-loader").filter(has=self.page.get_by_text(tag, exact=True))
        card.locator("svg .histogram path").first.wait_for()
        return card.locator("svg .histogram").count()

    def notes(self, tag: str) -> str:
        """Opens the texts; what is written under ``tag``."""
        self.open("text")
        card = self.page.locator("tf-text-loader").filter(has=self.page.get_by_text(tag, exact=True).first)
        card.locator("li").first.wait_for()
        return "\n".join(card.locator("li").all_inner_texts())

    def picture(self, path: Path, height: int | None = None) -> None:
        """Saves what is seen, once nothing moves any more; ``height``: of the upper part that is kept, in pixels."""
        size = self.page.viewport_size
        assert size is not None
        self.page.mouse.move(size["width"] - 2, 1)  # away from charts, which show what is under it
        self.page.wait_for_timeout(1500)
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"]}
        self.page.screenshot(path=path, clip=clip)


def _last_row(card: Locator) -> tuple[float, int]:
    """Value and step from the table below a chart."""
    row = card.locator("tb-data-table-content-row").first
    row.wait_for()
    cells = [text.strip().replace(",", "") for text in row.locator("tb-data-table-content-cell").all_inner_texts()]
    heads = [text.strip() for text in card.locator("tb-data-table-header-cell").all_inner_texts()]
    found = dict(zip(heads, cells, strict=True))
    return float(found["Value"].replace("−", "-")), int(found["Step"])


def take_pictures(
    log_directory: Path, beginning: str, browser: str, name: str = "rmt", in_metric: bool = False
) -> None:
    """Of the dashboards, as ``<beginning>_<dashboard>.png``; of the monitor of this name."""
    first, titles = (FIRST_IN_METRIC, TITLES_IN_METRIC) if in_metric else (FIRST, TITLES)
    with tensorboard(log_directory) as address, browser_page(browser, address) as page:
        board = Board(page, address)
        board.time_series([f"{name}/{tag}" for tag in first])
        board.picture(Path(f"{beginning}_time_series.png"))
        board.custom_scalars(titles)
        board.picture(Path(f"{beginning}_custom_scalars.png"))
        board.images([f"{name}/spectrum", f"{name}/spectrum_over_time"])
        board.picture(Path(f"{beginning}_images.png"))
        board.histogram(f"{name}/density")
        board.picture(Path(f"{beginning}_histograms.png"), height=560)


def main(arguments: Sequence[str] | None = None) -> None:
    """Takes the documentation's pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_directory", type=Path, nargs="?", help="of one run")
    parser.add_argument("--output", default="docs/figures/tensorboard", help="beginning of the files' names")
    parser.add_argument("--name", default="rmt", help="of the monitor")
    parser.add_argument("--in-metric", action="store_true", help="it measures in an optimizer's metric")
    options = parser.parse_args(arguments)
    browser = find_browser()
    if browser is None:
        parser.error(f"no browser: none of {', '.join(BROWSERS)}; apt-get install chromium")
    if options.log_directory is not None:
        take_pictures(options.log_directory, options.output, browser, options.name, options.in_metric)
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import demo

    from lightning_rmt import SpectrumMonitor

    with tempfile.TemporaryDirectory() as folder:
        # by steps rather than by the clock, so that the pictures look alike on every machine
        monitor = SpectrumMonitor(every_n_steps=150, light_every_n_steps=30, custom_scalars=True)
        demo.train(Path(folder), 52, monitor, seconds=900)
        take_pictures(Path(folder) / "lightning_logs", options.output, browser)


if __name__ == "__main__":
    main()
