"""What the page knows without a server: its shelf, its base, whose work is stopped, and what it tells of a fault."""

import logging
import os
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams
from dreambooth_moslora.ui.generate_values import AdapterSummary, summary_of
from dreambooth_moslora.ui.state import TELLS_PROMPTS, AdapterCatalog, AppContext, as_gradio_error, import_libraries
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import add_to_queue, estimate_cost, start_run
from dreambooth_moslora.ui.train_watch import watched
from tests.ui.conftest import OTHER, PAGE, handler, recorded, visitor, write_adapter

PUBLISHED, RAW = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"


@pytest.fixture
def shelf(tmp_path) -> AdapterCatalog:
    return AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")


def put(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


def test_the_shelf_shows_a_run_to_its_owner_and_command_line_runs_to_all(tmp_path, shelf, ann):
    runs = tmp_path / "runs"
    put(runs, f"mine/{PUBLISHED}", f"free/{PUBLISHED}", f"free/checkpoint-20/{RAW}", f"free/checkpoint-100/{RAW}")
    recorded(runs / "mine")
    assert set(shelf.files(ann)) == {"mine", "free", "free@100", "free@20"}
    assert list(shelf.files(visitor(tmp_path, OTHER))) == ["free", "free@100", "free@20"]


def test_an_upload_is_its_visitors_alone_and_keeps_a_free_name(tmp_path, shelf, ann):
    put(tmp_path, "my <b>dog.safetensors")
    names, bob = [shelf.add_upload(tmp_path / "my <b>dog.safetensors", ann) for _ in range(2)], visitor(tmp_path, OTHER)
    assert names == ["my _b_dog", "my _b_dog 2"] and not shelf.files(bob)
    with pytest.raises(UserError, match="there is no adapter"):
        shelf.path(names[0], bob)


def test_files_are_named_as_they_lie_in_the_project_or_by_a_bare_name_of_their_own(tmp_path, shelf, monkeypatch):
    put(tmp_path, "adapters/cat.safetensors", f"runs/dog/{PUBLISHED}", f"runs/dog/checkpoint-20/{RAW}")
    runs = {"dog": "runs/dog", "dog@20": "runs/dog/checkpoint-20"}
    assert shelf.public_paths() == {"cat": "cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.state.PROJECT", tmp_path)
    assert shelf.public_paths() == {"cat": "adapters/cat.safetensors"} | runs
    monkeypatch.setattr("dreambooth_moslora.ui.state.PROJECT", tmp_path.parent)
    assert shelf.public_paths()["dog@20"] == f"{tmp_path.name}/runs/dog/checkpoint-20"
    put(tmp_path, "adapters/dog.safetensors")
    assert list(shelf.files()) == ["cat", "dog", "dog 2", "dog@20"]
    assert shelf.name_of(tmp_path / "runs" / "dog" / PUBLISHED) == "dog 2"


def test_links_out_of_the_folder_or_in_circles_and_pipes_are_no_adapters(tmp_path, shelf, ann):
    folder, runs = tmp_path / "adapters", tmp_path / "runs"
    for adapter in (folder / "dog.safetensors", tmp_path / "secret.safetensors"):
        write_adapter(adapter)
    for link, place in (("loop", "loop"), ("gone", "nowhere"), ("out", "../secret")):
        (folder / f"{link}.safetensors").symlink_to(folder / f"{place}.safetensors")
    (folder / "folder.safetensors").mkdir()
    (runs / "cat" / "checkpoint-5").mkdir(parents=True)
    for pipe in (folder / "pipe.safetensors", runs / "cat" / "checkpoint-5" / RAW):
        os.mkfifo(pipe)
    (runs / "round").symlink_to(runs / "round")
    assert list(shelf.files(ann)) == ["dog"] and summary_of(folder / "pipe.safetensors") == AdapterSummary()


def test_a_stop_counts_before_ones_turn_has_come_and_only_once(context):
    pages = [SimpleNamespace(username=None, cookies={}, session_hash=name) for name in ("mine", "other")]
    ctx = context()
    for page in pages:
        ctx.announce(page)
    ctx.stop(pages[0])
    for page, stopped in zip(pages, (True, False)):
        with ctx.stoppable(page) as should_stop:
            assert should_stop() == stopped
    with ctx.stoppable(pages[0]) as should_stop:
        assert not should_stop()
        ctx.stop(pages[0])
        assert should_stop()


@pytest.mark.parametrize("error, words", [(UserError("there is no base x"), "no base x"), (OSError("/home/me"), "log")])
def test_a_base_that_does_not_load_is_told_and_tried_again_by_the_next_who_asks(context, caplog, error, words):
    found, tries = SimpleNamespace(), []

    def load():
        tries.append(1)
        if len(tries) < 3:
            raise error
        return found

    ctx = context(load)
    wait([ctx._pipeline])
    assert not ctx.loaded()
    with pytest.raises(UserError, match=words) as told:
        ctx.pipeline()
    assert "/home" not in str(told.value)
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)
    assert ctx.pipeline() is ctx.pipeline() is found and ctx.loaded() and len(tries) == 3


def test_a_fault_of_ours_is_told_without_its_secrets_and_logged(caplog):
    def broken():
        raise KeyError("/secret/path")

    def broken_stream():
        yield 1
        raise KeyError("/secret/path")

    for each in (broken, lambda: list(as_gradio_error(broken_stream)())):
        with pytest.raises(gr.Error, match="server's log") as told:
            as_gradio_error(each)()
        assert "secret" not in told.value.message
    assert [str(record.exc_info[1]) for record in caplog.records] == ["'/secret/path'"] * 2


@pytest.fixture
def hidden(context, tmp_path) -> AppContext:
    """A page whose base lies in a secret folder and does not load."""
    secret = tmp_path / "secret" / "my_base"
    secret.mkdir(parents=True)

    def load():
        raise UserError(f"{secret} has no unet; {tmp_path / 'runs' / 'x'} is there")

    return context(load, title="my_base", name=str(secret), adapters_dir=secret.parent / "adapters")


def test_no_visitor_reads_where_things_lie_on_this_machine(hidden, tmp_path, ann):
    me = hidden.visitors.of(PAGE)
    run = recorded(tmp_path / "runs" / "dog", owner=me.id).run_dir
    (run / "job.log").write_text(f"error: {hidden.base_name}/unet is missing, {hidden.catalog.adapters_dir}/a too\n")
    now = watched(hidden.jobs, "dog", None, me)
    ann.photos_dir.mkdir()
    PIL.Image.new("RGB", (64, 64)).save(ann.photos_dir / "photo_01.png")
    texts = {text: "my_base/unet" for text in (now["status"], now["log"], str(handler(hidden, "status")("dog", PAGE)))}
    acts = [partial(act, hidden, TrainForm("sks", "dog"), ann) for act in (estimate_cost, start_run, add_to_queue)]
    for asked, words in ((hidden.pipeline, "my_base has no unet; x is there"), *((act, "my_base") for act in acts)):
        with pytest.raises(UserError) as told:
            asked()
        texts[str(told.value)] = words
    for text, words in texts.items():
        assert words in text and str(tmp_path) not in text


def test_the_prompt_of_a_visitor_is_not_written_to_the_log(subject):
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    import_libraries()
    logger = logging.getLogger(TELLS_PROMPTS)
    logger.addHandler(handler)
    try:
        list(subject.generate(GenerationParams("my secret dog " * 40, steps=1)))
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
    assert lines == ["heard"]
