"""The queue of runs: its order on the disk, turns that outlive page and command, one process a run, a bad run alone."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.queue import COMMAND_LINE, QueuedRun, RunQueue, locked
from dreambooth_moslora.ui.jobs import KILLED_MOST, Jobs, QueueTurns
from tests.ui.test_handlers import OTHER, OWNER
from tests.ui.test_processes import jobs, wait_for  # noqa: F401 (a fixture)

TURNS = """
import sys, time
from pathlib import Path
from dreambooth_moslora.ui.jobs import Jobs
from dreambooth_moslora.ui.jobs import QueueTurns
turns = QueueTurns(Jobs(Path(sys.argv[1]), Path(sys.argv[2])))
while not turns.is_empty:
    turns.take()
    time.sleep(0.01)
"""


def added(queue: RunQueue, name: str, owner: str = OWNER, address: str = "", **settings) -> QueuedRun:
    """A run of the stand-in for the trainer, of two steps."""
    (queue.runs_dir / name).mkdir()
    settings = {"mode": "good", "steps": 2, "output_dir": str(queue.runs_dir / name)} | settings
    run = QueuedRun(name, owner, address, settings=settings, is_new=True, queued=time.time())
    queue.add(run)
    return run


def names(queue: RunQueue) -> list[str]:
    return [run.name for run in queue.waiting()]


def endings(queue: RunQueue) -> dict[str, str]:
    return {event["name"]: event["state"] for event in queue.ended()}


def trained(turns: QueueTurns) -> dict[str, str]:
    def is_empty() -> bool:
        turns.take()
        return turns.is_empty

    wait_for(is_empty)
    return endings(turns.queue)


def starts_of(queue: RunQueue, name: str) -> list[dict]:
    lines = (queue.runs_dir / name / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["type"] == "start"]


def test_the_order_is_on_the_disk_and_each_owner_changes_only_the_own_places(tmp_path):
    queue = RunQueue(tmp_path)
    for name, owner in (("a", OWNER), ("b", OTHER), ("c", OWNER), ("d", OWNER)):
        added(queue, name, owner)
    assert names(RunQueue(tmp_path)) == ["a", "b", "c", "d"]
    for name, place, owner, order in (
        ("d", "up", OWNER, "abdc"),
        ("c", "first", OWNER, "cbad"),
        ("c", "down", OWNER, "abcd"),
        ("d", "up", None, "abdc"),
        ("b", "3", None, "adbc"),
        ("a", "last", None, "dbca"),
        ("b", "9" * 5000, None, "dcab"),
        ("b", "2", None, "dbca"),
    ):
        queue.move(name, place, owner)
        assert "".join(names(RunQueue(tmp_path))) == order
    added(queue, "e")
    assert names(queue)[-1] == "e"
    for call in (lambda: queue.move("a", "up", OTHER), lambda: queue.remove("a", OTHER), lambda: queue.remove("zz")):
        with pytest.raises(UserError, match="waits in the queue"):
            call()
    with pytest.raises(UserError, match="'sideways' is not a place"):
        queue.move("a", "sideways")
    with pytest.raises(UserError, match="a is in the queue already"):
        queue.add(QueuedRun("a"))


def test_owners_take_turns_however_many_runs_each_has_waiting(tmp_path):
    queue = RunQueue(tmp_path)
    for name in ("e1", "e2", "e3", "e4"):
        added(queue, name, "eve")
    assert queue.claim().name == "e1"  # eve's turn in the first round
    for name, owner in (("a1", "ann"), ("b1", "bob"), ("a2", "ann"), ("c1", COMMAND_LINE), ("c2", COMMAND_LINE)):
        added(queue, name, owner)
    assert names(RunQueue(tmp_path)) == ["a1", "b1", "c1", "e2", "a2", "c2", "e3", "e4"]
    queue.move("e4", "first")  # by the person at the machine
    added(queue, "d1", "dan")
    assert names(queue) == ["e4", "a1", "b1", "c1", "d1", "e2", "a2", "c2", "e3"]


def test_invented_cookies_of_one_address_are_together_no_more_than_a_few_owners(tmp_path):
    queue = RunQueue(tmp_path)
    for number in range(12):
        added(queue, f"e{number}", f"cookie {number}", "203.0.113.1")
    added(queue, "a", "ann", "203.0.113.2")
    added(queue, "l", "a login")
    assert names(queue)[:6] == ["e0", "e1", "e2", "e3", "a", "l"]


def test_a_removed_run_takes_its_new_folder_along_but_nothing_that_was_trained(tmp_path):
    queue = RunQueue(tmp_path)
    for name, owner in (("new", OWNER), ("trained", OWNER), ("empty", COMMAND_LINE), ("noted", COMMAND_LINE)):
        added(queue, name, owner)
    (tmp_path / "trained" / "metrics.jsonl").write_text("")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    for name in ("new", "trained", "empty", "noted"):
        queue.remove(name)
    assert not (tmp_path / "new").exists() and not (tmp_path / "empty").exists()
    assert (tmp_path / "trained").exists() and names(queue) == []
    assert (tmp_path / "noted" / "notes.txt").read_text() == "mine"


def test_runs_are_trained_in_their_order_and_a_bad_one_fails_alone(jobs):  # noqa: F811
    turns = QueueTurns(jobs)
    added(turns.queue, "cat")
    added(turns.queue, "bad", mode="crash")
    added(turns.queue, "gone")
    (turns.queue.folder / "waiting" / "torn.json").write_text('{"name": "to')
    added(turns.queue, "dog")
    turns.queue.move("dog", "first")
    (gone := turns.queue.folder / "waiting" / "gone.json").write_text(
        json.dumps(json.loads(gone.read_text()) | {"folder": "/no/such/folder"})
    )
    states = trained(turns)
    assert [name for name in states if name != "torn"] == ["dog", "cat", "bad", "gone"]
    assert {name for name, state in states.items() if state == "done"} == {"dog", "cat"}
    words = {event["name"]: event["message"] for event in turns.queue.ended()}
    assert words["bad"] == "error: the photos are gone" and "cannot be read" in words["torn"]
    assert "/no/such/folder" in words["gone"]
    started = {name: starts_of(turns.queue, name)[0]["time"] for name in ("dog", "cat")}
    assert started["dog"] < started["cat"]


def test_a_run_whose_folder_is_no_path_fails_alone(jobs):  # noqa: F811
    turns = QueueTurns(jobs)
    run = added(turns.queue, "bad")
    turns.queue._write("waiting", replace(run, folder="a\0b"))
    added(turns.queue, "good")
    assert trained(turns) == {"bad": "failed", "good": "done"}


def test_two_processes_never_start_the_same_run(jobs):  # noqa: F811
    queue = RunQueue(jobs.runs_dir)
    for name in ("a", "b", "c"):
        added(queue, name, steps=1)
    command = [sys.executable, "-c", TURNS, str(jobs.runs_dir), str(jobs.script)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert endings(queue) == dict.fromkeys("abc", "done") and len(queue.ended()) == 3
    assert [len(starts_of(queue, name)) for name in "abc"] == [1, 1, 1]


def test_a_run_that_was_cut_off_goes_on_first_from_its_checkpoint(jobs):  # noqa: F811
    queue, first = RunQueue(jobs.runs_dir), QueueTurns(jobs)
    added(queue, "dog", steps=500)
    added(queue, "cat")
    first.take()
    job = wait_for(lambda: jobs.current())
    wait_for(lambda: jobs.state(job).step)
    checkpoint = jobs.runs_dir / "dog" / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("position.json", "optimizer.pt", "moslora_weights.safetensors"):
        (checkpoint / name).write_text("x")
    os.kill(job.pid, 9)
    later = QueueTurns(Jobs(jobs.runs_dir, jobs.script))  # the page or the command, started again
    wait_for(lambda: jobs.current() is None)
    later.take()
    config = json.loads((jobs.runs_dir / "dog" / "job_config.json").read_text())
    assert config["resume_from_checkpoint"] == "latest" and later.current().killed == 0
    assert names(queue) == ["cat"]
    again = wait_for(lambda: later.jobs.current())
    wait_for(lambda: len(starts_of(queue, "dog")) == 2)
    os.kill(again.pid, 15)  # as when the machine goes down: nobody asked for the end of this run
    wait_for(lambda: later.jobs.current() is None)
    later.take()
    assert later.current().name == "dog"
    wait_for(lambda: len(starts_of(queue, "dog")) == 3)
    later.jobs.stop("dog", OWNER)  # its owner did
    assert trained(later) == {"dog": "interrupted", "cat": "done"}


def test_a_run_that_is_killed_again_and_again_fails_and_the_next_begins(jobs):  # noqa: F811
    jobs.script.write_text("import os; os.kill(os.getpid(), 9)")
    turns = QueueTurns(jobs)
    added(turns.queue, "big")
    assert trained(turns) == {"big": "failed"}
    assert f"killed {KILLED_MOST} times" in turns.queue.ended()[0]["message"]


def test_nothing_is_started_beside_a_run_or_in_a_folder_that_is_held(jobs):  # noqa: F811
    turns = QueueTurns(jobs)
    added(turns.queue, "dog")
    jobs.start("cat", {"mode": "good", "output_dir": str(jobs.runs_dir / "cat"), "steps": 2}, OTHER)
    turns.take()
    assert names(turns.queue) == ["dog"]
    wait_for(lambda: jobs.current() is None)
    with locked(jobs.runs_dir / "dog"):  # by a process of which no record is there
        turns.take()
        assert turns.current().name == "dog" and jobs.current() is None
    assert trained(turns) == {"dog": "done"}
