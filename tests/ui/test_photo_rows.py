"""A caption and a mask beside each photo, in a real Chromium: what is written and painted there is what is trained."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.core import assets_folder
from dreambooth_moslora.photos.folder import photo_report
from dreambooth_moslora.photos.photo_file import open_mask
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.jobs import Jobs
from tests.helpers.browser import IN_BROWSER, add_photos, fits, open_box, open_tab, put, says, set_number, visit
from tests.helpers.ui_server import serve

pytestmark = IN_BROWSER
SIZES = [(1366, 768), (390, 844)]
LEAST_BRUSHED = {1366: 512, 390: 300}
"""Width of the window -> least side of the photo to paint on; px."""
LONG_MS = 900_000
SAYS = "getComputedStyle(document.querySelector('#mask_box'), '::after').content"
HAVE_ROOM = "buttons => buttons.every(one => one.scrollWidth <= one.clientWidth)"
DRAWN = "window.editor?.background_image && window.editor.app.ticker && !window.editor.app.ticker.started"
"""Whether the editor has its photo, and rests as all is drawn."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page on the embedded base."""
    with serve("toy", tmp_path_factory.mktemp("app")) as server:
        yield server
        for job in Jobs(server.ctx.runs_dir).all():
            if job.is_alive:
                os.kill(job.pid, 9)


@pytest.fixture
def busy():
    """One core has other work."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


def toys(count: int, name: str = "duck") -> list[Path]:
    return [assets_folder() / "subjects" / name / f"0{number}.jpg" for number in range(count)]


def noise(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number:02d}.png" for number in range(count)]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 255, (150, 140 + number, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(file)
    return files


def row(page, number: int, part: str = "", last: str = ""):
    """A part of the row in that place, from 1, of those that are shown."""
    return page.locator(f"#crops{last} .photo-row").nth(number - 1).locator(part or "img")


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def captions(page) -> list[str]:
    return page.locator("#crops textarea").evaluate_all("boxes => boxes.map(box => box.value)")


def open_mask_of(page, number: int) -> dict[str, float]:
    """The rectangle of the photo in the editor."""
    press(page, f"Mask: photo {number}")
    canvas = page.locator("#mask_editor canvas").last
    canvas.wait_for()
    page.wait_for_function(DRAWN)
    box, zoom = canvas.bounding_box(), page.inner_text("#mask_editor .zoom-number")
    side = 768 * int(zoom.rstrip("%")) / 100
    return {
        "x": box["x"] + (box["width"] - side) / 2,
        "y": box["y"] + (box["height"] - side) / 2,
        "width": side,
        "height": side,
    }


def is_within(box: dict[str, float], size: tuple[int, int]) -> bool:
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size[0] and bottom <= size[1]


@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_picture_caption_and_buttons_side_by_side_and_the_brush_has_the_window(served, browser, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", [*toys(5), *toys(5, "rocket")])
        page.wait_for_function("document.querySelectorAll('#crops img').length === 10")
        for number in (1, 10):
            parts = ("img", "textarea", ".row-foot [data-event=mask]", ".row-foot [data-event=drop]")
            picture, caption, mask, remove = (row(page, number, part).bounding_box() for part in parts)
            assert picture["width"] == picture["height"] >= 100 and caption["width"] >= 190
            assert caption["x"] >= picture["x"] + picture["width"] and abs(caption["y"] - picture["y"]) < 2
            assert mask["y"] == remove["y"] and mask["x"] + mask["width"] <= remove["x"]
            assert remove["x"] + remove["width"] <= size[0] and remove["height"] >= 32
        photo = open_mask_of(page, 2)
        assert photo["width"] >= LEAST_BRUSHED[size[0]] and is_within(photo, size)
        buttons = [page.locator(f"#{name}").bounding_box() for name in ("keep_mask", "put_mask_back", "close_mask")]
        assert page.locator("#mask_box button.lg").evaluate_all(HAVE_ROOM)
        assert all(is_within(box, size) and box["y"] > photo["y"] + photo["height"] for box in buttons)
        page.keyboard.press("Escape")
        page.wait_for_selector("#mask_box", state="detached")
        assert fits(page) and not visited.errors


def test_the_brush_says_that_it_opens_and_has_each_photo_however_late_its_parts_come(served, browser, busy):
    """On a busy machine it was an empty field for seconds, without a word."""
    with visit(browser, served.url, size=SIZES[0]) as visited:
        page, held = visited.page, []
        page.route("**/WebGLRenderer-*.js", lambda route: held.append(route))
        open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", toys(3))
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        press(page, "Mask: photo 1")
        page.wait_for_selector("#mask_box")
        page.wait_for_function(f"{SAYS}.includes('Opening the photo')")
        while not held:
            page.wait_for_timeout(100)
        held[0].continue_()
        for number in (1, 2, 3):
            if number > 1:
                open_mask_of(page, number)
            page.wait_for_function(DRAWN)
            shown = PIL.Image.open(io.BytesIO(page.locator("#mask_editor .image-container").screenshot()))
            assert np.asarray(shown.convert("L")).std() > 20 and page.evaluate(SAYS) == "none"
            press(page, "Close")
            page.wait_for_selector("#mask_box", state="detached")
        assert not visited.errors


@pytest.mark.parametrize("size", SIZES)
def test_nothing_typed_is_lost_by_a_turned_page_or_a_photo_more_or_less(served, browser, tmp_path, started, size):
    files = noise(tmp_path, 15)
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        add_photos(page, files[:14], "dog")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 12")
        row(page, 2, "textarea").fill("the second\nin two lines")
        press(page, "Later photos")
        assert page.locator("#crops img").count() == 2 and "13–14 of 14" in page.inner_text("#crops .row-range")
        row(page, 2, "textarea").fill("the fourteenth")
        page.set_input_files("#photos input[type=file]", files[14:])
        says(page, "remarks", "15 photos")
        row(page, 2, "textarea").press_sequentially(" and more", delay=60)
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        row(page, 3, "textarea").fill("the last")
        press(page, "Earlier photos")
        press(page, "Remove: photo 1")
        says(page, "remarks", "14 photos")
        page.wait_for_function("document.querySelectorAll('#crops textarea')[0].value.startsWith('the second')")
        wanted = ["the second in two lines", *[""] * 11, "the fourteenth and more", "the last"]
        assert captions(page) == wanted[:12]
        open_tab(page, "Generate")
        open_tab(page, "Train")
        assert captions(page) == wanted[:12]
        visited.reload()
        open_tab(page, "Train")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 12")
        assert captions(page) == wanted[:12]
        press(page, "Later photos")
        assert captions(page) == wanted[12:]
        row(page, 2, "textarea").fill("")
        put(page, "class_word", "dog")
        page.click("#start")
        says(page, "cost", "words: “a photo of a sks dog”")
        assert fits(page) and not visited.errors
    (config,) = started
    folder = Path(config["instance_data_dir"])
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert texts == {"photo_01.txt": wanted[0], "photo_13.txt": wanted[12]} and len(list(folder.glob("*.png"))) == 14


def test_made_captions_fill_the_empty_fields_and_the_word_is_asked_for(served, browser):
    with visit(browser, served.url) as visited:
        page = visited.page
        open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", toys(3))
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        press(page, "Write captions")
        page.get_by_text("The word for what the photos show (such as dog) is missing").first.wait_for()
        put(page, "class_word", "duck")
        row(page, 2, "textarea").fill("mine")
        press(page, "Write captions")
        page.wait_for_function("[...document.querySelectorAll('#crops textarea')].every(box => box.value)")
        first, second, third = captions(page)
        assert second == "mine" and all(made.startswith("a photo of a sks duck ") for made in (first, third))
        row(page, 3, "textarea").fill("")
        press(page, "Remove: photo 1")
        says(page, "remarks", "2 photos")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 2")
        assert captions(page) == ["mine", ""]
        assert not visited.errors


def test_a_run_from_the_page_trains_with_the_edited_caption_and_the_brushed_mask(served, browser):
    with visit(browser, served.url, size=SIZES[0]) as visited:
        page = visited.page
        page.set_default_timeout(LONG_MS)
        open_tab(page, "Train")
        add_photos(page, toys(2, "rocket"), "rocket")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 2")
        row(page, 2, "textarea").fill("a photo of a sks rocket on the moon")
        open_box(page, "more_training")
        set_number(page, "train_steps", 1)
        for tick in ("scores", "make_masks"):
            page.locator(f"#{tick} input").uncheck()
        photo = open_mask_of(page, 1)
        page.mouse.move(photo["x"] + photo["width"] / 4, photo["y"] + photo["height"] / 2)
        page.mouse.down()
        page.mouse.move(photo["x"] + photo["width"] / 2, photo["y"] + photo["height"] / 2, steps=8)
        page.mouse.up()
        page.click("#keep_mask")
        page.wait_for_selector("#mask_box", state="detached")
        page.click("#start")
        says(page, "train_status", "Done.")
        assert not visited.errors
    run = served.ctx.runs_dir / "rocket"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = next(event["config"] for event in events if event["type"] == "start")
    first, second = photo_report(TrainConfig.from_dict(config)).photos
    assert [photo.is_captioned for photo in (first, second)] == [False, True]
    assert second.captions == ("a photo of a sks rocket on the moon",) and second.mask_path is None
    white = np.asarray(open_mask(first)) > 127
    rows, columns = (np.where(white.any(axis))[0] / white.shape[1 - axis] for axis in (1, 0))
    assert abs(rows.mean() - 0.5) < 0.03 and 0.2 < columns.min() < 0.26 and 0.48 < columns.max() < 0.54
    assert "captions: 1 of 2 photos have none that is the instance prompt itself" in (run / "train.log").read_text()
