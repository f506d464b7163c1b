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

from dreambooth_moslora.disk.queue import QueuedRun, RunQueue
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui.jobs import MAX_KILLS, Jobs, QueueRunner
from dreambooth_moslora.ui.train.queue_view import list_queue_changes
from dreambooth_moslora.ui.train.train_form import TrainForm
from dreambooth_moslora.ui.train.train_start import add_to_queue, start_run
from tests.helpers.tiny_training import paint_photos
from tests.ui.conftest import wait_for

TURNS = """
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
def turns(jobs) -> QueueRunner:
    return QueueRunner(jobs)


def added(queue: RunQueue, name: str, **settings) -> QueuedRun:
    """A run of the stand-in for the trainer, of two steps."""
    (queue.runs_dir / name).mkdir()
    settings = {"mode": "good", "steps": 2, "output_dir": str(queue.runs_dir / name)} | settings
    run = QueuedRun(name, settings=settings, queued=time.time())
    queue.add(run)
    return run


def names(queue: RunQueue) -> list[str]:
    return [run.name for run in queue.list_waiting()]


def endings(queue: RunQueue) -> dict[str, str]:
    return {event["name"]: event["state"] for event in queue.list_ended()}


def trained(turns: QueueRunner) -> dict[str, str]:
    def is_empty() -> bool:
        turns.run_next()
        return turns.is_empty

    wait_for(is_empty)
    return endings(turns.queue)


def starts_of(queue: RunQueue, name: str) -> list[dict]:
    lines = (queue.runs_dir / name / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == "start"]


def test_the_order_is_on_the_disk(queue):
    for name in "abcd":
        added(queue, name)
    assert names(RunQueue(queue.runs_dir)) == ["a", "b", "c", "d"]
    for call, words in (
        (lambda: queue.remove("zz"), "waits in the queue"),
        (lambda: queue.add(QueuedRun("a")), "a is in the queue already"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_a_removed_run_takes_its_new_folder_along_but_nothing_that_was_trained(queue):
    for name in ("new", "trained"):
        added(queue, name)
    (queue.runs_dir / "trained" / "metrics.jsonl").write_text("")
    for name in ("new", "trained"):
        queue.remove(name)
    assert {path.name for path in queue.runs_dir.iterdir()} == {".queue", "trained"}
    assert names(queue) == []


def test_runs_are_trained_in_their_order_and_a_bad_one_fails_alone(turns):
    for name, mode in (("cat", "good"), ("bad", "crash")):
        added(turns.queue, name, mode=mode)
    (turns.queue.folder / "waiting" / "torn.json").write_text('{"name": "to')
    added(turns.queue, "dog")
    states = trained(turns)
    assert [name for name in states if name != "torn"] == ["cat", "bad", "dog"]
    assert states == dict.fromkeys(("dog", "cat"), "done") | dict.fromkeys(
        ("bad", "torn"), "failed"
    )
    words = {event["name"]: event["message"] for event in turns.queue.list_ended()}
    assert words["bad"] == "error: the photos are gone" and "cannot be read" in words["torn"]
    assert starts_of(turns.queue, "cat")[0]["time"] < starts_of(turns.queue, "dog")[0]["time"]


def test_the_page_trains_on_after_the_folder_of_runs_was_deleted(turns, monkeypatch):
    """Its thread ended, and whatever was queued later waited until the page was started again."""
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.TURN_SEC", 0.01)
    turns.queue.runs_dir.rmdir()
    (thread := threading.Thread(target=turns.run_forever, daemon=True)).start()
    thread.join(0.1)
    turns.queue.runs_dir.mkdir()
    added(turns.queue, "dog")
    wait_for(lambda: endings(turns.queue) == {"dog": "done"}, 20)


def test_two_processes_never_start_the_same_run(jobs):
    queue = RunQueue(jobs.runs_dir)
    for name in ("a", "b", "c"):
        added(queue, name, steps=1)
    command = [sys.executable, "-c", TURNS, str(jobs.runs_dir), str(jobs.script)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert endings(queue) == dict.fromkeys("abc", "done") and len(queue.list_ended()) == 3
    assert [len(starts_of(queue, name)) for name in "abc"] == [1, 1, 1]


def make_checkpoint(run_dir: Path) -> Path:
    (checkpoint := run_dir / "checkpoint-1").mkdir()
    for name in ("position.json", "optimizer.pt", "moslora_weights.safetensors"):
        (checkpoint / name).write_text("x")
    return checkpoint


def goes_on(jobs: Jobs) -> bool:
    config = json.loads((jobs.runs_dir / "dog" / "job_config.json").read_text())
    return config.get("resume_from_checkpoint") == "latest"


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_though_the_clock_was_put_back(jobs):
    """One that was there before its turn is of another run, which took its folder."""
    queue, first = RunQueue(jobs.runs_dir), QueueRunner(jobs)
    added(queue, "dog", steps=500)
    added(queue, "cat")
    checkpoint = make_checkpoint(jobs.runs_dir / "dog")
    first.run_next()
    assert not goes_on(jobs)
    job = wait_for(lambda: jobs.find_active_job())
    wait_for(lambda: jobs.get_state(job).step)
    checkpoint.touch()
    os.kill(job.pid, 9)
    later = QueueRunner(Jobs(jobs.runs_dir, jobs.script))  # the page or the command, started again
    wait_for(lambda: jobs.find_active_job() is None)
    later.run_next()
    assert goes_on(jobs) and later.find_started_run().killed == 0 and names(queue) == ["cat"]
    again = wait_for(lambda: later.jobs.find_active_job())
    wait_for(lambda: len(starts_of(queue, "dog")) == 2)
    os.utime(checkpoint, (0, 0))
    os.kill(again.pid, 15)  # as when the machine goes down: nobody asked for the end of this run
    wait_for(lambda: later.jobs.find_active_job() is None)
    later.run_next()
    assert goes_on(jobs) and later.find_started_run().name == "dog"
    wait_for(lambda: len(starts_of(queue, "dog")) == 3)
    later.jobs.stop("dog")  # now somebody does
    assert trained(later) == {"dog": "interrupted", "cat": "done"}


def test_a_run_that_is_killed_again_and_again_fails_and_the_next_begins(turns):
    turns.jobs.script.write_text("import os; os.kill(os.getpid(), 9)")
    added(turns.queue, "big")
    assert trained(turns) == {"big": "failed"}
    assert f"killed {MAX_KILLS} times" in turns.queue.list_ended()[0]["message"]


def test_nothing_is_started_beside_a_run(jobs, turns):
    added(turns.queue, "dog")
    jobs.start("cat", {"mode": "good", "output_dir": str(jobs.runs_dir / "cat"), "steps": 2})
    turns.run_next()
    assert names(turns.queue) == ["dog"]
    wait_for(lambda: jobs.find_active_job() is None)
    assert trained(turns) == {"dog": "done"}


FORM = TrainForm("sks", "dog")


@pytest.fixture
def page(jobs, turns, workspace):
    """What the tab's actions know."""
    return SimpleNamespace(
        queue=turns, base_name="toy", resolution_px=128, jobs=jobs, workspace=workspace
    )


@pytest.fixture
def workspace(workspace):
    """With two photos."""
    for number, file in enumerate(sorted(paint_photos(workspace.photos_dir, 2).iterdir()), 1):
        file.rename(workspace.photos_dir / f"photo_0{number}.png")
    return workspace


def test_the_page_adds_and_shows_runs_also_those_of_the_command(page):
    queue, runs_dir = page.queue.queue, page.jobs.runs_dir
    assert add_to_queue(page, FORM)[0] == "dog"
    name, card = add_to_queue(page, replace(FORM, steps=7))
    assert name == "dog-2" and "dog-2 waits, number 2 in the queue" in card
    assert len(list((runs_dir / "dog-2" / "photos").iterdir())) == 2
    added(queue, "bear")
    shown = list_queue_changes(page, None, None)
    words = ["1 · dog", "2 · dog-2", "3 · bear"]
    assert shown["queued"].choices == list(zip(words, ("dog", "dog-2", "bear")))
    assert shown["queue_box"].visible
    assert list_queue_changes(page, None, shown["queue_seen"]) == {}
    with pytest.raises(UserError, match="Add to queue"):
        start_run(page, FORM)
    for run in names(queue):
        queue.remove(run)
    assert not list_queue_changes(page, None, None)["queue_box"].visible
    assert [path.name for path in runs_dir.iterdir()] == [".queue"]


def test_the_page_turns_to_the_run_whose_turn_has_come_and_once(page):
    """Whoever looked at an older run was taken away from it, with its buttons, whenever anybody
    changed the queue."""
    added(page.queue.queue, "dog", steps=500)
    page.queue.run_next()
    wait_for(page.jobs.find_active_job)
    shown = list_queue_changes(page, "old", None)
    assert shown["run"] == "dog"
    added(page.queue.queue, "bear")
    again = list_queue_changes(page, "old", shown["queue_seen"])
    assert "bear" in str(again["queued"].choices) and "run" not in again
