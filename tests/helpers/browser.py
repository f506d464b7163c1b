"""A real Chromium for the tests and the screenshots: Debian's own, with nothing that phones home."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE_MS = 240_000
SETTLE_MS = 150


GONE_PLOT = "Cannot read properties of null (reading 'offsetWidth')"
"""Gradio's plot measures itself once more after it has left the page (AltairPlot's ResizeObserver); nothing follows."""


@dataclass
class Visit:
    """A page, and what it said and asked for while it was open."""

    page: Page
    context: BrowserContext
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, *, size: tuple[int, int] = (1280, 900), dark: bool = False) -> Iterator[Visit]:
    """Open `url` in a fresh profile of `size` (width, height) px and wait until it can be used."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light"
    )
    context.set_default_timeout(PATIENCE_MS)
    visited = Visit(context.new_page(), context)
    visited.page.on("console", lambda message: _note_error(visited, message))
    visited.page.on("pageerror", lambda error: _note_page_error(visited, str(error)))
    visited.page.on("request", lambda request: visited.hosts.add(request.url.split("/")[2].split(":")[0]))
    visited.page.goto(url)
    visited.page.wait_for_selector("#run")
    try:
        yield visited
    finally:
        context.close()


def _note_page_error(visited: Visit, text: str) -> None:
    if text != GONE_PLOT:
        visited.errors.append(text)


def _note_error(visited: Visit, message) -> None:
    if message.type == "error":
        visited.errors.append(message.text)


def set_number(page: Page, elem_id: str, value: object) -> None:
    """Type a number into a field until it stays there: a box that was just opened sets its fields once more."""
    box = page.locator(f"#{elem_id} input[type=number]").first
    for _ in range(20):
        box.fill(str(value))
        box.press("Tab")
        page.wait_for_timeout(SETTLE_MS)
        if float(box.input_value() or "nan") == float(str(value)):
            return
    raise AssertionError(f"{elem_id} did not keep {value}")
