"""Files of a run that somebody, or a dying disk, has changed: the page says so and goes on."""

import json
import os

import psutil
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.train_watch import watched
from tests.ui.test_handlers import OWNER, visitor

DEEP = "[" * 100_000


def run_with(tmp_path, name: str, content: str) -> Jobs:
    run = tmp_path / "runs" / "dog"
    run.mkdir(parents=True)
    Job(run, OWNER, os.getpid(), psutil.Process().create_time() - 100).save()
    (run / name).write_text(content)
    return Jobs(tmp_path / "runs")


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "7", DEEP], ids=["empty", "words", "list", "number", "deep"])
def test_settings_that_cannot_be_read_are_told(tmp_path, content):
    jobs = run_with(tmp_path, "job_config.json", content)
    with pytest.raises(UserError, match="settings of the run dog cannot be read"):
        jobs.resume("dog", OWNER)


EVENTS = {
    "words": [{"type": "start", "max_train_steps": "many"}, {"type": "step", "step": 3}],
    "lists": [{"type": "start", "max_train_steps": [], "time": []}, {"type": "phase", "phase": {}, "total": "x"}],
    "odd steps": [{"type": "step", "step": 3, "loss": "low", "eta_sec": [], "step_sec": "x", "memory_gib": "y"}],
    "odd samples": [{"type": "sample", "step": 0, "files": 7}, {"type": "sample", "files": [[1]]}],
    "odd end": [{"type": "end", "state": ["x"], "message": {"a": 1}, "time": 1e18}],
    "nulls": [{"type": "start", "time": None}, {"type": "end", "state": None, "message": None, "time": None}],
    "no steps": [{"type": "step"}, {"type": "evaluation", "clip_t": 0.5}],
}


@pytest.mark.parametrize("kind", EVENTS)
def test_events_of_the_wrong_kind_are_passed_over(tmp_path, kind):
    lines = [json.dumps({"time": 1e12, **event}) for event in EVENTS[kind]]
    jobs = run_with(tmp_path, "metrics.jsonl", "\n".join([*lines, DEEP, ""]))
    assert watched(jobs, "dog", None, visitor(tmp_path))["status"]


def test_a_run_that_ended_while_the_clock_was_put_back_is_done(tmp_path):
    """Its events are known by their place in the file: those behind its start are its own."""
    now = psutil.Process().create_time() - 100
    events = [
        {"type": "start", "time": now - 50},
        {"type": "end", "time": now - 40, "state": "failed"},
        {"type": "start", "time": now + 1},
        {"type": "step", "time": now + 2, "step": 7},
        {"type": "end", "time": now - 3600, "state": "done"},
    ]
    jobs = run_with(tmp_path, "metrics.jsonl", "".join(f"{json.dumps(event)}\n" for event in events))
    (tmp_path / "runs" / "dog" / "job.json").write_text(json.dumps({"owner": OWNER, "pid": 2**30, "created": now}))
    (job,) = jobs.all()
    assert (jobs.state(job).state, jobs.state(job).step, jobs.was_cut_off(job)) == ("done", 7, False)


RECORDS = [
    DEEP,
    '{"owner": 5}',
    json.dumps({"owner": OWNER, "pid": "x", "created": []}),
    *(json.dumps({"owner": OWNER, "pid": pid, "created": 0.0}) for pid in (-1, 0, True)),
    json.dumps({"owner": OWNER, "pid": os.getpid(), "created": 10**400}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record[:60])
def test_a_record_that_cannot_be_read_is_no_run(tmp_path, record):
    jobs = run_with(tmp_path, "job.json", record)
    assert jobs.all() == [] and jobs.current() is None
    with pytest.raises(UserError, match="you have no run"):
        jobs.stop("dog", OWNER)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_record_that_is_a_pipe_is_no_run_and_is_not_waited_for(tmp_path):
    jobs = run_with(tmp_path, "log.txt", "")
    (tmp_path / "runs" / "dog" / "job.json").unlink()
    os.mkfifo(tmp_path / "runs" / "dog" / "job.json")
    assert jobs.all() == [] and jobs.current() is None
