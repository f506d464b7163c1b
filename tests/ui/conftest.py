"""Fixtures of the page's tests: photos, runs of a stand-in trainer, a page without a server."""

import json
import os
import secrets
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
    """Return the workspace with five photos of a duck."""
    workspace.photos_dir.mkdir()
    for number, photo in enumerate(list_toy_photos("duck", 5), 1):
        shutil.copy(photo, workspace.photos_dir / f"photo_0{number}.png")
    return workspace


@pytest.fixture(autouse=True)
def _clear_shared_pages(request):
    """Empty the workspace of a page that several tests share, after each test."""
    yield
    for name in {"served", "toy_page"} & set(request.fixturenames):
        workspace = request.getfixturevalue(name).ctx.workspace
        workspace.close()
        for collection in (workspace.history, workspace.uploads, workspace.subject_fields):
            collection.clear()


@pytest.fixture
def tab(tmp_path, workspace) -> SimpleNamespace:
    """Return what the Train tab's handlers use of a page on the embedded base."""
    jobs = Jobs(tmp_path / "runs")
    catalog = AdapterCatalog(tmp_path / "adapters", jobs.runs_dir, workspace)
    facts = {"base_name": "toy", "resolution_px": 128, "runs_dir": jobs.runs_dir, "jobs": jobs}
    return SimpleNamespace(**facts, catalog=catalog, workspace=workspace)


@pytest.fixture
def context(tmp_path, workspace):
    """Return a function that builds a page's state without a server; `facts` win over defaults."""

    def make(load=lambda: None, more_bases=(), **facts) -> AppContext:
        base_facts = {"title": "x", "name": "toy", "resolution_px": 64, "public_name": ""}
        base_facts |= {name: facts.pop(name) for name in base_facts if name in facts}
        folders = {"adapters_dir": tmp_path / "adapters", "runs_dir": tmp_path / "runs"}
        return AppContext(
            PageBase(load=load, **base_facts),
            *more_bases,
            **{"workspace": workspace} | folders | facts,
        )

    return make


def write_run(run: Path, *events: dict, **job) -> Job:
    """Write a run with these events, whose process is gone unless `job` has this one's birth."""
    run.mkdir(parents=True, exist_ok=True)
    job_record = Job(run, **{"pid": os.getpid(), "birth": "another boot", "began": 1.0} | job)
    job_record.save()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"time": 1e12} | event) + "\n" for event in events)
    )
    return job_record


def write_samples(run: Path, *steps: int, **facts) -> list[dict]:
    """Write the images of each prompt at these steps; return their events."""
    (run / "samples").mkdir(parents=True, exist_ok=True)
    samples = {"prompts": ["in snow", "at sea"], "seeds": [1, 1]} | facts
    events = []
    for step in steps:
        files = [
            f"samples/step_{step:06d}_{number}.png" for number in range(len(samples["prompts"]))
        ]
        for number, file in enumerate(files):
            PIL.Image.new("RGB", (8, 8), (step, number, 0)).save(run / file)
        events.append({"type": "sample", "step": step, "files": files} | samples)
    return events


@pytest.fixture
def jobs(tmp_path):
    """Return runs of TRAINER."""
    (script := tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "runs").mkdir()
    runs = Jobs(tmp_path / "runs", script)
    yield runs
    end_all(runs)


def end_all(jobs: Jobs) -> None:
    for job in jobs.list_jobs():
        if job.is_alive:
            os.kill(job.pid, 9)


@pytest.fixture(scope="module")
def toy_page(tmp_path_factory):
    """Serve the page on the embedded base."""
    with serve("toy", tmp_path_factory.mktemp("toys")) as server:
        limit_samples(server.ctx.jobs)
        yield server
        end_all(server.ctx.jobs)


def limit_samples(jobs: Jobs) -> None:
    """Generate one sample at a time, not four, which take a minute."""
    start = jobs.start
    jobs.start = lambda name, config, *args: start(
        name, config | {"num_validation_images": 1}, *args
    )


def list_toy_photos(name: str, count: int) -> list[Path]:
    return [get_assets_folder() / "subjects" / name / f"0{number}.jpg" for number in range(count)]


def write_noise_photos(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number:02d}.png" for number in range(count)]
    for number, file in enumerate(files):
        PIL.Image.effect_noise((140 + number, 150), 80).convert("RGB").save(file)
    return files


@pytest.fixture
def started(served, monkeypatch):
    """Return the settings of each run that is started; none is trained."""
    configs: list[dict] = []

    def start(name: str, config: dict) -> Job:
        configs.append(config)
        return Job(served.ctx.runs_dir / name, 1, "")

    monkeypatch.setattr(served.ctx.jobs, "start", start)
    return configs


@pytest.fixture(scope="module")
def browser():
    with chromium() as chromium_browser:
        yield chromium_browser


def wait_for(condition, seconds: float = 40.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return result


def find_handler(ctx: AppContext, name: str, elem_id: str = ""):
    """Return the handler of the event, or of that event of the widget with this id."""
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
    """Write an adapter of one number with this header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.zeros(1, np.float32)}, file, metadata=header)
    return file


def get_refusal(client, *args, **kwargs) -> str:
    """Return the message of the error in which a request to the page ends."""
    with pytest.raises(Exception) as error:
        client.predict(*args, **kwargs)
    return str(error.value)


def find_event(served, elem_id: str, trigger: str) -> int:
    """Return the number of the event that one widget's `trigger` starts."""
    return _find_dependency(httpx.get(f"{served.url}config").json(), elem_id, trigger)["id"]


def _find_dependency(config: dict, elem_id: str, trigger: str) -> dict:
    widget = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id)
    return next(
        d for d in config["dependencies"] if [widget, trigger] in [list(t) for t in d["targets"]]
    )


def click(served, elem_id: str, **values) -> str:
    """Click a button over HTTP, with `values` of other widgets by their id; return the answer."""
    config = httpx.get(f"{served.url}config").json()
    widgets = {widget["id"]: widget["props"] for widget in config["components"]}
    event = _find_dependency(config, elem_id, "click")
    inputs = [widgets[number] for number in event["inputs"]]
    session = secrets.token_hex(8)
    body = {
        "fn_index": event["id"],
        "data": [values.get(props.get("elem_id"), props.get("value")) for props in inputs],
        "session_hash": session,
    }
    httpx.post(f"{served.url}gradio_api/queue/join", json=body)
    stream = f"{served.url}gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", stream, timeout=60) as lines:
        return next(line for line in lines.iter_lines() if "process_completed" in line)
