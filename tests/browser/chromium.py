"""A real browser for tests: the system's Chromium without a window, and a note of all that a page complains of.

    with launched() as browser:
        page = browser.new_page()
        seen = watched(page, "http://localhost:8000/")
        page.goto("http://localhost:8000/index.html")
        assert not seen.complaints

Where there is no browser, or no playwright to drive it, the test is skipped with the command that installs it. The
browser reaches no other machine: a page that needs the network fails here as it would in a room without one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run"),
    "--disable-dev-shm-usage",  # a container's /dev/shm is too small for a long page
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
INSIDE = ("data", "blob", "about")  # addresses of what the page holds already


def executable() -> str | None:
    """The browser: what ``CHROMIUM`` names, else the first on the PATH; None where there is none.

    Raises
    ------
    ValueError : ``CHROMIUM`` names nothing that runs.
    """
    if chosen := os.environ.get("CHROMIUM", "").strip():
        if found := shutil.which(chosen):
            return found
        raise ValueError(f"CHROMIUM={chosen!r} is no program; it must be a browser's name or path, or not be set")
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser, for as long as the block lasts."""
    path = executable()
    if path is None:
        pytest.skip("there is no browser: apt-get install chromium (or CHROMIUM=/path/to/chrome)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("there is nothing to drive the browser with: pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """What a page has complained of since `watched` was called, one line each."""

    console: list[str] = field(default_factory=list)
    """Errors in the console."""
    errors: list[str] = field(default_factory=list)
    """Exceptions that no script caught."""
    failed: list[str] = field(default_factory=list)
    """Requests that got no answer, or one that says no."""
    elsewhere: list[str] = field(default_factory=list)
    """Requests to another place than the page's own."""

    @property
    def complaints(self) -> list[str]:
        """All of them, each with its kind."""
        kinds = {
            "console": self.console,
            "uncaught": self.errors,
            "failed": self.failed,
            "asked elsewhere": self.elsewhere,
        }
        return [f"{kind}: {line}" for kind, lines in kinds.items() for line in lines]


def watched(page: Page, base: str) -> Watched:
    """Take down what ``page`` complains of from now on.

    Parameters
    ----------
    base : where all that the page asks for should lie: a server (``http://localhost:8000/``, of which the host and the
        port count) or a folder (``file:///folder/``).
    """
    seen = Watched()

    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            seen.console.append(f"{message.text} ({message.location['url']})")

    def request(asked: Request) -> None:
        if not _lies_in(base, asked.url):
            seen.elsewhere.append(asked.url)

    def answered(response: Response) -> None:
        if response.status >= 400:
            seen.failed.append(f"{response.status} {response.url}")

    def failed(asked: Request) -> None:
        # an aborted one was given up by the page itself, as when it is left
        if asked.failure != "net::ERR_ABORTED":
            seen.failed.append(f"{asked.failure} {asked.url}")

    page.on("console", console)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", request)
    page.on("response", answered)
    page.on("requestfailed", failed)
    page.on("websocket", lambda socket: _lies_in(base, socket.url) or seen.elsewhere.append(socket.url))
    return seen


def _lies_in(base: str, url: str) -> bool:
    home, there = urlsplit(base), urlsplit(url)
    if there.scheme in INSIDE:
        return True
    if home.scheme == "file":
        return there.scheme == "file" and there.path.startswith(home.path)
    return there.netloc == home.netloc
