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
from dreambooth_moslora.ui.drawing import generate_images
from dreambooth_moslora.ui.events import wrap_errors
from dreambooth_moslora.ui.generate_values import GenerateForm
from dreambooth_moslora.ui.state import (
    AdapterCatalog,
    AppContext,
)
from tests.ui.conftest import PAGE, wait_for, write_adapter

PUBLISHED, RAW = "pytorch_lora_weights.safetensors", "moslora_weights.safetensors"


@pytest.fixture
def catalog(tmp_path, workspace) -> AdapterCatalog:
    return AdapterCatalog(tmp_path / "adapters", tmp_path / "runs", workspace)


def write_files(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)


def test_catalog_lists_runs_and_uploads_unless_public(tmp_path, catalog, workspace):
    runs = tmp_path / "runs"
    write_files(runs, f"dog/{PUBLISHED}", f"dog/checkpoint-20/{RAW}", f"dog/checkpoint-100/{RAW}")
    write_files(tmp_path, "adapters/cat.safetensors", "my <b>dog.safetensors")
    names = [catalog.add_upload(tmp_path / "my <b>dog.safetensors") for _ in range(2)]
    assert names == ["my _b_dog", "my _b_dog 2"]
    assert list(catalog.list_files()) == [*names, "cat", "dog", "dog@100", "dog@20"]
    workspace.uploads.clear()
    public = replace(catalog, runs_dir=None)
    assert list(public.list_files()) == ["cat"]
    with pytest.raises(UserError, match="there is no adapter"):
        public.find_file("dog")


def test_duplicate_name_gets_a_number(tmp_path, catalog):
    write_files(tmp_path, "adapters/dog.safetensors", f"runs/dog/{PUBLISHED}")
    assert list(catalog.list_files()) == ["dog", "dog 2"]
    assert catalog.find_file("dog 2") == tmp_path / "runs" / "dog" / PUBLISHED


def test_odd_links_and_pipes_are_no_adapters(tmp_path, catalog):
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
    assert list(catalog.list_files()) == ["dog"]


def test_stop_counts_before_the_turn_and_once(context):
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
    "error, message", [(UserError("there is no base x"), "no base x"), (OSError("/home/me"), "log")]
)
def test_failed_load_is_reported_and_retried(context, caplog, error, message):
    pipeline, tries = SimpleNamespace(), []

    def load():
        tries.append(1)
        if len(tries) < 3:
            raise error
        return pipeline

    ctx = context(load)
    wait([ctx._pipeline])
    assert not ctx.get_loaded_pipeline()
    with pytest.raises(UserError, match=message) as raised:
        ctx.wait_for_pipeline()
    assert "/home" not in str(raised.value)
    assert ("Traceback" in caplog.text) == isinstance(error, OSError)
    assert (
        ctx.wait_for_pipeline() is ctx.wait_for_pipeline() is pipeline
        and ctx.get_loaded_pipeline()
        and len(tries) == 3
    )


def test_bug_is_logged_but_not_shown(caplog):
    def broken():
        raise KeyError("/secret/path")

    def broken_stream():
        yield 1
        raise KeyError("/secret/path")

    for each in (broken, lambda: list(wrap_errors(broken_stream)())):
        with pytest.raises(gr.Error, match="server's log") as error:
            wrap_errors(each)()
        assert "secret" not in error.value.message
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


def stop_active_run(ctx: AppContext) -> None:
    ctx.jobs.stop(ctx.jobs.find_active_job().name)
    wait_for(lambda: not ctx.jobs.find_active_job())


@pytest.fixture
def large_page(context, tmp_path):
    """A page on a base of that size, whose runs do nothing; they end with the test."""
    (tmp_path / "trainer.py").write_text("import time; time.sleep(120)")
    contexts = []

    def make(load, resolution_px: int = 1024, **facts) -> AppContext:
        contexts.append(context(load, title="sdxl", resolution_px=resolution_px, **facts))
        contexts[-1].jobs.script = tmp_path / "trainer.py"
        return contexts[-1]

    yield make
    if contexts[0].jobs.find_active_job():
        stop_active_run(contexts[0])


@pytest.fixture
def resting_page(large_page, resting):
    """Such a page with its base at rest, and its moves."""
    subject, moves = resting()
    ctx = large_page(lambda: subject)
    ctx.wait_for_pipeline()
    return ctx, moves


def generate_pixels(ctx: AppContext) -> bytes:
    *_, last = generate_images(
        ctx, GenerateForm("a red ball", seed=1, steps=1, size="64 x 64"), PAGE
    )
    return PIL.Image.open(last.saved_images[0].path).tobytes()


def test_base_leaves_the_gpu_while_a_run_trains(resting_page, large_page, resting, monkeypatch):
    ctx, moves = resting_page
    before = generate_pixels(ctx)
    assert generate_pixels(ctx) == before and moves == [OTHER_DEVICE]
    moves_at_start, spawn = [], page_jobs.processes.start_process
    noted = lambda *place, **how: (moves_at_start.append(list(moves)), spawn(*place, **how))[1]  # noqa: E731
    monkeypatch.setattr(page_jobs.processes, "start_process", noted)
    ctx.jobs.start("dog", {})
    assert moves_at_start == [[OTHER_DEVICE, "cpu"]]
    fresh, its_moves = resting()
    for page in (ctx, large_page(lambda: fresh)):
        with pytest.raises(
            UserError, match="this machine is training a run; pictures can be drawn again when"
        ):
            generate_pixels(page)
    assert its_moves == []
    generate_pixels(large_page(lambda: fresh, resolution_px=128))  # a small base stays
    assert ctx.jobs.find_active_job() and (moves, its_moves) == (
        [OTHER_DEVICE, "cpu"],
        [OTHER_DEVICE],
    )
    stop_active_run(ctx)
    assert generate_pixels(ctx) == before and moves[2:] == [OTHER_DEVICE]


def test_run_starts_after_the_current_image(
    resting_page,
):
    ctx, moves = resting_page
    frames = generate_images(ctx, GenerateForm("a red ball", seed=1, steps=2, size="64 x 64"), PAGE)
    next(frames)
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        job = pool.submit(lambda: (started.set(), ctx.jobs.start("dog", {}))[1])
        started.wait()
        time.sleep(0.1)
        assert not job.done() and ctx.jobs.find_active_job() is None
        *_, last = frames
        assert len(last.saved_images) == 1 and job.result(timeout=20).is_alive
    stop_active_run(ctx)
    generate_pixels(ctx)
    ctx.jobs.resume("dog")
    assert moves == [OTHER_DEVICE, "cpu"] * 2


@pytest.mark.slow
def test_adapter_loaded_at_rest_generates_the_same():
    params = GenerationParams("a sks rocket", adapters=(("rocket", 1.0),), seed=3, steps=2)
    outputs = []
    for rests in (False, True):
        subject = SubjectPipeline.from_base("toy", device=OTHER_DEVICE, resting=rests)
        subject.load_adapter("assets/adapters/rocket.safetensors", "rocket")
        images = [event for event in subject.generate(params) if isinstance(event, Image)]
        outputs.append(images[0].pixels.tobytes())
    assert outputs[0] == outputs[1]
