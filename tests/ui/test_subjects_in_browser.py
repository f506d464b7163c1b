"""Several subjects and new tokens as a person meets them: in a real Chromium, with the real training program."""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.core import assets_folder
from dreambooth_moslora.ui.jobs import Jobs
from tests.helpers.browser import IN_BROWSER, add_photos, fits, open_box, open_tab, put, says, set_number, visit
from tests.helpers.ui_server import serve

pytestmark = IN_BROWSER
LONG_MS = 900_000
"""Of a training on a busy machine, with its pictures."""
IN_VIEW = """id => {
  const box = document.getElementById(id).getBoundingClientRect();
  return box.top >= 0 && box.bottom <= innerHeight;
}"""
SIZES = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def of_toys(tmp_path_factory):
    """The page on the embedded base."""
    with serve("toy", tmp_path_factory.mktemp("toys")) as server:
        yield server
        for job in Jobs(server.ctx.runs_dir).all():
            if job.is_alive:
                os.kill(job.pid, 9)


@pytest.fixture
def photos(tmp_path):
    """Three photos of one subject, two of another."""
    found = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(found):
        PIL.Image.effect_noise((120, 90 + number), 80).convert("RGB").save(file)
    return found[:3], found[3:]


def columns(page, elem_id: str) -> int:
    tracks = "e => getComputedStyle(e).gridTemplateColumns"
    return len(page.locator(f"#{elem_id} .grid-container").evaluate(tracks).split())


def fill_two(page, first: list[Path], second: list[Path], words: tuple[str, str]) -> None:
    open_tab(page, "Train")
    add_photos(page, first, words[0])
    page.click("#add_subject")
    add_photos(page, second, words[1], 2)
    says(page, "prompts_2", f"Learns “a photo of a zwx {words[1]}”")


@pytest.mark.parametrize("size", SIZES)
def test_a_second_subject_is_asked_for_trained_and_taken_away(served, browser, photos, started, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        assert not page.locator("#subject_2").is_visible() and not page.locator("#remove_subject").is_visible()
        fill_two(page, *photos, ("dog", "cat"))
        assert page.locator("#crops_2 img").count() == 2 and fits(page)
        page.click("#estimate")
        page.click("#cost summary")
        says(page, "cost", "2 subjects, 3 + 2 photos")
        page.click("#start")
        says(page, "cost", "words: “a photo of a sks dog”, “a photo of a zwx cat”")
        page.get_by_role("button", name="Show masks").last.click()
        says(page, "mask_remarks", "photo 2 of subject 2: no mask")
        visited.reload()
        open_tab(page, "Train")
        page.wait_for_function("document.querySelectorAll('#crops_2 img').length === 2")
        for number in (3, 4):
            page.click("#add_subject")
            page.wait_for_selector(f"#subject_{number}")
        page.wait_for_selector("#add_subject", state="hidden")
        assert fits(page)
        for number in (4, 3, 2):
            page.get_by_role("button", name=f"Remove subject {number}").click()
            page.wait_for_selector(f"#subject_{number}", state="hidden")
        put(page, "class_word", "dog")
        page.click("#start")
        says(page, "cost", "words: “a photo of a sks dog”")
        assert not visited.errors
    two, one = started
    assert [table["instance_prompt"] for table in two["subjects"]] == ["a photo of a sks dog", "a photo of a zwx cat"]
    assert one["subjects"] == [] and one["instance_prompt"] == "a photo of a sks dog"


@pytest.mark.parametrize("size", SIZES)
def test_new_tokens_are_a_tick_with_its_words(served, browser, photos, started, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        add_photos(page, photos[0], "dog")
        open_box(page, "more_training")
        assert not page.locator("#tokens_begin_as").is_visible()
        page.locator("#new_tokens input").check()
        page.wait_for_selector("#tokens_begin_as")
        put(page, "tokens_begin_as", "brown dog")
        set_number(page, "tokens_rate", 0.002)
        page.click("#start")
        says(page, "cost", "words: “a photo of a sks dog”")
        if size[0] <= 760:
            page.wait_for_function(IN_VIEW, arg="train_status")
        page.click("#add_subject")
        add_photos(page, photos[1], "cat", 2)
        put(page, "tokens_begin_as_2", "grey cat")
        page.click("#start")
        says(page, "cost", "words: “a photo of a sks dog”, “a photo of a zwx cat”")
        page.locator("#new_tokens input").uncheck()
        page.wait_for_selector("#tokens_begin_as_2", state="hidden")
        assert fits(page) and not visited.errors
    config, of_two = started
    assert [table["initializer_concept"] for table in of_two["subjects"]] == ["brown dog", "grey cat"]
    assert of_two["train_text_encoder_ti"] and not of_two["initializer_concept"]
    flags = ("train_text_encoder_ti", "initializer_concept", "text_encoder_lr")
    assert [config[name] for name in flags] == [True, "brown dog", 0.002]


@pytest.mark.parametrize("size", SIZES)
def test_an_adapters_settings_fill_the_form(served, browser, photos, started, tmp_path, size):
    of_kohya = {"ss_network_dim": "3", "ss_network_alpha": "6", "ss_seed": "7", "ss_clip_skip": "2"}
    for name, header in (("kohya", of_kohya), ("bare", {})):
        save_file({"weight": np.zeros((1, 1), np.float32)}, tmp_path / f"{name}.safetensors", metadata=header)
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        add_photos(page, photos[0], "dog")
        open_box(page, "more_training")
        for name, said in (("kohya", "Like kohya.safetensors: 3 settings"), ("bare", "Nothing is taken from bare")):
            with page.expect_file_chooser() as chooser:
                page.click("#upload_like")
            chooser.value.set_files(tmp_path / f"{name}.safetensors")
            says(page, "like_said", said)
            assert page.input_value("#train_like input") == "kohya.safetensors" and fits(page)
        assert page.input_value("#rank input") == "3" and page.input_value("#train_seed input") == "7"
        page.click("#start")
        says(page, "cost", "settings like kohya.safetensors")
        page.fill("#train_like input", "none")
        page.keyboard.press("Enter")
        page.wait_for_selector("#like_said", state="hidden")
        assert page.input_value("#rank input") == "" and not visited.errors
    (config,) = started
    assert [config[name] for name in ("rank", "lora_alpha", "seed", "mixer")] == [3, 6.0, 7, "orthogonal"]


def toys(name: str, count: int) -> list[Path]:
    return [assets_folder() / "subjects" / name / f"0{number}.jpg" for number in range(count)]


def test_two_subjects_are_trained_on_the_embedded_base_and_put_back_into_the_form(of_toys, browser):
    with visit(browser, of_toys.url) as visited:
        page = visited.page
        fill_two(page, toys("duck", 3), toys("rocket", 2), ("duck", "rocket"))
        page.get_by_label("Caption of photo 2").last.fill("a zwx rocket at night")
        open_box(page, "more_training")
        set_number(page, "train_steps", 2)
        page.locator("#scores input").uncheck()
        page.click("#start")
        page.set_default_timeout(LONG_MS)
        says(page, "train_status", "Done.")
        page.wait_for_selector("#sheet_of_run img", state="attached")
        captions = page.locator("#samples .caption-label, #samples .thumbnail-lg").all_inner_texts()
        assert any("sks duck" in words for words in captions) and any("zwx rocket" in words for words in captions)
        page.set_viewport_size({"width": 390, "height": 844})
        assert columns(page, "samples") == 2 and fits(page)
        page.set_viewport_size({"width": 1280, "height": 900})
        visited.reload()
        open_tab(page, "Train")
        page.click("#reopen")
        says(page, "cost", "duck-rocket are in the form")
        page.wait_for_function("document.querySelectorAll('#crops_2 img').length === 2")
        assert page.input_value("#class_word_2 textarea, #class_word_2 input") == "rocket"
        assert page.get_by_label("Caption of photo 2").last.input_value() == "a zwx rocket at night"
        page.click("#add_to_queue")
        says(page, "cost", "duck-rocket-2 waits")
        page.click("#stop_training:not([disabled])")
        assert fits(page) and not visited.errors
    settings = [
        json.loads((of_toys.ctx.runs_dir / name / "job_config.json").read_text())
        for name in ("duck-rocket", "duck-rocket-2")
    ]
    for run in ("duck-rocket", "duck-rocket-2"):
        assert (of_toys.ctx.runs_dir / run / "photos_2" / "photo_02.txt").read_text() == "a zwx rocket at night"
    changed = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert changed == {"output_dir", "subjects"}
