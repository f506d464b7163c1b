"""The queue of runs: its order on the disk, turns that outlive page and command, and what the page
does with it."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreambooth_moslora.disk.events import read_events
from dreambooth_moslora.disk.queue import QueuedRun, RunQueue
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui.jobs import MAX_KILLS, Jobs, QueueRunner
from dreambooth_moslora.ui.train.queue_view import list_queue_changes
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import add_to_queue, start_run
from tests.helpers.tiny_training import paint_photos
from tests.ui.conftest import wait_for

RUN_QUEUE_SCRIPT = """
import sys, time
from pathlib import Path
from dreambooth_moslora.ui.jobs import Jobs, QueueRunner
turns = QueueRunner(Jobs(Path(sys.argv[1]), Path(sys.argv[2])))
while not turns.is_empty:
    turns.run_next()
    time.sleep(0.01)
"""


@pytest.fixture
def queue(tmp_path) -> RunQueue:
    return RunQueue(tmp_path)


@pytest.fixture
def runner(jobs) -> QueueRunner:
    return QueueRunner(jobs)


def add_run(queue: RunQueue, name: str, **settings) -> QueuedRun:
    """A run of the stand-in for the trainer, of two steps."""
    (queue.runs_dir / name).mkdir()
    settings = {"mode": "good", "steps": 2, "output_dir": str(queue.runs_dir / name)} | settings
    run = QueuedRun(name, settings=settings, queued=time.time())
    queue.add(run)
    return run


def list_names(queue: RunQueue) -> list[str]:
    return [run.name for run in queue.list_waiting()]


def list_ended(queue: RunQueue) -> list[dict]:
    return read_events(queue.ended_path) if queue.ended_path.is_file() else []


def map_end_states(queue: RunQueue) -> dict[str, str]:
    return {event["name"]: event["state"] for event in list_ended(queue)}


def run_queue(runner: QueueRunner) -> dict[str, str]:
    def is_empty() -> bool:
        runner.run_next()
        return runner.is_empty

    wait_for(is_empty)
    return map_end_states(runner.queue)


def list_starts(queue: RunQueue, name: str) -> list[dict]:
    lines = (queue.runs_dir / name / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == "start"]


def test_order_is_on_disk(queue):
    for name in "abcd":
        add_run(queue, name)
    assert list_names(RunQueue(queue.runs_dir)) == ["a", "b", "c", "d"]
    for call, message in (
        (lambda: queue.remove("zz"), "waits in the queue"),
        (lambda: queue.add(QueuedRun("a")), "a is in the queue already"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_removing_deletes_only_untrained_folders(queue):
    for name in ("new", "trained"):
        add_run(queue, name)
    (queue.runs_dir / "trained" / "metrics.jsonl").write_text("")
    for name in ("new", "trained"):
        queue.remove(name)
    assert {path.name for path in queue.runs_dir.iterdir()} == {".queue", "trained"}
    assert list_names(queue) == []


def test_runs_train_in_order_and_a_bad_one_fails_alone(runner):
    for name, mode in (("cat", "good"), ("bad", "crash")):
        add_run(runner.queue, name, mode=mode)
    (runner.queue.folder / "waiting" / "torn.json").write_text('{"name": "to')
    add_run(runner.queue, "dog")
    states = run_queue(runner)
    assert [name for name in states if name != "torn"] == ["cat", "bad", "dog"]
    assert states == dict.fromkeys(("dog", "cat"), "done") | dict.fromkeys(
        ("bad", "torn"), "failed"
    )
    messages = {event["name"]: event["message"] for event in list_ended(runner.queue)}
    assert messages["bad"] == "error: the photos are gone" and "cannot be read" in messages["torn"]
    assert list_starts(runner.queue, "cat")[0]["time"] < list_starts(runner.queue, "dog")[0]["time"]


def test_queue_survives_a_deleted_runs_folder(runner, monkeypatch):
    """Its thread ended, and whatever was queued later waited until the page was started again."""
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.TURN_SEC", 0.01)
    runner.queue.runs_dir.rmdir()
    (thread := threading.Thread(target=runner.run_forever, daemon=True)).start()
    thread.join(0.1)
    runner.queue.runs_dir.mkdir()
    add_run(runner.queue, "dog")
    wait_for(lambda: map_end_states(runner.queue) == {"dog": "done"}, 20)


def test_two_processes_never_start_one_run(jobs):
    queue = RunQueue(jobs.runs_dir)
    for name in ("a", "b", "c"):
        add_run(queue, name, steps=1)
    command = [sys.executable, "-c", RUN_QUEUE_SCRIPT, str(jobs.runs_dir), str(jobs.script)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert map_end_states(queue) == dict.fromkeys("abc", "done")
    assert len(list_ended(queue)) == 3
    assert [len(list_starts(queue, name)) for name in "abc"] == [1, 1, 1]


def make_checkpoint(run_dir: Path) -> Path:
    (checkpoint := run_dir / "checkpoint-1").mkdir()
    for name in ("position.json", "optimizer.pt", "moslora_weights.safetensors"):
        (checkpoint / name).write_text("x")
    return checkpoint


def has_resumed(jobs: Jobs) -> bool:
    config = json.loads((jobs.runs_dir / "dog" / "job_config.json").read_text())
    return config.get("resume_from_checkpoint") == "latest"


def test_killed_run_resumes_from_its_own_checkpoint(jobs):
    """One that was there before its turn is of another run, which took its folder."""
    queue, first = RunQueue(jobs.runs_dir), QueueRunner(jobs)
    add_run(queue, "dog", steps=500)
    add_run(queue, "cat")
    checkpoint = make_checkpoint(jobs.runs_dir / "dog")
    first.run_next()
    assert not has_resumed(jobs)
    job = wait_for(lambda: jobs.find_active_job())
    wait_for(lambda: jobs.get_state(job).step)
    checkpoint.touch()
    os.kill(job.pid, 9)
    later = QueueRunner(Jobs(jobs.runs_dir, jobs.script))  # the page or the command, started again
    wait_for(lambda: jobs.find_active_job() is None)
    later.run_next()
    assert (
        has_resumed(jobs) and later.find_started_run().killed == 0 and list_names(queue) == ["cat"]
    )
    again = wait_for(lambda: later.jobs.find_active_job())
    wait_for(lambda: len(list_starts(queue, "dog")) == 2)
    os.utime(checkpoint, (0, 0))
    os.kill(again.pid, 15)  # as when the machine goes down: nobody asked for the end of this run
    wait_for(lambda: later.jobs.find_active_job() is None)
    later.run_next()
    assert has_resumed(jobs) and later.find_started_run().name == "dog"
    wait_for(lambda: len(list_starts(queue, "dog")) == 3)
    later.jobs.stop("dog")  # now somebody does
    assert run_queue(later) == {"dog": "interrupted", "cat": "done"}


def test_repeatedly_killed_run_fails(runner):
    runner.jobs.script.write_text("import os; os.kill(os.getpid(), 9)")
    add_run(runner.queue, "big")
    assert run_queue(runner) == {"big": "failed"}
    assert f"killed {MAX_KILLS} times" in list_ended(runner.queue)[0]["message"]


def test_queue_waits_for_an_active_run(jobs, runner):
    add_run(runner.queue, "dog")
    jobs.start("cat", {"mode": "good", "output_dir": str(jobs.runs_dir / "cat"), "steps": 2})
    runner.run_next()
    assert list_names(runner.queue) == ["dog"]
    wait_for(lambda: jobs.find_active_job() is None)
    assert run_queue(runner) == {"dog": "done"}


FORM = TrainForm("sks", "dog")


@pytest.fixture
def page(jobs, runner, workspace):
    """What the tab's actions know."""
    return SimpleNamespace(
        queue=runner, base_name="toy", resolution_px=128, jobs=jobs, workspace=workspace
    )


@pytest.fixture
def workspace(workspace):
    """With two photos."""
    for number, file in enumerate(sorted(paint_photos(workspace.photos_dir, 2).iterdir()), 1):
        file.rename(workspace.photos_dir / f"photo_0{number}.png")
    return workspace


def test_page_adds_and_lists_queued_runs(page):
    queue, runs_dir = page.queue.queue, page.jobs.runs_dir
    assert add_to_queue(page, FORM)[0] == "dog"
    name, card = add_to_queue(page, replace(FORM, steps=7))
    assert name == "dog-2" and "dog-2 waits, number 2 in the queue" in card
    assert len(list((runs_dir / "dog-2" / "photos").iterdir())) == 2
    add_run(queue, "bear")
    changes = list_queue_changes(page, None, None)
    labels = ["1 · dog", "2 · dog-2", "3 · bear"]
    assert changes["queued"].choices == list(zip(labels, ("dog", "dog-2", "bear")))
    assert changes["queue_box"].visible
    assert list_queue_changes(page, None, changes["queue_seen"]) == {}
    with pytest.raises(UserError, match="Add to queue"):
        start_run(page, FORM)
    for run in list_names(queue):
        queue.remove(run)
    assert not list_queue_changes(page, None, None)["queue_box"].visible
    assert [path.name for path in runs_dir.iterdir()] == [".queue"]


def test_page_selects_a_starting_run_once(page):
    """Whoever looked at an older run was taken away from it, with its buttons, whenever anybody
    changed the queue."""
    add_run(page.queue.queue, "dog", steps=500)
    page.queue.run_next()
    wait_for(page.jobs.find_active_job)
    changes = list_queue_changes(page, "old", None)
    assert changes["run"] == "dog"
    add_run(page.queue.queue, "bear")
    again = list_queue_changes(page, "old", changes["queue_seen"])
    assert "bear" in str(again["queued"].choices) and "run" not in again
