"""Photos as a person meets them: in a real Chromium, with a real training."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image

from dreambooth_moslora.disk.contents import hash_file
from dreambooth_moslora.disk.process_identity import read_process_start
from dreambooth_moslora.disk.queue import RunQueue
from dreambooth_moslora.photos.folder import build_photo_report
from dreambooth_moslora.photos.photo_file import open_mask
from dreambooth_moslora.settings.train_config import TrainConfig
from dreambooth_moslora.ui.train.train_photos import remove_all_photos, remove_photo
from tests.helpers import browser as web
from tests.ui.conftest import list_toy_photos, write_noise_photos, write_run, write_samples

pytestmark = web.IN_BROWSER
LONG_MS = 900_000
"""Of a training on a busy machine, with its pictures."""
WIDE = (1440, 900)
"""A window; (width, height) px."""


def test_run_trains_with_captions_and_masks(toy_page, browser, tmp_path):
    runs_dir, queue = toy_page.ctx.runs_dir, RunQueue(toy_page.ctx.runs_dir)
    with web.visit(browser, toy_page.url, size=web.DESK) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        files = list_toy_photos("duck", 3)
        with PIL.Image.open(files[0]) as photo:
            left_half = PIL.Image.new("L", photo.size, 0)
            left_half.paste(255, (0, 0, photo.width // 2, photo.height))
        left_half.save(mask := tmp_path / f"{files[0].stem}.mask.png")
        page.set_input_files("#photos input[type=file]", [*files, mask])
        web.says(page, "remarks", "3 photos")
        web.put(page, "class_word", "duck")
        web.write_caption(page, 2, "a sks duck at night")
        web.open_box(page, "more_training")
        web.set_number(page, "train_steps", 2)
        for tick in ("scores", "make_masks"):
            page.locator(f"#{tick} input").uncheck()
        web.press(page, "Show masks")
        web.says(page, "remarks", "What is inside the line is learned most.")
        web.says(page, "remarks", "photo 2: no mask")
        page.click("#start")
        page.set_default_timeout(LONG_MS)
        web.says(page, "train_status", "Done.")
        page.locator("#samples", has_text="Step 2: ").locator("img").first.wait_for()
        assert page.is_visible("#use_adapter")
        web.resize(page, web.PHONE)
        assert web.fits(page) and are_pairs_readable(page)
        visited.reload()
        web.open_tab(page, "Train")
        web.wait_for_photos(page, 3)
        assert web.caption(page, 2) == "a sks duck at night"
        web.put(page, "class_word", "duck")
        queue.folder.mkdir()
        with queue.claim_turn():  # so that it stays there
            page.click("#add_to_queue")
            web.says(page, "cost", "duck-2 waits")
            (waiting,) = queue.list_waiting()
        assert web.fits(page) and not visited.errors
    for run in ("duck", "duck-2"):
        assert (runs_dir / run / "photos" / "photo_02.txt").read_text() == "a sks duck at night"
    trained = json.loads((runs_dir / "duck" / "job_config.json").read_text())
    prompt_names = ("instance_prompt", "class_prompt")
    assert [trained[name] == waiting.settings[name] for name in prompt_names] == [True, True]
    events = map(json.loads, (runs_dir / "duck" / "metrics.jsonl").read_text().splitlines())
    used = build_photo_report(
        TrainConfig.from_dict(next(event["config"] for event in events if event["type"] == "start"))
    )
    assert [photo.captions[0] for photo in used.photos if photo.is_captioned] == [
        "a sks duck at night"
    ]
    assert [photo.mask_path is not None for photo in used.photos] == [True, False, False]
    white = np.asarray(open_mask(used.photos[0])) > 127
    half = white.shape[1] // 2
    assert white[:, :half].all() and not white[:, half:].any()


def are_pairs_readable(page) -> bool:
    """Two photos, then before and after beside each other, and no caption is cut off."""
    tiles = page.locator("#samples .thumbnail-lg")
    photos, before, after = (tiles.nth(number).bounding_box() for number in (1, 2, 3))
    is_cut = "nodes => nodes.some(node => node.scrollWidth > node.clientWidth)"
    return (
        tiles.all_inner_texts()[:2] == ["Photo", "Photo"]
        and photos["y"] < before["y"] == after["y"]
        and not page.locator("#samples .caption-label").evaluate_all(is_cut)
    )


def list_captions(page) -> list[str]:
    count = page.locator("#crops .photo").count()
    return [web.caption(page, number) for number in range(1, count + 1)]


def is_within(box: dict[str, float], size: tuple[int, int]) -> bool:
    right, bottom = box["x"] + box["width"], box["y"] + box["height"]
    return box["x"] >= 0 and box["y"] >= 0 and right <= size[0] and bottom <= size[1]


def open_train_tab(page, files: list[Path]) -> None:
    """With these photos in the grid."""
    web.open_tab(page, "Train")
    page.set_input_files("#photos input[type=file]", files)
    web.wait_for_photos(page, len(files))


def has_all_in_view(page) -> bool:
    """Ten photos, the word and Start, without scrolling."""
    tiles = [f"#crops .photo:nth-child({n})" for n in (1, 10)]
    parts = ["#photos", *tiles, "#class_word", "#start"]
    window = page.viewport_size
    return all(
        is_within(page.locator(part).bounding_box(), (window["width"], window["height"]))
        for part in parts
    )


def test_ten_photos_and_start_fit_the_window(toy_page, browser):
    with web.visit(browser, toy_page.url, size=WIDE) as visited:
        open_train_tab(visited.page, [*list_toy_photos("duck", 5), *list_toy_photos("rocket", 5)])
        assert has_all_in_view(visited.page) and not visited.errors


def test_a_run_in_progress_fits_the_window(toy_page, browser):
    """Its photos, word, progress and newest samples, without scrolling."""
    runs_dir = toy_page.ctx.runs_dir
    events = write_samples(
        runs_dir / "duck", 0, 10, prompts=["a photo of a sks duck"] * 4, seeds=[1, 2, 3, 4]
    )
    step = {"type": "step", "step": 12, "loss": 0.5, "loss_instance": 0.5, "eta_sec": 90}
    started = {"type": "start", "max_train_steps": 240}
    write_run(runs_dir / "duck", started, *events, step, birth=read_process_start(os.getpid()))
    try:
        with web.visit(browser, toy_page.url, size=(1440, 900)) as visited:
            page = visited.page
            open_train_tab(page, list_toy_photos("duck", 5))
            web.says(page, "train_status", "Step 12 of 240")
            page.wait_for_function("document.querySelectorAll('#samples img').length === 8")
            parts = ["#crops .photo:nth-child(5)", "#class_word", "#train_status", "#stop_training"]
            boxes = [page.locator(part).bounding_box() for part in parts]
            boxes.append(page.locator("#samples").bounding_box())
            assert all(is_within(box, (1440, 900)) for box in boxes), boxes
    finally:
        shutil.rmtree(runs_dir / "duck")


def test_upright_crop_is_shown_whole(toy_page, browser, tmp_path):
    """It was cut to a square, without the head."""
    PIL.Image.new("RGB", (128, 256), "red").save(tmp_path / "a.png")
    with web.visit(browser, toy_page.url) as visited:
        open_train_tab(visited.page, [tmp_path / "a.png"])
        fit_script = "getComputedStyle(document.querySelector('#crops .photo img')).objectFit"
        assert visited.page.evaluate(fit_script) == "contain" and not visited.errors


def test_captions_survive_added_and_removed_photos(served, browser, tmp_path, started):
    files = write_noise_photos(tmp_path, 15)
    with web.visit(browser, served.url, size=web.PHONE) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        web.add_photos(page, files[:14], "dog")
        web.wait_for_photos(page, 14)
        web.write_caption(page, 2, "the second\nin two lines")
        web.write_caption(page, 14, "the fourteenth")
        page.set_input_files("#photos input[type=file]", files[14:])
        web.says(page, "remarks", "15 photos")
        page.locator("#crops textarea").press_sequentially(" and more", delay=60)
        web.wait_for_photos(page, 15)
        web.write_caption(page, 15, "the last")
        web.press(page, "Remove: photo 1")
        web.says(page, "remarks", "14 photos")
        web.wait_for_photos(page, 14)
        expected = ["the second in two lines", *[""] * 11, "the fourteenth and more", "the last"]
        assert list_captions(page) == expected
        web.open_tab(page, "Generate")
        web.open_tab(page, "Train")
        assert list_captions(page) == expected
        visited.reload()
        web.open_tab(page, "Train")
        web.wait_for_photos(page, 14)
        assert list_captions(page) == expected
        web.write_caption(page, 14, "")
        workspace = served.ctx.workspace
        remove_photo(
            workspace, hash_file(workspace.photos_dir / "photo_12.png")
        )  # as another page does
        web.put(page, "class_word", "dog")
        page.click("#start")
        web.says(page, "cost", "“a photo of a sks dog” will show your subject.")
        assert web.fits_both(page) and not visited.errors
    (config,) = started
    folder = Path(config["instance_data_dir"])
    texts = {file.name: file.read_text() for file in folder.glob("*.txt")}
    assert (
        texts == {"photo_01.txt": expected[0], "photo_12.txt": expected[12]}
        and len(list(folder.glob("*.png"))) == 13
    )


def test_subject_stays_on_reload_and_is_cleared(served, browser, tmp_path):
    """The photos stayed and their word was gone, and the next subject's photos mixed with them."""
    files = write_noise_photos(tmp_path, 2)
    (tmp_path / "00.txt").write_text("a dog on grass")
    with web.visit(browser, served.url) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", [*files, tmp_path / "00.txt"])
        web.says(page, "remarks", "2 photos")
        page.locator("#class_word input, #class_word textarea").press_sequentially("dog")
        web.says(page, "prompts", "“a photo of a sks dog”")
        visited.reload()
        web.open_tab(page, "Train")
        web.says(page, "prompts", "“a photo of a sks dog”")
        web.wait_for_photos(page, 2)
        assert list_captions(page) == ["a dog on grass", ""]
        page.on("dialog", lambda dialog: dialog.accept())
        web.press(page, "Remove all")
        page.wait_for_selector("#crops", state="hidden")
        word = page.locator("#class_word input, #class_word textarea")
        assert word.input_value() == "dog"
        page.set_input_files("#photos input[type=file]", files)
        web.wait_for_photos(page, 2)
        assert list_captions(page) == ["", ""]
        web.press(page, "New subject")
        page.wait_for_selector("#crops", state="hidden")
        page.wait_for_selector("#prompts", state="hidden")
        assert word.input_value() == "" and not page.locator(".toast-body").count()
        assert not visited.errors


def test_question_about_photos_of_no_toy_goes_with_its_card(toy_page, browser, tmp_path):
    """“Train it anyway” stayed below an estimate, and below the empty form of a new subject."""
    with web.visit(browser, toy_page.url) as visited:
        page = visited.page
        open_train_tab(page, write_noise_photos(tmp_path, 3))
        # Pasted: no key was pressed.
        word = page.locator("#class_word input, #class_word textarea")
        word.click()
        page.keyboard.insert_text("dog")
        page.click("#start")
        web.says(page, "cost", "cannot learn what these photos show")
        page.wait_for_selector("#train_anyway")
        page.click("#estimate")
        web.says(page, "cost", "GiB of memory")
        page.wait_for_selector("#train_anyway", state="hidden")
        page.click("#start")
        page.wait_for_selector("#train_anyway")
        visited.reload()
        web.open_tab(page, "Train")
        web.says(page, "prompts", "“a photo of a sks dog”")
        page.click("#start")
        page.wait_for_selector("#train_anyway")
        page.on("dialog", lambda dialog: dialog.accept())
        web.press(page, "New subject")
        page.wait_for_selector("#train_anyway", state="hidden")
        page.wait_for_function("!document.getElementById('cost').innerText.trim()")
        assert not visited.errors


def test_mistake_is_shown_below_the_buttons(served, browser, tmp_path):
    remove_all_photos(served.ctx.workspace)  # of the tests before this one
    with web.visit(browser, served.url) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        page.click("#start")
        web.says(page, "cost", "Add some photos of your subject first")
        page.set_input_files("#photos input[type=file]", write_noise_photos(tmp_path, 3))
        web.says(page, "remarks", "3 photos")
        page.click("#start")
        web.says(page, "cost", "The word for what the photos show (such as dog) is missing")
        web.put(page, "class_word", "dog")
        web.says(page, "prompts", "Learns “a photo of a sks dog”")
        web.open_box(page, "more_training")
        web.open_box(page, "expert_training")
        web.set_number(page, "rank", -1)
        page.click("#estimate")
        web.says(page, "cost", "“Rank”")
        assert not page.locator(".toast-body").count() and not visited.errors
