"""Photos as a person meets them: in a real Chromium, with a real training."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dreambooth_moslora.disk.contents import file_digest
from dreambooth_moslora.disk.queue import RunQueue
from dreambooth_moslora.photos.folder import find_photos, photo_report
from dreambooth_moslora.photos.photo_file import open_mask
from dreambooth_moslora.settings.table import TrainConfig
from dreambooth_moslora.ui.train.train_photos import remove_photo
from tests.helpers import browser as web
from tests.ui.conftest import noise_photos, toy_photos

pytestmark = web.IN_BROWSER
LEAST_BRUSHED = {web.DESK: 512, web.PHONE: 300}
"""Window -> least side of the photo to paint on; px."""
SAYS = "getComputedStyle(document.querySelector('#mask_box'), '::after').content"
HAVE_ROOM = "buttons => buttons.every(one => one.scrollWidth <= one.clientWidth)"
LONG_MS = 900_000
"""Of a training on a busy machine, with its pictures."""
WIDE = (1440, 900)
"""A window; (width, height) px."""


def test_a_run_is_trained_as_captioned_and_brushed_and_put_back_into_the_form(of_toys, browser):
    runs_dir, queue = of_toys.ctx.runs_dir, RunQueue(of_toys.ctx.runs_dir)
    with web.visit(browser, of_toys.url, size=web.DESK) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        web.add_photos(page, toy_photos("duck", 3), "duck")
        web.write_caption(page, 2, "a sks duck at night")
        web.open_box(page, "more_training")
        web.set_number(page, "train_steps", 2)
        for tick in ("scores", "make_masks"):
            page.locator(f"#{tick} input").uncheck()
        photo = web.open_mask_of(page, 1)
        left, middle = photo["x"] + photo["width"] / 4, photo["y"] + photo["height"] / 2
        web.brush(page, (left, middle), (left + photo["width"] / 4, middle))
        page.click("#start")
        page.set_default_timeout(LONG_MS)
        web.says(page, "train_status", "Done.")
        page.wait_for_selector("#sheet_of_run img", state="attached")
        assert not page.locator("#samples img").count() and page.is_visible("#use_adapter")
        web.resize(page, web.PHONE)
        assert web.fits(page)
        visited.reload()
        web.open_tab(page, "Train")
        page.click("#reopen")
        web.says(page, "cost", "The photos of duck")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        assert web.caption(page, 2) == "a sks duck at night"
        queue.folder.mkdir()
        with queue.turn():  # so that it stays there
            page.click("#add_to_queue")
            web.says(page, "cost", "duck-2 waits")
        assert web.fits(page) and not visited.errors
    for run in ("duck", "duck-2"):
        assert (runs_dir / run / "photos" / "photo_02.txt").read_text() == "a sks duck at night"
    trained, (waiting,) = (
        json.loads((runs_dir / "duck" / "job_config.json").read_text()),
        queue.waiting(),
    )
    words = ("instance_prompt", "class_prompt")
    assert [trained[name] == waiting.settings[name] for name in words] == [True, True]
    events = map(json.loads, (runs_dir / "duck" / "metrics.jsonl").read_text().splitlines())
    used = photo_report(
        TrainConfig.from_dict(next(event["config"] for event in events if event["type"] == "start"))
    )
    assert [photo.captions[0] for photo in used.photos if photo.is_captioned] == [
        "a sks duck at night"
    ]
    assert [photo.mask_path is not None for photo in used.photos] == [True, False, False]
    white = np.asarray(open_mask(used.photos[0])) > 127
    rows, columns = (np.where(white.any(axis))[0] / white.shape[1 - axis] for axis in (1, 0))
    assert (
        abs(rows.mean() - 0.5) < 0.03 and 0.2 < columns.min() < 0.26 and 0.48 < columns.max() < 0.54
    )


@pytest.fixture
def busy():
    """One core has other work."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def captions(page) -> list[str]:
    count = page.locator("#crops .photo").count()
    return [web.caption(page, number) for number in range(1, count + 1)]


def is_within(box: dict[str, float], size: tuple[int, int]) -> bool:
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size[0] and bottom <= size[1]


def open_train_tab(page, files: list[Path]) -> None:
    """With these photos in the grid."""
    web.open_tab(page, "Train")
    page.set_input_files("#photos input[type=file]", files)
    page.wait_for_function(f"document.querySelectorAll('#crops img').length === {len(files)}")


def has_all_in_view(page) -> bool:
    """Ten photos, the word and Start, without scrolling."""
    tiles = [f"#crops .photo:nth-child({n})" for n in (1, 10)]
    parts = ["#photos", *tiles, "#class_word", "#start"]
    window = page.viewport_size
    return all(
        is_within(page.locator(part).bounding_box(), (window["width"], window["height"]))
        for part in parts
    )


def has_drawn(page) -> bool:
    page.wait_for_function(web.DRAWN)
    shown = PIL.Image.open(io.BytesIO(page.locator("#mask_editor .image-container").screenshot()))
    return np.asarray(shown.convert("L")).std() > 20 and page.evaluate(SAYS) == "none"


def test_ten_photos_the_word_and_start_are_in_view_and_the_brush_has_the_window_however_late(
    of_toys, browser, busy
):
    """On a busy machine it was an empty field for seconds, without a word."""
    with web.visit(browser, of_toys.url) as visited:
        page, held = visited.page, []
        page.route("**/WebGLRenderer-*.js", lambda route: held.append(route))
        open_train_tab(page, [*toy_photos("duck", 5), *toy_photos("rocket", 5)])
        web.resize(page, WIDE)
        assert has_all_in_view(page)
        web.open_photo(page, 1)
        web.press(page, "Mask: photo 1")
        page.wait_for_function("document.body.classList.contains('opens-mask')")
        page.wait_for_selector("#mask_box")
        page.wait_for_function(f"{SAYS}.includes('Opening the photo')")
        while not held:
            page.wait_for_timeout(100)
        held[0].continue_()
        assert has_drawn(page)
        busy.kill()
        web.press(page, "Close")
        page.wait_for_selector("#mask_box", state="detached")
        assert not page.evaluate("document.body.classList.contains('opens-mask')")
        picture = page.locator("#crops .photo img").nth(2)
        before = picture.get_attribute("src")
        for place, size in enumerate(web.SIZES, 2):
            page.keyboard.press("Escape")  # from the size before
            page.wait_for_selector("#mask_box", state="detached")
            assert web.fits(page)
            web.resize(page, size)
            photo = web.open_mask_of(page, place)
            assert (
                photo["width"] >= LEAST_BRUSHED[size] and is_within(photo, size) and has_drawn(page)
            )
            buttons = [
                page.locator(f"#{name}").bounding_box()
                for name in ("keep_mask", "remove_mask", "close_mask")
            ]
            assert page.locator("#mask_box button.lg").evaluate_all(HAVE_ROOM)
            assert all(
                is_within(box, size) and box["y"] > photo["y"] + photo["height"] for box in buttons
            )
        left, top = (photo[side] + photo["width"] / 10 for side in "xy")
        web.brush(page, (left, top), (left + photo["width"] / 10, top))
        web.says(page, "mask_remarks", "What is inside the line is learned most.")
        kept = of_toys.ctx.workspace
        mask = np.asarray(open_mask(find_photos(kept.photos_dir, "", 128).photos[2])) > 127
        assert mask[: len(mask) // 5, : len(mask) // 4].any() and not mask.all()
        assert picture.get_attribute("src") != before
        assert web.fits(page) and not visited.errors


def test_nothing_typed_is_lost_by_a_photo_more_or_less_on_another_page_too(
    served, browser, tmp_path, started
):
    files = noise_photos(tmp_path, 15)
    with web.visit(browser, served.url, size=web.PHONE) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        web.add_photos(page, files[:14], "dog")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 14")
        web.write_caption(page, 2, "the second\nin two lines")
        web.write_caption(page, 14, "the fourteenth")
        page.set_input_files("#photos input[type=file]", files[14:])
        web.says(page, "remarks", "15 photos")
        page.locator("#crops textarea").press_sequentially(" and more", delay=60)
        page.wait_for_function("document.querySelectorAll('#crops img').length === 15")
        web.write_caption(page, 15, "the last")
        web.press(page, "Remove: photo 1")
        web.says(page, "remarks", "14 photos")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 14")
        wanted = ["the second in two lines", *[""] * 11, "the fourteenth and more", "the last"]
        assert captions(page) == wanted
        web.open_tab(page, "Generate")
        web.open_tab(page, "Train")
        assert captions(page) == wanted
        visited.reload()
        web.open_tab(page, "Train")
        page.wait_for_function("document.querySelectorAll('#crops img').length === 14")
        assert captions(page) == wanted
        web.write_caption(page, 14, "")
        kept = served.ctx.workspace
        remove_photo(kept, file_digest(kept.photos_dir / "photo_12.png"))  # as another page does
        web.put(page, "class_word", "dog")
        page.click("#start")
        web.says(page, "cost", "“a photo of a sks dog” will show your subject.")
        assert web.fits_both(page) and not visited.errors
    (config,) = started
    folder = Path(config["instance_data_dir"])
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert (
        texts == {"photo_01.txt": wanted[0], "photo_12.txt": wanted[12]}
        and len(list(folder.glob("*.png"))) == 13
    )


def test_a_mistake_is_told_beside_its_field(served, browser, tmp_path):
    with web.visit(browser, served.url) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        page.click("#start")
        web.says(page, "remarks", "Add some photos of your subject first")
        page.set_input_files("#photos input[type=file]", noise_photos(tmp_path, 3))
        web.says(page, "remarks", "3 photos")
        page.click("#start")
        web.says(page, "prompts", "The word for what the photos show (such as dog) is missing")
        web.put(page, "class_word", "dog")
        web.says(page, "prompts", "Learns “a photo of a sks dog”")
        web.open_box(page, "more_training")
        web.open_box(page, "expert_training")
        web.set_number(page, "rank", -1)
        page.click("#estimate")
        web.says(page, "cost", "--rank")
        assert not page.locator(".toast-body").count() and not visited.errors
