"""The page as a person uses it, in a real Chromium, on the tiny base, with the real training program."""

import io
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.visitors import visitor_id
from tests.helpers.browser import IN_BROWSER, add_photos, fits, open_box, open_tab, put, says, set_number, visit
from tests.helpers.ui_server import serve
from tests.ui.conftest import recorded

pytestmark = IN_BROWSER
SLOW_ANSWER_SEC = 8


@pytest.fixture(scope="module")
def served(tiny_base, tmp_path_factory):
    with serve(tiny_base, tmp_path_factory.mktemp("app")) as server:
        yield server
        for job in Jobs(server.ctx.runs_dir).all():
            if job.is_alive:
                os.kill(job.pid, 9)


@pytest.fixture
def visited(served, browser):
    with visit(browser, served.url) as found:
        yield found
        assert not found.errors, found.errors
        assert found.hosts <= {"127.0.0.1", "localhost"}, found.hosts


@pytest.fixture
def page(visited):
    return visited.page


def fill(page, prompt: str = "a photo of a sks dog", steps: int = 3, pictures: int = 1) -> None:
    page.fill("#prompt textarea", prompt)
    set_number(page, "steps", steps)
    set_number(page, "num_images", pictures)


def generate(page, *words, **numbers) -> None:
    fill(page, *words, **numbers)
    page.click("#run")


def pixels_of(page, selector: str) -> np.ndarray:
    """The picture behind an <img>, fetched as the page does."""
    answer = page.request.get(page.locator(selector).first.get_attribute("src"))
    return np.asarray(PIL.Image.open(io.BytesIO(answer.body())).convert("RGB"))


def saved(page, folder: Path) -> Path:
    """The first picture of the gallery as a file."""
    src = page.locator("#gallery img").first.get_attribute("src")
    (file := folder / "picture.png").write_bytes(page.request.get(src).body())
    return file


def test_slash_leads_to_the_prompt_enter_generates_and_pictures_carry_their_recipe(page, tmp_path):
    page.locator("h1").click()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.closest('#prompt') !== null")
    assert "/" not in page.input_value("#prompt textarea")
    fill(page, pictures=2)
    page.press("#prompt textarea", "Enter")
    says(page, "status", "2 pictures in")
    assert page.locator("#gallery img").count() == 2
    with PIL.Image.open(saved(page, tmp_path)) as image:
        assert image.format == "PNG" and "dreambooth_moslora" in image.info


def test_stop_keeps_what_is_finished_and_escape_stops_too(served, page, monkeypatch):
    """The second time, the answer to the first is still on its way."""
    real = served.ctx.stop
    monkeypatch.setattr(served.ctx, "stop", lambda request: (real(request), time.sleep(SLOW_ANSWER_SEC)))
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        generate(page, steps=60, pictures=8)
        page.wait_for_selector("#status .bar")
        stop()
        says(page, "status", "Stopped.")


def test_a_picture_in_the_queue_is_stopped_before_its_turn(served, browser, page):
    generate(page, steps=100, pictures=8)
    page.wait_for_selector("#status .bar")
    with visit(browser, served.url) as second:
        generate(second.page, steps=100, pictures=8)
        second.page.wait_for_function("document.querySelector('#status').innerText.includes('queue: 1/1')")
        second.page.click("#stop")
        second.page.wait_for_timeout(300)
        page.click("#stop")
        says(second.page, "status", "0 of 8 pictures")


SIZES = [(1366, 768), (390, 844)]
PLACE = """selector => {
  const {top, bottom, width, height} = document.querySelector(selector).getBoundingClientRect();
  return {width, height, seen: top >= 0 && bottom <= innerHeight};
}"""


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_is_seen_whole_while_it_is_drawn_and_after(served, browser, size):
    """Of 64 px, so three times as large at most."""
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        generate(page, steps=60)
        page.wait_for_selector("#preview img")
        drawn = page.evaluate(PLACE, "#preview img")
        assert not page.locator("#status img").is_visible() and not page.locator("#gallery").is_visible()
        says(page, "status", "1 picture in")
        page.wait_for_function("document.querySelector('#gallery img').style.cssText.includes('--width')")
        done = page.evaluate(PLACE, "#gallery img")
        assert drawn == done == {"width": 3 * 64, "height": 3 * 64, "seen": True}
        assert not visited.errors


@pytest.mark.parametrize("size", [(1366, 620), (390, 620)])
def test_a_picture_that_would_be_taller_is_as_high_as_the_window_lets_it(served, browser, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        put(page, "size", "64 x 128")
        generate(page)
        says(page, "status", "1 picture in")
        page.wait_for_function("document.querySelector('#gallery img').style.cssText.includes('--width')")
        place = page.evaluate(PLACE, "#gallery img")
        assert place["seen"] and place["height"] == pytest.approx(2 * place["width"], abs=1)
        assert 250 < place["height"] < 3 * 128


def test_compare_shows_both_halves_and_a_grid_is_drawn(page):
    fill(page, steps=2)
    open_tab(page, "Compare")
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#slider img').length >= 2")
    halves = [page.request.get(img.get_attribute("src")).body() for img in page.locator("#slider img").all()]
    assert len(set(halves)) == 2
    open_tab(page, "Grid")
    put(page, "grid_row_values", "0, 1")
    page.click("#draw_grid")
    page.wait_for_selector("#sheet img")
    assert pixels_of(page, "#sheet img").shape[1] > 3 * 64


def test_a_dropped_or_inspected_png_fills_the_form_and_gives_the_same_picture_again(visited, page, tmp_path):
    generate(page, "a sks dog in the snow", steps=4)
    says(page, "status", "1 picture in")
    file = saved(page, tmp_path)
    before = pixels_of(page, "#gallery img")
    visited.reload()
    open_box(page, "drop_box")
    page.set_input_files("#drop_png input[type=file]", file)
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks dog in the snow'")
    page.click("#run")
    says(page, "status", "1 picture in")
    assert np.array_equal(pixels_of(page, "#gallery img"), before)
    open_tab(page, "History")
    page.wait_for_function("document.querySelectorAll('#history img').length >= 2")
    page.fill("#prompt textarea", "something else")
    open_tab(page, "Inspect")
    page.set_input_files("#inspect_file input[type=file]", file)
    says(page, "inspect_facts", "a sks dog in the snow")
    page.click("#inspect_use")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a sks dog in the snow'")
    page.wait_for_selector("#run", state="visible")


def photos_of(folder) -> list:
    rng, files = np.random.default_rng(0), [folder / f"photo{number}.jpg" for number in range(3)]
    for number, file in enumerate(files):
        PIL.Image.fromarray(rng.integers(0, 255, (90, 120 + 10 * number, 3), dtype=np.uint8)).save(file)
    return files


def test_a_run_is_started_survives_a_reload_stops_resumes_and_is_used(visited, page, tmp_path):
    open_tab(page, "Train")
    add_photos(page, photos_of(tmp_path), "dog")
    page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
    says(page, "prompts", "a photo of a sks dog")
    open_box(page, "more_training")
    set_number(page, "train_steps", 5000)
    page.click("#start")
    says(page, "train_status", "of 5000")
    visited.reload()
    open_tab(page, "Train")
    says(page, "train_status", "of 5000")
    page.click("#stop_training")
    says(page, "train_status", "Stopped; a checkpoint is written.")
    page.click("#resume:not([disabled])")
    shown = "document.getElementById('train_status').innerText"
    page.wait_for_function(f"{shown}.includes('of 5000') && !{shown}.includes('Stop')")
    page.wait_for_function("document.querySelectorAll('#samples img').length >= 1")
    page.click("#stop_training:not([disabled])")
    says(page, "train_status", "Stopped; a checkpoint is written.")
    page.click("#use_adapter")
    page.wait_for_selector("#run", state="visible")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a photo of a sks dog'")
    set_number(page, "steps", 3)
    page.click("#run")
    says(page, "status", "1 picture in")


def test_runs_wait_are_moved_and_removed_and_the_next_begins_when_one_ends(served, page, tmp_path):
    open_tab(page, "Train")
    page.set_input_files("#photos input[type=file]", photos_of(tmp_path))
    open_box(page, "more_training")
    set_number(page, "train_steps", 5000)
    assert not page.locator("#queue_box").is_visible()
    for word in ("first", "second", "third", "fourth"):
        put(page, "class_word", word)
        page.click("#add_to_queue")
        says(page, "cost", f"{word} waits, number")
    says(page, "train_status", "of 5000")
    assert page.input_value("#run_picker input") == "first"
    page.wait_for_function("document.querySelectorAll('#queued label').length === 3")
    page.locator("#queued label", has_text="third").click()
    page.click("#queue_up")
    says(page, "queued", "1 · third · 5000 steps\n2 · second")
    page.locator("#queued label", has_text="second").click()
    page.click("#queue_remove")
    says(page, "queued", "1 · third · 5000 steps\n2 · fourth")
    page.set_viewport_size({"width": 390, "height": 844})
    assert fits(page) and page.locator("#queue_down").is_visible()
    served.ctx.queue.queue.pause()  # the page is a public one, without the button
    says(page, "queue_rest", "Paused")
    page.click("#stop_training:not([disabled])")
    says(page, "train_status", "Stopped; a checkpoint is written.")
    served.ctx.queue.queue.pause(False)
    page.wait_for_function("document.querySelector('#run_picker input').value === 'third'")
    says(page, "train_status", "of 5000")
    served.ctx.queue.queue.remove("fourth")
    page.wait_for_selector("#queue_box", state="hidden")
    page.click("#stop_training:not([disabled])")
    says(page, "train_status", "Stop")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_mask_is_shown_and_corrected_with_the_brush(served, browser, tmp_path, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        page.set_input_files("#photos input[type=file]", photos_of(tmp_path))
        page.wait_for_function("document.querySelectorAll('#crops img').length === 3")
        before = page.get_attribute("#crops img", "src")
        put(page, "class_word", "dog")
        page.get_by_role("button", name="Show masks").click()
        says(page, "mask_remarks", "photo 3: no mask")
        page.get_by_role("button", name="Mask: photo 1").click()
        canvas = page.locator("#mask_editor canvas").last
        canvas.wait_for()
        page.wait_for_timeout(1500)
        box = canvas.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 20, middle[1], steps=5)
        page.mouse.up()
        page.click("#keep_mask")
        page.wait_for_selector("#mask_box", state="detached")
        page.wait_for_function("!document.getElementById('mask_remarks').innerText.includes('photo 1')")
        (cookie,) = [c["value"] for c in visited.context.cookies() if c["name"] == "moslora_visitor"]
        ann = served.ctx.visitors.of(SimpleNamespace(cookies={"moslora_visitor": cookie}))
        with PIL.Image.open(ann.photos_dir / "photo_01.mask.png") as mask:
            share = np.asarray(mask).mean()
            assert mask.size == (120, 90) and 0.005 < share < 0.6
        assert page.get_attribute("#crops img", "src") != before
        assert fits(page) and not visited.errors


def choose(page, elem_id: str, option: str) -> None:
    page.click(f"#{elem_id} input")
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.parametrize("size", SIZES)
def test_photos_and_a_word_suffice_and_what_is_folded_away_counts(served, browser, tmp_path, started, size):
    with visit(browser, served.url, size=size) as visited:
        page = visited.page
        open_tab(page, "Train")
        add_photos(page, photos_of(tmp_path), "dog")
        assert not page.locator("#token").is_visible()
        page.click("#start")
        says(page, "cost", "masks: made for none, as CLIPSeg comes from the hub")
        page.wait_for_function(f"({PLACE})('#train_status').seen")
        assert "recipe: assets/configs/sdxl.toml" in page.inner_text("#cost")
        open_box(page, "more_training")
        says(page, "by_recipe", "Trained at 64 px, the base's own size.")
        steps = re.search(r"steps: (\d+)", page.inner_text("#cost"))[1]
        for field, value in {"rank": "16", "learning_rate": "0.0001", "train_steps": steps}.items():
            page.locator(f"#{field} input[placeholder='{value}']").wait_for()
            assert page.input_value(f"#{field} input") == ""
        page.locator("#scores input").check()
        page.locator("#make_masks input").check()
        choose(page, "prior_by", "class images")
        choose(page, "memory", "recompute")
        set_number(page, "prior_weight", 3)
        set_number(page, "unmasked_weight", 0.5)
        page.click("#start")
        says(page, "cost", "scores: every 60 steps")
        boxes = [box.bounding_box() for box in page.locator("#more_training .block").all() if box.is_visible()]
        assert len(boxes) > 14 and all(b["x"] >= 0 and b["x"] + b["width"] <= size[0] for b in boxes)
        assert fits(page)
        assert not visited.errors
    wanted = {"memory": "recompute", "prior": "class_images", "prior_loss_weight": 3, "masks": "auto"}
    wanted |= {"unmasked_weight": 0.5, "evaluate_steps": 60, "validation_steps": 60, "find_scale": True}
    before, after = started
    assert {name for name in after if before[name] != after[name]} == {*wanted, "output_dir", "instance_data_dir"}
    assert {name: after[name] for name in wanted} == wanted


def enabled(page) -> list[str]:
    return [name for name in ("stop", "reuse", "last_seed") if page.locator(f"#{name}").is_enabled()]


def test_a_mistake_is_told_on_the_page_and_no_button_is_offered_that_has_nothing_to_act_on(visited):
    page = visited.page
    assert enabled(page) == []
    generate(page, "a dog <lora:<b>rex</b>:1> <lora:rex:1>")
    page.get_by_text("There is no adapter rex").first.wait_for()
    page.locator("#status .error").wait_for(state="attached")  # Gradio's own word, which would cover the text
    assert not page.locator("#status .error").is_visible()
    page.locator("#stop:disabled").wait_for()
    assert enabled(page) == []
    generate(page, steps=60)
    page.locator("#stop:enabled").wait_for()
    says(page, "status", "at scale 1")
    page.locator("#stop:disabled").wait_for()
    page.locator("#last_seed:enabled").wait_for()
    assert enabled(page) == ["reuse", "last_seed"]


ROOM_BELOW_WORDS = """box => {
  const walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT), words = document.createRange();
  while (walk.nextNode()) if (walk.currentNode.data.trim()) words.selectNode(walk.currentNode);
  return box.getBoundingClientRect().bottom - words.getBoundingClientRect().bottom;
}"""


def test_a_box_for_a_picture_shows_all_its_words(page):
    open_box(page, "drop_box")
    page.locator("#drop_png", has_text="Click to Upload").wait_for()
    assert page.locator("#drop_png").evaluate(ROOM_BELOW_WORDS) > 8


def test_a_picture_without_a_recipe_is_told_on_the_page_and_a_missing_adapter_remarked(page, tmp_path):
    text = PngInfo()
    text.add_text("parameters", "a hen <lora:hen:1>\nSteps: 4, Sampler: Euler, CFG scale: 5, Seed: 1")
    for name, info in (("bare", None), ("other", text)):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
    open_box(page, "drop_box")
    page.set_input_files("#drop_png input[type=file]", tmp_path / "bare.png")
    page.get_by_text("carries no generation parameters").wait_for()
    open_tab(page, "Inspect")
    page.set_input_files("#inspect_file input[type=file]", tmp_path / "other.png")
    page.click("#inspect_use")
    page.get_by_text("The adapter hen is not here").wait_for()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_the_whole_page_with_the_results_under_the_button(served, browser, dark):
    with visit(browser, served.url, size=(390, 844), dark=dark) as visited:
        page = visited.page
        generate(page)
        says(page, "status", "1 picture in")
        tops = [page.locator(f"#{part}").bounding_box()["y"] for part in ("run", "status", "gallery", "settings")]
        assert tops == sorted(tops)
        for tab in ("Generate", "Train", "Inspect"):
            open_tab(page, tab)
            assert fits(page), tab
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(float(n)) for n in colour[colour.index("(") + 1 : -1].split(",")[:3])
        assert (brightness < 200) == dark
        assert not visited.errors


def test_on_a_phone_a_plot_shows_all_its_lines_and_names_and_a_button_has_a_margin(served, browser):
    """Of two evaluations, whose prompt fidelity is just below a round number."""
    scores = {"dino": 0.3, "clip_t": 0.497, "pres": 0.1, "diversity": 0.2, "drift": 0.1, "copied": 0.0, "score": 0.2}
    events = (
        {"type": "evaluation", "time": 1.0, "step": step} | {name: step / 120 * score for name, score in scores.items()}
        for step in (60, 120)
    )
    with visit(browser, served.url, size=(390, 844)) as visited:
        page, cookies = visited.page, {cookie["name"]: cookie["value"] for cookie in visited.context.cookies()}
        recorded(
            served.ctx.runs_dir / "scored",
            *events,
            owner=visitor_id(SimpleNamespace(cookies=cookies)),
            pid=1,
            created=0.0,
        )
        visited.reload()
        open_tab(page, "Train")
        plot = page.locator("#fidelity svg")
        plot.locator(".mark-line path").first.wait_for(state="attached")
        frame = plot.locator("path.background").first.bounding_box()
        tops = [line.bounding_box()["y"] for line in plot.locator(".mark-line path").all()]
        assert len(tops) == 4 and min(tops) > frame["y"] + 5
        whole, legend = (page.locator(f"#fidelity {part}").first.bounding_box() for part in ("svg", ".role-legend"))
        assert legend["x"] + legend["width"] <= whole["x"] + whole["width"]
        words = "e => { const r = document.createRange(); r.selectNodeContents(e); return r.getBoundingClientRect().x }"
        button = page.locator("#estimate")
        assert button.evaluate(words) - button.bounding_box()["x"] >= 10


def test_a_failed_load_and_a_run_that_is_gone_are_told_on_their_cards(served, page, monkeypatch):
    def no_base():
        raise UserError("there is no base here")

    monkeypatch.setattr(served.ctx, "pipeline", no_base)
    generate(page)
    says(page, "status", "There is no base here")
    open_tab(page, "Train")
    page.fill("#run_picker input", "nowhere")
    page.press("#run_picker input", "Enter")
    says(page, "train_status", "This run is not there any more.")
    assert page.locator("#stop_training").is_disabled()
    assert page.input_value("#run_picker input") == ""
