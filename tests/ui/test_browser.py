"""The page as a person uses it, in a real Chromium, on the tiny base, with the real training
program."""

import io
import json
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.settings.toy_bases import TOY_SUMMARY
from dreambooth_moslora.ui.state import PageBase
from tests.helpers import browser as web
from tests.helpers.tiny_families import tiny_pipeline
from tests.helpers.ui_server import serve
from tests.ui.conftest import (
    TRAINER,
    end_all,
    limit_samples,
    wait_for,
    write_noise_photos,
    write_run,
)

pytestmark = web.IN_BROWSER
SLOW_ANSWER_SEC = 8


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
        limit_samples(server.ctx.jobs)
        yield server
        end_all(server.ctx.jobs)


@pytest.fixture
def visited(served, browser):
    with web.visit(browser, served.url) as visit:
        yield visit
        assert not visit.errors, visit.errors
        assert visit.hosts <= {"127.0.0.1", "localhost"}, visit.hosts


@pytest.fixture
def page(visited):
    return visited.page


def fill(page, prompt: str = "a photo of a sks dog", steps: int = 3, pictures: int = 1) -> None:
    page.fill("#prompt textarea", prompt)
    web.set_number(page, "steps", steps)
    web.set_number(page, "num_images", pictures)


def generate(page, *args, **numbers) -> None:
    fill(page, *args, **numbers)
    page.click("#run")


def fetch_pixels(page, selector: str) -> np.ndarray:
    """The picture behind an <img>, fetched as the page does."""
    answer = page.request.get(page.locator(selector).first.get_attribute("src"))
    return np.asarray(PIL.Image.open(io.BytesIO(answer.body())).convert("RGB"))


def save_first_image(page, folder: Path) -> Path:
    """The first picture of the gallery as a file."""
    src = page.locator("#gallery img").first.get_attribute("src")
    (file := folder / "picture.png").write_bytes(page.request.get(src).body())
    return file


def test_stop_and_escape_end_running_and_queued_work(served, browser, page, monkeypatch):
    """The second time, the answer to the first is still on its way."""
    real = served.ctx.stop
    with web.visit(browser, served.url) as second:
        generate(page, steps=100, pictures=8)
        page.wait_for_selector("#status .bar")
        generate(second.page, steps=100, pictures=8)
        second.page.wait_for_function(
            "document.querySelector('#status').innerText.includes('queue: 1/1')"
        )
        second.page.click("#stop")
        second.page.wait_for_timeout(300)
        monkeypatch.setattr(
            served.ctx, "stop", lambda request: (real(request), time.sleep(SLOW_ANSWER_SEC))
        )
        page.click("#stop")
        web.says(page, "status", "Stopped.")
        generate(page, steps=60, pictures=8)
        page.wait_for_selector("#status .bar")
        page.keyboard.press("Escape")
        web.says(page, "status", "Stopped.")
        web.says(second.page, "status", "0 of 8 pictures")


OTHERS = (
    "[...document.querySelectorAll('#status img, "
    "#gallery')].filter((one) => one.checkVisibility()).length"
)
"""How many other pictures are seen."""
PLACE = """selector => {
  const {top, bottom, width, height} = document.querySelector(selector).getBoundingClientRect();
  return {width, height, seen: top >= 0 && bottom <= innerHeight};
}"""


SHOWN = "document.querySelector('#gallery img')?.style.getPropertyValue('--height') === '{}'"


def test_image_fits_the_window_during_and_after_generation(page):
    """Of 64 px, so twice as large at most."""
    for width, height in web.SIZES:
        web.resize(page, (width, height))
        web.put(page, "size", "64 x 64")
        generate(page, steps=60)
        script = f"at => document.querySelector(at) && [({PLACE})(at), {OTHERS}]"
        # at once: it may be done next
        preview_box, image_count = page.wait_for_function(script, arg="#preview img").json_value()
        assert image_count == 0
        web.says(page, "status", "1 picture in")
        page.wait_for_function(SHOWN.format(64))
        image_box = page.evaluate(PLACE, "#gallery img")
        assert preview_box == image_box == {"width": 2 * 64, "height": 2 * 64, "seen": True}
        web.resize(page, (width, 560))
        web.put(page, "size", "64 x 128")
        generate(page, steps=60)
        page.wait_for_selector("#preview img")
        web.says(page, "status", "1 picture in")
        page.wait_for_function(SHOWN.format(128))
        image_box = page.evaluate(PLACE, "#gallery img")
        assert image_box["seen"] and image_box["height"] == pytest.approx(
            2 * image_box["width"], abs=1
        )
        assert 200 < image_box["height"] < 2 * 128


def test_keys_generate_and_a_png_reproduces_its_image(visited, page, tmp_path):
    page.locator("h1").click()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.closest('#prompt') !== null")
    assert "/" not in page.input_value("#prompt textarea")
    fill(page, "a sks dog in the snow", steps=4, pictures=2)
    page.press("#prompt textarea", "Enter")
    web.says(page, "status", "2 pictures in")
    assert page.locator("#gallery img").count() == 2
    file, before = save_first_image(page, tmp_path), fetch_pixels(page, "#gallery img")
    with PIL.Image.open(file) as image:
        assert image.format == "PNG" and "dreambooth_moslora" in image.info
    visited.reload()
    web.open_tab(page, "History")
    page.wait_for_function("document.querySelectorAll('#history img').length >= 2")
    web.open_tab(page, "Inspect")
    page.set_input_files("#inspect_file input[type=file]", file)
    web.says(page, "inspect_facts", "a sks dog in the snow")
    page.click("#inspect_use")
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value === 'a sks dog in the snow'"
    )
    page.wait_for_selector("#run", state="visible")
    web.open_tab(page, "Pictures")
    page.click("#run")
    web.says(page, "status", "1 picture in")
    assert np.array_equal(fetch_pixels(page, "#gallery img"), before)
    web.open_tab(page, "Compare")
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#slider img').length >= 2")
    halves = [
        page.request.get(img.get_attribute("src")).body()
        for img in page.locator("#slider img").all()
    ]
    assert len(set(halves)) == 2
    web.open_tab(page, "History")


def test_run_starts_stops_resumes_and_its_adapter_is_used(served, visited, page, tmp_path):
    web.open_tab(page, "Train")
    web.add_photos(page, write_noise_photos(tmp_path, 3), "dog")
    web.wait_for_photos(page, 3)
    web.says(page, "prompts", "a photo of a sks dog")
    web.open_box(page, "more_training")
    web.set_number(page, "train_steps", 5000)
    page.click("#start")
    web.says(page, "train_status", "of 5000")
    visited.reload()
    web.open_tab(page, "Train")

    # "Step 1 of 5000 …" is said before that step has ended.
    def steps_taken() -> int:
        events = RunDir(served.ctx.runs_dir / "dog").read_events()
        return sum(event["type"] == "step" for event in events)

    wait_for(lambda: steps_taken() > 1, seconds=240)
    page.click("#stop_training")
    web.says(page, "train_status", "Stopped; a checkpoint is written.")
    before = steps_taken()
    page.click("#resume:not([disabled])")
    wait_for(lambda: steps_taken() > before, seconds=240)
    page.wait_for_function("document.querySelectorAll('#samples img').length >= 1")
    page.click("#stop_training:not([disabled])")
    web.says(page, "train_status", "Stopped; a checkpoint is written.")
    page.click("#use_adapter")
    page.wait_for_selector("#run", state="visible")
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value === 'a photo of a sks dog'"
    )
    web.set_number(page, "steps", 3)
    page.click("#run")
    web.says(page, "status", "1 picture in")


def test_page_without_a_run_opens_on_train(tiny_base, tmp_path, browser):
    """A newcomer came to the Generate tab, with nothing of their own to draw."""
    write_run(tmp_path / "with" / "runs" / "dog", {"type": "start"}, {"type": "end"})
    (tmp_path / "with" / "runs" / "dog" / "pytorch_lora_weights.safetensors").touch()
    for folder, tab in (("without", "Train"), ("with", "Generate")):
        with serve(tiny_base, tmp_path / folder) as server:
            page = browser.new_page()
            page.goto(server.url)
            page.locator("#tabs [role=tab][aria-selected=true]").first.wait_for()
            assert page.inner_text("#tabs [role=tab][aria-selected=true]") == tab
            page.close()


def test_second_browser_watches_and_stops_the_run(served, browser, page, tmp_path, monkeypatch):
    (stand_in := tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(served.ctx.jobs, "script", stand_in)
    web.open_tab(page, "Train")
    web.add_photos(page, write_noise_photos(tmp_path, 3), "owl")
    web.open_box(page, "more_training")
    web.set_number(page, "train_steps", 5000)
    page.click("#start")
    web.says(page, "train_status", "of 5000")
    with web.visit(browser, served.url) as second:
        web.open_tab(second.page, "Train")
        web.wait_for_photos(second.page, 3)
        assert second.page.inner_text("#runs .run-chosen b") == "owl"
        web.says(second.page, "train_status", "of 5000")
        second.page.wait_for_selector("#loss_curve svg .mark-line path", state="attached")
        second.page.click("#stop_training:not([disabled])")
        web.says(second.page, "train_status", "Stopped; a checkpoint is written.")
        assert not second.errors
    web.says(page, "train_status", "Stopped; a checkpoint is written.")


def test_public_page_generates(tiny_base, tmp_path, browser):
    with (
        serve(tiny_base, tmp_path, public=True) as server,
        web.visit(browser, server.url) as visited,
    ):
        page = visited.page
        generate(page)
        web.says(page, "status", "1 picture in")
        assert page.get_by_role("tab").all_inner_texts() == ["Generate", "Pictures", "Compare"]
        page.click("#reuse_gallery")
        web.open_tab(page, "Compare")
        page.click("#compare")
        page.wait_for_function("document.querySelectorAll('#slider img').length >= 2")
        assert page.locator("input[type=file]").count() == 0 and not visited.errors


def test_queue_is_shown_edited_and_continues(served, page, tmp_path, monkeypatch):
    (stand_in := tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(served.ctx.jobs, "script", stand_in)
    web.open_tab(page, "Train")
    page.set_input_files("#photos input[type=file]", write_noise_photos(tmp_path, 3))
    web.says(page, "remarks", "3 photos")
    web.open_box(page, "more_training")
    web.set_number(page, "train_steps", 5000)
    assert not page.locator("#queue_box").is_visible()
    for word in ("first", "second", "third", "fourth"):
        web.put(page, "class_word", word)
        page.click("#add_to_queue")
        web.says(page, "cost", f"{word} waits, number")
    web.says(page, "train_status", "of 5000")
    page.locator("#runs .run-chosen", has_text="first").wait_for()
    page.wait_for_function("document.querySelectorAll('#queued label').length === 3")
    page.locator("#queued label", has_text="second").click()
    page.click("#queue_remove")
    web.says(page, "queued", "1 · third\n2 · fourth")
    assert web.fits_both(page) and page.locator("#queue_remove").is_visible()
    page.click("#stop_training:not([disabled])")
    page.locator("#runs .run-chosen", has_text="third").wait_for()
    web.says(page, "train_status", "of 5000")
    served.ctx.queue.queue.remove("fourth")
    page.wait_for_selector("#queue_box", state="hidden")
    page.click("#stop_training:not([disabled])")
    web.says(page, "train_status", "Stop")


def choose(page, elem_id: str, option: str) -> None:
    page.click(f"#{elem_id} input")
    page.get_by_role("option", name=option, exact=True).click()


def raise_user_error():
    raise UserError("it has no unet")


def test_base_choice_changes_the_page_or_fails_safely(tiny_base, tmp_path, browser):
    toy = PageBase(
        "toy",
        "toy",
        128,
        lambda: SubjectPipeline.from_base("toy"),
        TOY_SUMMARY.format("SDXL"),
    )
    broken = PageBase("broken", "broken", 64, raise_user_error)
    (pipeline := tiny_pipeline("flux", tmp_path / "files")).save_pretrained(tmp_path / "flux")
    flux = PageBase("flux", str(tmp_path / "flux"), 64, lambda: SubjectPipeline(pipeline, "flux"))
    with (
        serve(tiny_base, tmp_path, further_bases=[toy, broken, flux]) as server,
        web.visit(browser, server.url) as visited,
        web.visit(browser, server.url) as second,
    ):
        page = visited.page
        choose(page, "base", "broken")
        web.says(page, "about_base", "Broken is not loaded: it has no unet")
        assert page.input_value("#base input") == "tiny" and page.is_visible("#negative")
        choose(page, "base", "flux")
        page.wait_for_selector("#negative", state="hidden")
        assert page.get_by_label("Scheduler").count() == 0
        # A page that was open before shows the base with which it would train.
        second.page.wait_for_selector("#negative", state="hidden")
        assert second.page.input_value("#base input") == "flux"
        choose(page, "base", "toy")
        web.says(page, "about_base", "Toy: a 128 px practice model")
        page.wait_for_selector("#negative")
        assert page.input_value("#size input") == "Square 128 × 128"
        choose(page, "adapter", "none")
        generate(page, "a lamp")
        web.says(page, "status", "1 picture in")
        assert not visited.errors and not second.errors


def test_photos_and_a_word_suffice_and_hidden_fields_count(served, browser, tmp_path, started):
    with web.visit(browser, served.url, size=web.PHONE) as visited:
        page = visited.page
        web.open_tab(page, "Train")
        web.add_photos(page, write_noise_photos(tmp_path, 3), "dog")
        assert not page.locator("#token").is_visible()
        page.click("#start")
        web.says(page, "cost", "Photos without a mask are learned whole")
        page.wait_for_function(f"({PLACE})('#train_status').seen")
        web.open_box(page, "more_training")
        web.open_box(page, "expert_training")
        assert not page.locator("#describe").is_visible()
        page.locator("#subject label", has_text="person").click()
        page.wait_for_selector("#describe")
        above, below = (page.locator(f"#{name}").bounding_box() for name in ("subject", "describe"))
        assert below["y"] >= above["y"] + above["height"], "too narrow beside each other"
        page.locator("#subject label", has_text="style").click()
        web.says(page, "prompts", "Learns “a picture in dog style”.")
        for unused in ("token", "prior", "prior_weight", "make_masks"):
            page.wait_for_selector(f"#{unused}", state="hidden")
        page.locator("#subject label", has_text="object").click()
        page.wait_for_selector("#describe", state="hidden")
        page.locator("#scores input").check()
        page.locator("#make_masks input").check()
        choose(page, "memory", "recompute")
        web.set_number(page, "prior_weight", 3)
        web.set_number(page, "unmasked_weight", 0.5)
        page.click("#start")
        web.says(page, "cost", "Likeness is measured every 80 steps")
        for size in web.SIZES:
            web.resize(page, size)
            boxes = [
                box.bounding_box()
                for box in page.locator("#more_training .block").all()
                if box.is_visible()
            ]
            assert len(boxes) > 12 and all(
                b["x"] >= 0 and b["x"] + b["width"] <= size[0] for b in boxes
            )
            assert web.fits(page)
        assert not visited.errors
    changes = {
        "memory": "recompute",
        "prior_loss_weight": 3,
        "masks": "auto",
    }
    changes |= {
        "unmasked_weight": 0.5,
        "evaluate_steps": 80,
        "validation_steps": 80,
    }
    before, after = started
    assert {name for name in after if before[name] != after[name]} == {
        *changes,
        "output_dir",
        "instance_data_dir",
    }
    assert {name: after[name] for name in changes} == changes


ROOM_BELOW_WORDS = """box => {
  const walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), words = document.createRange();
  while (walk.nextNode()) if (walk.currentNode.data.trim()) words.selectNode(walk.currentNode);
  return box.getBoundingClientRect().bottom - words.getBoundingClientRect().bottom;
}"""


def test_mistakes_and_missing_recipes_are_reported(visited, page, tmp_path):
    page.click("#reuse_gallery")
    page.get_by_text("There is no picture yet").first.wait_for()
    generate(page, "a dog <lora:<b>rex</b>:1> <lora:rex:1>")
    page.get_by_text("There is no adapter rex").first.wait_for()
    # Gradio's own word, which would cover the text
    page.locator("#status .error").wait_for(state="attached")
    assert not page.locator("#status .error").is_visible()
    text = PngInfo()
    params = {"prompt": "a hen", "adapters": [["hen", 1.0]]}
    text.add_text("dreambooth_moslora", json.dumps({"params": params}))
    for name, info in (("bare", None), ("other", text)):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
    web.open_tab(page, "Inspect")
    page.locator("#inspect_file", has_text="Click to Upload").wait_for()
    assert page.locator("#inspect_file").evaluate(ROOM_BELOW_WORDS) > 8
    page.set_input_files("#inspect_file input[type=file]", tmp_path / "bare.png")
    page.get_by_text("carries no recipe").wait_for()
    visited.reload()
    web.open_tab(page, "Inspect")
    page.set_input_files("#inspect_file input[type=file]", tmp_path / "other.png")
    page.click("#inspect_use")
    page.get_by_text("The adapter hen is not here").wait_for()


def test_phone_layout_and_dark_mode(served, browser):
    with web.visit(browser, served.url, size=web.PHONE) as visited:
        page = visited.page
        generate(page)
        web.says(page, "status", "1 picture in")
        tops = [
            page.locator(f"#{part}").bounding_box()["y"]
            for part in ("run", "status", "gallery", "settings")
        ]
        assert tops == sorted(tops)
        (run := served.ctx.runs_dir / "ended").mkdir()
        (run / "pytorch_lora_weights.safetensors").write_bytes(b"")
        (run / "job.log").write_text("a line\n" * 39 + "the newest\n")
        steps = [{"type": "step", "step": step, "loss_instance": 1 / step} for step in (1, 2, 3)]
        write_run(run, {"type": "start"}, *steps, {"type": "end", "state": "done"})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            visited.reload()
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness = sum(
                int(float(n)) for n in colour[colour.index("(") + 1 : -1].split(",")[:3]
            )
            assert (brightness < 200) == (scheme == "dark")
        for tab in ("Generate", "Inspect", "Train"):
            web.open_tab(page, tab)
            assert web.fits(page), tab
        web.open_box(page, "log_box")
        page.locator("#loss_curve canvas, #loss_curve svg.marks").wait_for()
        log = page.locator("#log").evaluate("e => [e.scrollHeight - e.clientHeight, e.scrollTop]")
        assert log[0] > 0 and log[1] == 0  # it is counted from the end
        text_left_script = (
            "e => { const r = document.createRange(); r.selectNodeContents(e); "
            "return r.getBoundingClientRect().x }"
        )
        button = page.locator("#estimate")
        assert button.evaluate(text_left_script) - button.bounding_box()["x"] >= 10
        assert web.fits(page) and not visited.errors


def test_list_of_runs_is_there_in_every_fresh_page(tiny_base, tmp_path, browser):
    """A poll without news came before the tab was opened, and the list stayed empty."""
    for number in range(7):
        events = {"type": "start"}, {"type": "step", "step": 3}
        run = write_run(tmp_path / "runs" / f"run{number}", *events).run_dir
        (run / "pytorch_lora_weights.safetensors").write_bytes(b"")
    second = PageBase("second", "toy", 128, lambda: SubjectPipeline.from_base("toy"))
    with serve(tiny_base, tmp_path, further_bases=[second]) as server:
        for _ in range(12):
            with web.visit(browser, server.url) as visited:
                web.open_tab(visited.page, "Train")
                web.says(visited.page, "train_status", "failed")
                visited.page.wait_for_timeout(4 * web.SETTLE_MS)
                assert visited.page.locator("#runs .run-card").count() == 7
