"""What the page's tests begin with: its photos, runs of a stand-in, and the page without a
server."""

import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file

from dreambooth_moslora.disk.paths import get_assets_folder
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.page import build_app
from dreambooth_moslora.ui.state import AdapterCatalog, AppContext, PageBase
from dreambooth_moslora.ui.workspace import Workspace
from tests.helpers.browser import chromium
from tests.helpers.ui_server import serve

PAGE = SimpleNamespace(session_hash="page")
"""A request of one page."""
TRAINER = '''
"""Stands in for the training program where a real one would be too slow or too well-behaved."""
import json, os, signal, sys, time
config = json.load(open(sys.argv[2]))
mode, out = config.get("mode"), config["output_dir"] + "/metrics.jsonl"
def say(kind, **facts):
    with open(out, "a") as file:
        file.write(json.dumps({"type": kind, "time": time.time(), **facts}) + "\\n")
if mode == "crash":
    print("error: the photos are gone", file=sys.stderr)
    sys.exit(2)
stop = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: stop.append(1))
total = config.get("max_train_steps", 1000)
say("start", max_train_steps=total, config={})
say("phase", phase=config.get("phase", "loading"), done=0, total=1)
for step in range(1, total + 1):
    losses = {"loss": 1.0, "loss_instance": 1.0, "loss_prior": None}
    say("step", step=step, **losses, lr=1e-4, step_sec=0.05, eta_sec=9.0)
    time.sleep(0.05)
    if mode != "stubborn" and os.path.exists(os.environ["DREAMBOOTH_STOP_FILE"]):
        stop.append(1)
    if stop or step == config.get("steps"):
        break
say("end", state="interrupted" if stop else "done", step=step, message="")
'''


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    (root := tmp_path / "workspace").mkdir()
    return Workspace(root)


@pytest.fixture
def toys(workspace) -> Workspace:
    """With five photos of a duck."""
    workspace.photos_dir.mkdir()
    for number, photo in enumerate(toy_photos("duck", 5), 1):
        shutil.copy(photo, workspace.photos_dir / f"photo_0{number}.png")
    return workspace


@pytest.fixture(autouse=True)
def _of_one_test(request):
    """What a page that several tests share has taken in goes with the test."""
    yield
    for name in {"served", "of_toys"} & set(request.fixturenames):
        kept = request.getfixturevalue(name).ctx.workspace
        kept.close()
        for each in (kept.history, kept.uploads):
            each.clear()


@pytest.fixture
def tab(tmp_path, workspace) -> SimpleNamespace:
    """What the Train tab's actions know of a page on the embedded base."""
    jobs = Jobs(tmp_path / "runs")
    catalog = AdapterCatalog(tmp_path / "adapters", jobs.runs_dir, workspace)
    facts = {"base_name": "toy", "resolution_px": 128, "runs_dir": jobs.runs_dir, "jobs": jobs}
    return SimpleNamespace(**facts, catalog=catalog, workspace=workspace)


@pytest.fixture
def context(tmp_path, workspace):
    """Makes a page without a server, on a base that `load` gives; `facts` win."""

    def make(load=lambda: None, others=(), **facts) -> AppContext:
        of_base = {"title": "x", "name": "toy", "resolution_px": 64, "public_name": ""}
        of_base |= {name: facts.pop(name) for name in of_base if name in facts}
        folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
        return AppContext(
            PageBase(load=load, **of_base), *others, **{"workspace": workspace} | folders | facts
        )

    return make


def recorded(run: Path, *events: dict, **job) -> Job:
    """A run with these events, whose process is gone; this one, where `job` has its birth."""
    run.mkdir(parents=True, exist_ok=True)
    found = Job(run, **{"pid": os.getpid(), "birth": "another boot", "began": 1.0} | job)
    found.save()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"time": 1e12} | event) + "\n" for event in events)
    )
    return found


@pytest.fixture
def jobs(tmp_path):
    """Runs of TRAINER."""
    (script := tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "runs").mkdir()
    found = Jobs(tmp_path / "runs", script)
    yield found
    end_all(found)


def end_all(jobs: Jobs) -> None:
    for job in jobs.list_jobs():
        if job.is_alive:
            os.kill(job.pid, 9)


@pytest.fixture(scope="module")
def of_toys(tmp_path_factory):
    """The page on the embedded base."""
    with serve("toy", tmp_path_factory.mktemp("toys")) as server:
        with_one_picture(server.ctx.jobs)
        yield server
        end_all(server.ctx.jobs)


def with_one_picture(jobs: Jobs) -> None:
    """Runs that are started draw one picture at a time, and not four, which take a
    minute."""
    start = jobs.start
    jobs.start = lambda name, config, *rest: start(
        name, config | {"num_validation_images": 1}, *rest
    )


def toy_photos(name: str, count: int) -> list[Path]:
    return [get_assets_folder() / "subjects" / name / f"0{number}.jpg" for number in range(count)]


def noise_photos(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number:02d}.png" for number in range(count)]
    for number, file in enumerate(files):
        PIL.Image.effect_noise((140 + number, 150), 80).convert("RGB").save(file)
    return files


@pytest.fixture
def started(served, monkeypatch):
    """The settings of each run that is started; none is trained."""
    found: list[dict] = []

    def start(name: str, config: dict) -> Job:
        found.append(config)
        return Job(served.ctx.runs_dir / name, 1, "")

    monkeypatch.setattr(served.ctx.jobs, "start", start)
    return found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def wait_for(condition, seconds: float = 40.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def handler(ctx: AppContext, name: str, elem_id: str = ""):
    """What the page does at that event, or at that of the widget with this id."""
    page = build_app(ctx)
    numbers = {number for number, block in page.blocks.items() if elem_id in ("", block.elem_id)}
    events = (event for event in page.fns.values() if event.name == name)
    return next(
        event.fn
        for event in events
        if not elem_id or {number for number, _ in event.targets} & numbers
    )


def write_adapter(file: Path, trigger: str = "sks", class_word: str = "dog", **facts) -> Path:
    facts = {"trigger_words": [trigger], "class_word": class_word, "base_id": "toy"} | facts
    facts = {"rank": 4, "alpha": 4.0} | facts
    return save_header(file, moslora=json.dumps(facts))


def save_header(file: Path, **header: str) -> Path:
    """An adapter of one number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, file, metadata=header)
    return file


def refusal(client, *args, **kwargs) -> str:
    """The words of the error that a request to the page ends in."""
    with pytest.raises(Exception) as error:
        client.predict(*args, **kwargs)
    return str(error.value)


def event_of(served, elem_id: str, trigger: str) -> int:
    """The number of the event that one widget's `trigger` starts."""
    config = httpx.get(f"{served.url}config").json()
    widget = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id)
    return next(
        d["id"]
        for d in config["dependencies"]
        if [widget, trigger] in [list(t) for t in d["targets"]]
    )
