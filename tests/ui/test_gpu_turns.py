"""A run and the page's own base take turns: on a GPU, and in the memory of a machine without one."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.generate_form import GenerateForm, make_pictures
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.state import AppContext

OWNER = "a" * 64
PAGE = SimpleNamespace(username=None, cookies={}, session_hash="page")
OTHER_DEVICE = "cpu:0"
"""Not the device named `cpu`, but with its memory: here the pipeline can really be moved, and draw."""


def context(tmp_path, load, resolution_px: int = 1024) -> AppContext:
    folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
    return AppContext(load, base="sdxl", base_name="toy", resolution_px=resolution_px, training=True, **folders)


def resting_toy() -> tuple[SubjectPipeline, list[str]]:
    """The embedded base as the page loads it, and the devices that it is moved to from now on."""
    subject, moves = SubjectPipeline.from_base("toy", device=OTHER_DEVICE, resting=True), []
    move = subject.pipeline.to

    def noted(device, **options):
        moves.append(str(device))
        return move(device, **options)

    subject.pipeline.to = noted
    return subject, moves


def sleeping(tmp_path, ctx: AppContext) -> Jobs:
    (tmp_path / "trainer.py").write_text("import time; time.sleep(120)")
    ctx.jobs.script = tmp_path / "trainer.py"
    return ctx.jobs


def wait_for_the_end(jobs: Jobs) -> None:
    deadline = time.monotonic() + 30
    while jobs.current():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def picture(ctx: AppContext) -> bytes:
    form = GenerateForm("a red ball", seed=1, steps=1, size="64 x 64")
    *_, last = make_pictures(ctx, form, PAGE)
    return PIL.Image.open(last.pictures[0].path).tobytes()


def test_the_pages_base_is_off_the_gpu_while_a_run_trains_and_draws_the_same_afterwards(tmp_path, monkeypatch):
    subject, moves = resting_toy()
    ctx = context(tmp_path, lambda: subject)
    ctx.pipeline()
    jobs = sleeping(tmp_path, ctx)
    before = picture(ctx)
    assert moves == [OTHER_DEVICE]
    picture(ctx)
    assert moves == [OTHER_DEVICE]
    seen, spawn = [], page_jobs.processes.start_logged
    noted = lambda *place, **how: (seen.append(list(moves)), spawn(*place, **how))[1]  # noqa: E731
    monkeypatch.setattr(page_jobs.processes, "start_logged", noted)
    jobs.start("dog", {}, OWNER)
    assert seen == [[OTHER_DEVICE, "cpu"]]
    with pytest.raises(UserError, match="this machine is training a run; pictures can be drawn again when"):
        picture(ctx)
    assert jobs.current() and moves == [OTHER_DEVICE, "cpu"]
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    assert picture(ctx) == before and moves == [OTHER_DEVICE, "cpu", OTHER_DEVICE]
    ctx.visitors.close()


def test_a_resumed_run_and_a_server_that_is_started_again_keep_the_turns(tmp_path):
    subject, moves = resting_toy()
    ctx = context(tmp_path, lambda: subject)
    ctx.pipeline()
    jobs = sleeping(tmp_path, ctx)
    jobs.start("dog", {}, OWNER)
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    picture(ctx)
    jobs.resume("dog", OWNER)
    assert moves == ["cpu", OTHER_DEVICE, "cpu"]
    fresh, its_moves = resting_toy()
    again = context(tmp_path, lambda: fresh)
    with pytest.raises(UserError, match="this machine is training a run"):
        picture(again)
    assert its_moves == []
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    for each in (ctx, again):
        each.visitors.close()


def test_a_run_begins_when_the_picture_being_drawn_is_done(tmp_path):
    subject, moves = resting_toy()
    ctx = context(tmp_path, lambda: subject)
    ctx.pipeline()
    jobs = sleeping(tmp_path, ctx)
    frames = make_pictures(ctx, GenerateForm("a red ball", seed=1, steps=2, size="64 x 64"), PAGE)
    next(frames)
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        job = pool.submit(lambda: (started.set(), jobs.start("dog", {}, OWNER))[1])
        started.wait()
        time.sleep(0.1)
        assert not job.done() and jobs.current() is None
        *_, last = frames
        assert len(last.pictures) == 1 and job.result(timeout=20).is_alive
    assert moves == [OTHER_DEVICE, "cpu"]
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    ctx.visitors.close()


def test_a_small_base_stays_and_draws_beside_a_run(tmp_path):
    subject, moves = resting_toy()
    ctx = context(tmp_path, lambda: subject, resolution_px=128)
    ctx.pipeline()
    jobs = sleeping(tmp_path, ctx)
    jobs.start("dog", {}, OWNER)
    picture(ctx)
    assert jobs.current() and moves == [OTHER_DEVICE]
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    ctx.visitors.close()


def test_without_a_gpu_a_large_base_leaves_memory_while_a_run_trains_and_is_loaded_again(tmp_path):
    made = []

    def load() -> SubjectPipeline:
        subject = SubjectPipeline.from_base("toy", device="cpu")
        made.append(weakref.ref(subject.pipeline.unet))
        return subject

    ctx = context(tmp_path, load)
    jobs = sleeping(tmp_path, ctx)
    jobs.start("dog", {}, OWNER)  # while the base is loading
    assert not ctx.loaded() and [one() for one in made] == [None]
    with pytest.raises(UserError, match="this machine is training a run; pictures can be drawn again when"):
        picture(ctx)
    again = context(tmp_path, load)  # a server that is started again
    with pytest.raises(UserError, match="this machine is training a run"):
        again.pipeline()
    jobs.stop("dog", OWNER)
    wait_for_the_end(jobs)
    before = picture(ctx)
    jobs.start("cat", {}, OWNER)
    assert [one() for one in made] == [None, None]
    jobs.stop("cat", OWNER)
    wait_for_the_end(jobs)
    assert picture(ctx) == before and len(made) == 3
    for each in (ctx, again):
        each.visitors.close()


def test_an_adapter_that_is_loaded_at_rest_draws_as_one_loaded_awake():
    params = GenerationParams("a sks rocket", adapters=(("rocket", 1.0),), seed=3, steps=2)
    drawn = []
    for rests in (False, True):
        subject = SubjectPipeline.from_base("toy", device=OTHER_DEVICE, resting=rests)
        subject.load_adapter("assets/adapters/rocket.safetensors", "rocket")
        images = [event for event in subject.generate(params) if isinstance(event, Image)]
        drawn.append(images[0].pixels.tobytes())
    assert drawn[0] == drawn[1]
