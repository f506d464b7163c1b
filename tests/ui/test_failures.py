"""What the page says and leaves behind when something fails on the way."""

import json
from types import SimpleNamespace

import PIL.Image
import pytest
from safetensors.torch import save_file

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui import jobs as page_jobs
from dreambooth_moslora.ui.generate_form import GenerateForm, compare, make_pictures
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.state import AdapterCatalog, AppContext
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import start_run
from dreambooth_moslora.ui.visitors import Visitor

OWNER = "a" * 64
PAGE = SimpleNamespace(username=None, cookies={}, session_hash="page")


@pytest.fixture
def visitor(tmp_path):
    (tmp_path / "visitor" / "photos").mkdir(parents=True)
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "visitor" / "photos" / "photo_01.png")
    return Visitor(OWNER, tmp_path / "visitor")


@pytest.fixture
def context(tmp_path):
    made = []

    def make(load=lambda: None) -> AppContext:
        folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
        made.append(AppContext(load, base="x", base_name="toy", resolution_px=64, training=True, **folders))
        return made[-1]

    yield make
    for ctx in made:
        ctx.visitors.close()


def last_card(frames) -> str:
    status = ""
    try:
        for frame in frames:
            status = frame.status
    except Exception:
        return status
    raise AssertionError("it did not fail")


def breaking(params, should_stop):
    raise RuntimeError("/secret/path")
    yield


@pytest.mark.parametrize("run", [make_pictures, compare])
def test_the_card_says_what_failed_in_loading_and_drawing(context, run):
    def no_base():
        raise UserError("there is no base <x>")

    form = GenerateForm("a dog", adapter="rex" if run is compare else "none")
    assert "There is no base &lt;x&gt;" in last_card(run(context(no_base), form, PAGE))
    broken = context(lambda: SimpleNamespace(generate=breaking))
    told = last_card(make_pictures(broken, GenerateForm("a dog"), PAGE))
    assert "server&#x27;s log" in told and "secret" not in told


@pytest.mark.parametrize("broken", ["write_captions", "start", "spawn"])
def test_a_start_that_fails_leaves_no_photos_and_no_taken_name(context, visitor, tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    page = context()
    jobs = page.jobs
    target = {
        "write_captions": (TrainForm, "write_captions"),
        "start": (jobs, "start"),
        "spawn": (page_jobs.processes, "start_logged"),
    }
    monkeypatch.setattr(*target[broken], fail)
    with pytest.raises(OSError, match="disk full"):
        start_run(page, TrainForm("sks", "dog"), visitor)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_process_of_which_nothing_can_be_noted_is_ended(tmp_path, monkeypatch):
    (script := tmp_path / "trainer.py").write_text("import time; time.sleep(60)")
    jobs, children = Jobs(tmp_path / "runs", script), []
    spawn = page_jobs.processes.start_logged
    noted = lambda *place, **how: children.append(spawn(*place, **how)) or children[0]  # noqa: E731
    monkeypatch.setattr(page_jobs.processes, "start_logged", noted)
    monkeypatch.setattr(Job, "save", lambda job: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        jobs.start("dog", {}, OWNER)
    assert children[0].wait(timeout=20) == -9


@pytest.mark.parametrize("record", ["", "nonsense", "[]", "{}", json.dumps({"owner": OWNER, "pid": 1, "news": True})])
def test_a_run_whose_owner_cannot_be_read_is_shown_to_nobody_else(tmp_path, record):
    (run := tmp_path / "runs" / "dog").mkdir(parents=True)
    (run / "pytorch_lora_weights.safetensors").write_text("x")
    shelf = AdapterCatalog(tmp_path / "adapters", tmp_path / "runs")
    assert list(shelf.files()) == ["dog"]
    (run / "job.json").write_text(record)
    assert not shelf.files() and not shelf.files(Visitor("b" * 64, tmp_path))
    (run / "job.json").unlink()
    (run / "job.json").symlink_to(tmp_path / "nowhere")
    assert not shelf.files()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_black_picture_is_explained(context, subject, state, tmp_path):
    """Values that overflow inside the model end as black pixels, without an error."""
    (tmp_path / "adapters").mkdir()
    save_file({key: value * 1e30 for key, value in state.items()}, tmp_path / "adapters" / "huge.safetensors")
    page = context(lambda: subject)
    for adapter, is_black in (("huge", True), ("none", False)):
        frames = list(make_pictures(page, GenerateForm("a dog", adapter=adapter, steps=1, size="64 x 64"), PAGE))
        assert ("1 of them is black: an adapter" in frames[-1].status.replace("&#x27;", "'")) == is_black
