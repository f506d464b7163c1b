"""A real Chromium for the tests and the screenshots: Debian's own, with nothing that phones
home."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and find_spec("playwright")), reason="there is no Chromium, or no playwright"
    ),
]
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
DESK, PHONE = SIZES = ((1366, 768), (390, 844))
"""Windows: (width, height) px."""


@dataclass
class Visit:
    """A page, and what it said and asked for while it was open."""

    page: Page
    context: BrowserContext
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def reload(self) -> None:
        """Load the page again. Gradio's client tells of the requests that the page drops as it
        leaves."""
        count = len(self.errors)
        self.page.reload()
        open_tab(self.page, "Generate")
        self.page.wait_for_selector("#run")
        del self.errors[count:]


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, *, size: tuple[int, int] = (1280, 900)) -> Iterator[Visit]:
    """Open `url` in a fresh profile of `size` (width, height) px and wait until it can be used."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.set_default_timeout(PATIENCE_MS)
    visited = Visit(context.new_page(), context)
    visited.page.on(
        "console", lambda message: message.type == "error" and visited.errors.append(message.text)
    )
    visited.page.on("pageerror", lambda error: visited.errors.append(str(error)))
    visited.page.on(
        "request", lambda request: visited.hosts.add(request.url.split("/")[2].split(":")[0])
    )
    visited.page.goto(url)
    open_tab(visited.page, "Generate")
    visited.page.wait_for_selector("#run")
    try:
        yield visited
    finally:
        context.close()


def says(page: Page, elem_id: str, text: str) -> None:
    """Wait until the element says so. Raises AssertionError, with what it says instead."""
    from playwright.sync_api import TimeoutError

    inside = "([id, words]) => document.getElementById(id)?.innerText.includes(words)"
    try:
        page.wait_for_function(inside, arg=[elem_id, text])
    except TimeoutError as error:
        actual = page.evaluate("id => document.getElementById(id)?.innerText", elem_id)
        raise AssertionError(f"{elem_id} says {actual!r}, not {text!r}") from error


def put(page: Page, elem_id: str, text: str) -> None:
    page.fill(f"#{elem_id} textarea, #{elem_id} input", text)


def open_tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def open_box(page: Page, elem_id: str) -> None:
    page.locator(f"#{elem_id} button.label-wrap").click()


def add_photos(page: Page, files: list, word: str) -> None:
    """The photos of a subject and what they show, on the Train tab."""
    page.set_input_files("#photos input[type=file]", files)
    says(page, "remarks", f"{len(files)} photos")
    put(page, "class_word", word)


def resize(page: Page, size: tuple[int, int]) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})


def fits(page: Page) -> bool:
    """Nothing stands out at the right, however narrow the page."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def fits_both(page: Page) -> bool:
    """On a desk, and on a phone, whose window it has afterwards."""
    for size in SIZES:
        resize(page, size)
        if not fits(page):
            return False
    return True


def press(page: Page, name: str) -> None:
    """The first of the buttons that are called so."""
    page.get_by_role("button", name=name, exact=True).first.click()


def open_photo(page: Page, number: int) -> None:
    """Open the caption of a photo of the grid, from 1."""
    tile = page.locator("#crops .photo").nth(number - 1)
    tile.wait_for()
    if "photo-chosen" not in (tile.get_attribute("class") or ""):
        tile.locator(".photo-pick").click()
    page.locator(f"#crops textarea[aria-label='Caption of photo {number}']").wait_for()


def wait_for_photos(page: Page, count: int) -> None:
    """Wait until the grid shows this many photos."""
    page.wait_for_function("n => document.querySelectorAll('#crops img').length === n", arg=count)


def caption(page: Page, number: int) -> str:
    open_photo(page, number)
    return page.input_value("#crops textarea")


def write_caption(page: Page, number: int, text: str) -> None:
    """Type the caption and leave the field, which stores it."""
    open_photo(page, number)
    page.fill("#crops textarea", text)
    page.locator("#crops textarea").blur()


def set_number(page: Page, elem_id: str, value: object) -> None:
    """Type a number into a field until it stays there: a box that was just opened sets its fields
    once more."""
    box = page.locator(f"#{elem_id} input[type=number]").first
    for _ in range(20):
        box.fill(str(value))
        box.press("Tab")
        page.wait_for_timeout(SETTLE_MS)
        if float(box.input_value() or "nan") == float(str(value)):
            return
    raise AssertionError(f"{elem_id} did not keep {value}")
