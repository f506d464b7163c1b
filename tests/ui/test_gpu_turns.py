"""A run and the page's own base take turns: on a GPU, and in the memory of a machine without one."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.generation.params import GenerationParams, Image
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.generate_values import GenerateForm, make_pictures
from dreambooth_moslora.ui.state import AppContext
from tests.ui.conftest import OWNER, PAGE, wait_for

OTHER_DEVICE = "cpu:0"
"""Not the device named `cpu`, but with its memory: here the pipeline can really be moved, and draw."""


@pytest.fixture
def resting(tiny_base):
    """Loads a base as the page does; returns it, and the devices that it is moved to from then on."""

    def load() -> tuple[SubjectPipeline, list[str]]:
        subject, moves = SubjectPipeline.from_base(tiny_base, device=OTHER_DEVICE, resting=True), []
        move = subject.pipeline.to
        subject.pipeline.to = lambda device, **options: (moves.append(str(device)), move(device, **options))[1]
        return subject, moves

    return load


def stop(ctx: AppContext) -> None:
    ctx.jobs.stop(ctx.jobs.current().name, OWNER)
    wait_for(lambda: not ctx.jobs.current())


@pytest.fixture
def large(context, tmp_path):
    """A page on a base of that size, whose runs do nothing; they end with the test."""
    (tmp_path / "trainer.py").write_text("import time; time.sleep(120)")
    made = []

    def make(load, resolution_px: int = 1024) -> AppContext:
        made.append(context(load, title="sdxl", resolution_px=resolution_px))
        made[-1].jobs.script = tmp_path / "trainer.py"
        return made[-1]

    yield make
    if made[0].jobs.current():
        stop(made[0])


@pytest.fixture
def at_rest(large, resting):
    """Such a page with its base at rest, and its moves."""
    subject, moves = resting()
    ctx = large(lambda: subject)
    ctx.pipeline()
    return ctx, moves


def picture(ctx: AppContext) -> bytes:
    *_, last = make_pictures(ctx, GenerateForm("a red ball", seed=1, steps=1, size="64 x 64"), PAGE)
    return PIL.Image.open(last.pictures[0].path).tobytes()


def test_the_pages_base_is_off_the_gpu_while_a_run_trains_and_draws_the_same_afterwards(at_rest, monkeypatch):
    ctx, moves = at_rest
    before = picture(ctx)
    assert moves == [OTHER_DEVICE]
    picture(ctx)
    assert moves == [OTHER_DEVICE]
    seen, spawn = [], page_jobs.processes.start_logged
    noted = lambda *place, **how: (seen.append(list(moves)), spawn(*place, **how))[1]  # noqa: E731
    monkeypatch.setattr(page_jobs.processes, "start_logged", noted)
    ctx.jobs.start("dog", {}, OWNER)
    assert seen == [[OTHER_DEVICE, "cpu"]]
    with pytest.raises(UserError, match="this machine is training a run; pictures can be drawn again when"):
        picture(ctx)
    assert ctx.jobs.current() and moves == [OTHER_DEVICE, "cpu"]
    stop(ctx)
    assert picture(ctx) == before and moves == [OTHER_DEVICE, "cpu", OTHER_DEVICE]
    with ctx.turns.captioning():
        assert moves[3:] == ["cpu"]


def test_a_resumed_run_and_a_server_that_is_started_again_keep_the_turns_and_a_small_base_stays(
    at_rest, large, resting
):
    ctx, moves = at_rest
    ctx.jobs.start("dog", {}, OWNER)
    stop(ctx)
    picture(ctx)
    ctx.jobs.resume("dog", OWNER)
    assert moves == ["cpu", OTHER_DEVICE, "cpu"]
    fresh, its_moves = resting()
    with pytest.raises(UserError, match="this machine is training a run"):
        picture(large(lambda: fresh))
    assert its_moves == []
    picture(large(lambda: fresh, resolution_px=128))
    assert ctx.jobs.current() and its_moves == [OTHER_DEVICE]


def test_a_run_begins_when_the_picture_being_drawn_is_done(at_rest):
    ctx, moves = at_rest
    frames = make_pictures(ctx, GenerateForm("a red ball", seed=1, steps=2, size="64 x 64"), PAGE)
    next(frames)
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        job = pool.submit(lambda: (started.set(), ctx.jobs.start("dog", {}, OWNER))[1])
        started.wait()
        time.sleep(0.1)
        assert not job.done() and ctx.jobs.current() is None
        *_, last = frames
        assert len(last.pictures) == 1 and job.result(timeout=20).is_alive
    assert moves == [OTHER_DEVICE, "cpu"]


def test_without_a_gpu_a_large_base_leaves_memory_while_a_run_trains_and_is_loaded_again(large, tiny_base):
    made = []

    def load() -> SubjectPipeline:
        subject = SubjectPipeline.from_base(tiny_base, device="cpu")
        made.append(weakref.ref(subject.pipeline.unet))
        return subject

    ctx = large(load)
    ctx.jobs.start("dog", {}, OWNER)  # while the base is loading
    assert not ctx.loaded() and [one() for one in made] == [None]
    with pytest.raises(UserError, match="this machine is training a run; pictures can be drawn again when"):
        picture(ctx)
    with pytest.raises(UserError, match="this machine is training a run"):
        large(load).pipeline()  # a server that is started again
    stop(ctx)
    before = picture(ctx)
    ctx.jobs.start("cat", {}, OWNER)
    assert [one() for one in made] == [None, None]
    stop(ctx)
    assert picture(ctx) == before and len(made) == 3


def test_an_adapter_that_is_loaded_at_rest_draws_as_one_loaded_awake():
    params = GenerationParams("a sks rocket", adapters=(("rocket", 1.0),), seed=3, steps=2)
    drawn = []
    for rests in (False, True):
        subject = SubjectPipeline.from_base("toy", device=OTHER_DEVICE, resting=rests)
        subject.load_adapter("assets/adapters/rocket.safetensors", "rocket")
        images = [event for event in subject.generate(params) if isinstance(event, Image)]
        drawn.append(images[0].pixels.tobytes())
    assert drawn[0] == drawn[1]
