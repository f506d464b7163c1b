"""What the page knows without a server: its shelf, whose work is stopped, what it tells of a fault;
and its base, which takes turns with a run: on a GPU, and in the memory of a machine without one."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import PIL.Image
import pytest

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.generation.image_params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.drawing import make_pictures
from dreambooth_moslora.ui.events import wrap_errors
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.state import (
    AdapterCatalog,
    AppContext,
)
from tests.ui.conftest import PAGE, wait_for, write_adapter

PUBLISHED, RAW = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"


@pytest.fixture
def shelf(tmp_path, workspace) -> AdapterCatalog:
    return AdapterCatalog(tmp_path / "adapters", tmp_path / "runs", workspace)


def put(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


def test_the_shelf_shows_all_runs_and_uploads_and_that_of_a_public_page_only_its_own_files(
    tmp_path, shelf, workspace
):
    runs = tmp_path / "runs"
    put(runs, f"dog/{PUBLISHED}", f"dog/checkpoint-20/{RAW}", f"dog/checkpoint-100/{RAW}")
    put(tmp_path, "adapters/cat.safetensors", "my <b>dog.safetensors")
    names = [shelf.add_upload(tmp_path / "my <b>dog.safetensors") for _ in range(2)]
    assert names == ["my _b_dog", "my _b_dog 2"]
    assert list(shelf.list_files()) == [*names, "cat", "dog", "dog@100", "dog@20"]
    workspace.uploads.clear()
    public = replace(shelf, runs_dir=None)
    assert list(public.list_files()) == ["cat"]
    with pytest.raises(UserError, match="there is no adapter"):
        public.find_file("dog")


def test_a_file_of_a_taken_name_has_a_number(tmp_path, shelf):
    put(tmp_path, "adapters/dog.safetensors", f"runs/dog/{PUBLISHED}")
    assert list(shelf.list_files()) == ["dog", "dog 2"]
    assert shelf.find_file("dog 2") == tmp_path / "runs" / "dog" / PUBLISHED


def test_links_out_of_the_folder_or_in_circles_and_pipes_are_no_adapters(tmp_path, shelf):
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
    assert list(shelf.list_files()) == ["dog"]


def test_a_stop_counts_before_ones_turn_has_come_and_only_once(context):
    pages = [SimpleNamespace(session_hash=name) for name in ("mine", "other")]
    ctx = context()
    for page in pages:
        ctx.register_work(page)
    ctx.stop(pages[0])
    for page, stopped in zip(pages, (True, False)):
        with ctx.track_work(page) as should_stop:
            assert should_stop() == stopped
    with ctx.track_work(pages[0]) as should_stop:  # of a program, which announces nothing
        assert not should_stop()
        ctx.stop(pages[0])
        assert should_stop()


@pytest.mark.parametrize(
    "error, words", [(UserError("there is no base x"), "no base x"), (OSError("/home/me"), "log")]
)
def test_a_base_that_does_not_load_is_told_and_tried_again_by_the_next_who_asks(
    context, caplog, error, words
):
    found, tries = SimpleNamespace(), []

    def load():
        tries.append(1)
        if len(tries) < 3:
            raise error
        return found

    ctx = context(load)
    wait([ctx._pipeline])
    assert not ctx.get_loaded_pipeline()
    with pytest.raises(UserError, match=words) as told:
        ctx.wait_for_pipeline()
    assert "/home" not in str(told.value)
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)
    assert (
        ctx.wait_for_pipeline() is ctx.wait_for_pipeline() is found
        and ctx.get_loaded_pipeline()
        and len(tries) == 3
    )


def test_a_fault_of_ours_is_told_without_its_secrets_and_logged(caplog):
    def broken():
        raise KeyError("/secret/path")

    def broken_stream():
        yield 1
        raise KeyError("/secret/path")

    for each in (broken, lambda: list(wrap_errors(broken_stream)())):
        with pytest.raises(gr.Error, match="server's log") as told:
            wrap_errors(each)()
        assert "secret" not in told.value.message
    assert [str(record.exc_info[1]) for record in caplog.records] == ["'/secret/path'"] * 2


OTHER_DEVICE = "cpu:0"
"""Not the device named `cpu`, but with its memory: here the pipeline can really be moved, and draw.
"""


@pytest.fixture
def resting(tiny_base):
    """Loads a base as the page does; returns it, and the devices that it is moved to from then
    on."""

    def load() -> tuple[SubjectPipeline, list[str]]:
        subject, moves = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE, resting=True), []
        move = subject.pipeline.to
        subject.pipeline.to = lambda device, **options: (
            moves.append(str(device)),
            move(device, **options),
        )[1]
        return subject, moves

    return load


def stop(ctx: AppContext) -> None:
    ctx.jobs.stop(ctx.jobs.find_active_job().name)
    wait_for(lambda: not ctx.jobs.find_active_job())


@pytest.fixture
def large(context, tmp_path):
    """A page on a base of that size, whose runs do nothing; they end with the test."""
    (tmp_path / "trainer.py").write_text("import time; time.sleep(120)")
    made = []

    def make(load, resolution_px: int = 1024, **facts) -> AppContext:
        made.append(context(load, title="sdxl", resolution_px=resolution_px, **facts))
        made[-1].jobs.script = tmp_path / "trainer.py"
        return made[-1]

    yield make
    if made[0].jobs.find_active_job():
        stop(made[0])


@pytest.fixture
def at_rest(large, resting):
    """Such a page with its base at rest, and its moves."""
    subject, moves = resting()
    ctx = large(lambda: subject)
    ctx.wait_for_pipeline()
    return ctx, moves


def picture(ctx: AppContext) -> bytes:
    *_, last = make_pictures(ctx, GenerateForm("a red ball", seed=1, steps=1, size="64 x 64"), PAGE)
    return PIL.Image.open(last.pictures[0].path).tobytes()


def test_the_pages_base_is_off_the_gpu_while_a_run_trains_after_a_restart_too_and_draws_the_same(
    at_rest, large, resting, monkeypatch
):
    ctx, moves = at_rest
    before = picture(ctx)
    assert picture(ctx) == before and moves == [OTHER_DEVICE]
    seen, spawn = [], page_jobs.processes.start_process
    noted = lambda *place, **how: (seen.append(list(moves)), spawn(*place, **how))[1]  # noqa: E731
    monkeypatch.setattr(page_jobs.processes, "start_process", noted)
    ctx.jobs.start("dog", {})
    assert seen == [[OTHER_DEVICE, "cpu"]]
    fresh, its_moves = resting()
    for page in (ctx, large(lambda: fresh)):
        with pytest.raises(
            UserError, match="this machine is training a run; pictures can be drawn again when"
        ):
            picture(page)
    assert its_moves == []
    picture(large(lambda: fresh, resolution_px=128))  # a small base stays
    assert ctx.jobs.find_active_job() and (moves, its_moves) == (
        [OTHER_DEVICE, "cpu"],
        [OTHER_DEVICE],
    )
    stop(ctx)
    assert picture(ctx) == before and moves[2:] == [OTHER_DEVICE]


def test_a_run_begins_when_the_picture_being_drawn_is_done_and_a_resumed_one_keeps_the_turns(
    at_rest,
):
    ctx, moves = at_rest
    frames = make_pictures(ctx, GenerateForm("a red ball", seed=1, steps=2, size="64 x 64"), PAGE)
    next(frames)
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        job = pool.submit(lambda: (started.set(), ctx.jobs.start("dog", {}))[1])
        started.wait()
        time.sleep(0.1)
        assert not job.done() and ctx.jobs.find_active_job() is None
        *_, last = frames
        assert len(last.pictures) == 1 and job.result(timeout=20).is_alive
    stop(ctx)
    picture(ctx)
    ctx.jobs.resume("dog")
    assert moves == [OTHER_DEVICE, "cpu"] * 2


@pytest.mark.slow
def test_an_adapter_that_is_loaded_at_rest_draws_as_one_loaded_awake():
    params = GenerationParams("a sks rocket", adapters=(("rocket", 1.0),), seed=3, steps=2)
    drawn = []
    for rests in (False, True):
        subject = SubjectPipeline.from_base("toy", device=OTHER_DEVICE, resting=rests)
        subject.load_adapter("assets/adapters/rocket.safetensors", "rocket")
        images = [event for event in subject.generate(params) if isinstance(event, Image)]
        drawn.append(images[0].pixels.tobytes())
    assert drawn[0] == drawn[1]
