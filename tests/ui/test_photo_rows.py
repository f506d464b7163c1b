"""A caption and a mask beside each photo, in a real Chromium."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.helpers import browser as web
from tests.ui.conftest import noise_photos, toy_photos

pytestmark = web.IN_BROWSER
LEAST_BRUSHED = {web.DESK: 512, web.PHONE: 300}
"""Window -> least side of the photo to paint on; px."""
SAYS = "getComputedStyle(document.querySelector('#mask_box'), '::after').content"
HAVE_ROOM = "buttons => buttons.every(one => one.scrollWidth <= one.clientWidth)"


@pytest.fixture
def busy():
    """One core has other work."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


def row(page, number: int, part: str):
    """A part of the row in that place, from 1, of those that are shown."""
    return page.locator("#crops .photo-row").nth(number - 1).locator(part)


def captions(page) -> list[str]:
    return page.locator("#crops textarea").evaluate_all("boxes => boxes.map(box => box.value)")


def is_within(box: dict[str, float], size: tuple[int, int]) -> bool:
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size[0] and bottom <= size[1]


def test_a_row_has_picture_caption_and_buttons_side_by_side_and_the_brush_has_the_window(of_toys, browser):
    with web.visit(browser, of_toys.url) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", [*toy_photos("duck", 5), *toy_photos("rocket", 5)])
        page.wait_for_function("document.querySelectorAll('#crops img').length === 10")
        for size in web.SIZES:
            web.resize(page, size)
            for number in (1, 10):
                parts = ("img", "textarea", ".row-foot [data-event=mask]", ".row-foot [data-event=drop]")
                picture, caption, mask, remove = (row(page, number, part).bounding_box() for part in parts)
                assert picture["width"] == picture["height"] >= 100 and caption["width"] >= 190
                assert caption["x"] >= picture["x"] + picture["width"] and abs(caption["y"] - picture["y"]) < 2
                assert mask["y"] == remove["y"] and mask["x"] + mask["width"] <= remove["x"]
                assert remove["x"] + remove["width"] <= size[0] and remove["height"] >= 32
            photo = web.open_mask_of(page, 2)
            assert photo["width"] >= LEAST_BRUSHED[size] and is_within(photo, size)
            buttons = [page.locator(f"#{name}").bounding_box() for name in ("keep_mask", "put_mask_back", "close_mask")]
            assert page.locator("#mask_box button.lg").evaluate_all(HAVE_ROOM)
            assert all(is_within(box, size) and box["y"] > photo["y"] + photo["height"] for box in buttons)
            page.keyboard.press("Escape")
            page.wait_for_selector("#mask_box", state="detached")
            assert web.fits(page)
        assert not visited.errors


def test_the_brush_says_that_it_opens_and_has_each_photo_however_late_its_parts_come(of_toys, browser, busy):
    """On a busy machine it was an empty field for seconds, without a word."""
    with web.visit(browser, of_toys.url) as visited:
        page, held = visited.page, []
        page.route("**/WebGLRenderer-*.js", lambda route: held.append(route))
        web.open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", toy_photos("duck", 3))
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        web.press(page, "Mask: photo 1")
        page.wait_for_selector("#mask_box")
        page.wait_for_function(f"{SAYS}.includes('Opening the photo')")
        while not held:
            page.wait_for_timeout(100)
        held[0].continue_()
        for number in (1, 2, 3):
            if number > 1:
                web.open_mask_of(page, number)
            page.wait_for_function(web.DRAWN)
            shown = PIL.Image.open(io.BytesIO(page.locator("#mask_editor .image-container").screenshot()))
            assert np.asarray(shown.convert("L")).std() > 20 and page.evaluate(SAYS) == "none"
            web.press(page, "Close")
            page.wait_for_selector("#mask_box", state="detached")
        assert not visited.errors


def test_nothing_typed_is_lost_by_a_turned_page_or_a_photo_more_or_less(served, browser, tmp_path, started):
    files = noise_photos(tmp_path, 15)
    with web.visit(browser, served.url, size=web.PHONE) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        web.add_photos(page, files[:14], "dog")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 12")
        row(page, 2, "textarea").fill("the second\nin two lines")
        web.press(page, "Later photos")
        assert page.locator("#crops img").count() == 2 and "13–14 of 14" in page.inner_text("#crops .row-range")
        row(page, 2, "textarea").fill("the fourteenth")
        page.set_input_files("#photos input[type=file]", files[14:])
        web.says(page, "remarks", "15 photos")
        row(page, 2, "textarea").press_sequentially(" and more", delay=60)
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        row(page, 3, "textarea").fill("the last")
        web.press(page, "Earlier photos")
        web.press(page, "Remove: photo 1")
        web.says(page, "remarks", "14 photos")
        page.wait_for_function("document.querySelectorAll('#crops textarea')[0].value.startsWith('the second')")
        wanted = ["the second in two lines", *[""] * 11, "the fourteenth and more", "the last"]
        assert captions(page) == wanted[:12]
        web.open_tab(page, "Generate")
        web.open_tab(page, "Train")
        assert captions(page) == wanted[:12]
        visited.reload()
        web.open_tab(page, "Train")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 12")
        assert captions(page) == wanted[:12]
        web.press(page, "Later photos")
        assert captions(page) == wanted[12:]
        row(page, 2, "textarea").fill("")
        web.put(page, "class_word", "dog")
        page.click("#start")
        web.says(page, "cost", "words: “a photo of a sks dog”")
        assert web.fits_both(page) and not visited.errors
    (config,) = started
    folder = Path(config["instance_data_dir"])
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert texts == {"photo_01.txt": wanted[0], "photo_13.txt": wanted[12]} and len(list(folder.glob("*.png"))) == 14


def test_made_captions_fill_the_empty_fields_and_the_word_is_asked_for(of_toys, browser):
    with web.visit(browser, of_toys.url) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", toy_photos("duck", 3))
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        web.press(page, "Write captions")
        page.get_by_text("The word for what the photos show (such as dog) is missing").first.wait_for()
        web.put(page, "class_word", "duck")
        row(page, 2, "textarea").fill("mine")
        web.press(page, "Write captions")
        page.wait_for_function("[...document.querySelectorAll('#crops textarea')].every(box => box.value)")
        first, second, third = captions(page)
        assert second == "mine" and all(made.startswith("a photo of a sks duck ") for made in (first, third))
        row(page, 3, "textarea").fill("")
        web.press(page, "Remove: photo 1")
        web.says(page, "remarks", "2 photos")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 2")
        assert captions(page) == ["mine", ""]
        assert not visited.errors
