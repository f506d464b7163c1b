"""Runs as the page sees them when something changes under it: a resumed file, a deleted folder, a killed process."""

import json
import os
import shutil
import time
from dataclasses import replace

import psutil
import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import Metrics
from dreambooth_moslora.disk.processes import why_it_ended
from dreambooth_moslora.ui.jobs import Job, Jobs, JobState, birth_of, phase_of
from dreambooth_moslora.ui.train_watch import status_card, watched
from dreambooth_moslora.ui.visitors import Visitor

OWNER = "a" * 64


def line(kind: str, step: int, when: float = 0.0, **facts) -> str:
    return json.dumps({"type": kind, "time": when, "step": step, **facts}) + "\n"


def replaced(path, text: str) -> None:
    (fresh := path.with_name("fresh")).write_text(text)
    fresh.replace(path)


def test_a_run_that_goes_on_from_an_older_checkpoint_is_read_anew(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    steps = [line("step", step, step) for step in range(1, 383)]
    metrics.path.write_text(line("start", 0) + "".join(steps))
    assert metrics.refresh().last("step")["step"] == 382
    replaced(metrics.path, line("start", 0) + "".join(steps[:200]) + line("start", 200, 500.0))
    assert metrics.refresh().last("step")["step"] == 200 and metrics.events[-1]["type"] == "start"
    with metrics.path.open("a") as file:
        file.writelines(line("step", step, 500.0 + step) for step in range(201, 500))
    assert [e["step"] for e in metrics.refresh().of("step")] == list(range(1, 500))


def test_a_folder_that_was_deleted_and_is_used_again_starts_from_nothing(tmp_path):
    run = tmp_path / "dog"
    run.mkdir()
    metrics = Metrics(run / "metrics.jsonl")
    metrics.path.write_text(line("step", 50, 1.0))
    assert metrics.refresh().events
    shutil.rmtree(run)
    assert metrics.refresh().events == []
    run.mkdir()
    metrics.path.write_text("".join(line("step", step, time.time()) for step in range(1, 9)))
    assert len(metrics.refresh().events) == 8


def test_a_file_of_the_same_length_in_the_old_ones_place_is_read_anew(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for when in (1.0, 2.0):
        metrics.path.write_text(line("step", 5, when))
        assert [e["time"] for e in metrics.refresh().refresh().events] == [when]


def test_while_it_starts_a_resumed_run_is_at_none_of_the_earlier_steps(tmp_path):
    (run := tmp_path / "dog").mkdir()
    job, jobs = Job(run, OWNER, os.getpid(), psutil.Process().create_time()), Jobs(tmp_path)
    old = line("start", 0, 1.0) + line("step", 382, 2.0)
    (run / "metrics.jsonl").write_text(old)
    state = jobs.state(job)
    assert (state.state, state.step) == ("starting", 0)
    start = json.dumps({"type": "start", "time": time.time(), "max_train_steps": 400}) + "\n"
    replaced(run / "metrics.jsonl", line("step", 200, 1.5) + start)
    state = jobs.state(job)
    assert (state.state, state.step) == ("running", 200)
    assert jobs.state(replace(job, created=0.0)).state == "failed"


def visitor(tmp_path) -> Visitor:
    (folder := tmp_path / "visitor").mkdir(exist_ok=True)
    return Visitor(OWNER, folder)


def test_a_run_that_is_gone_is_told_and_leaves_no_button_to_press(tmp_path):
    jobs, ann = Jobs(tmp_path), visitor(tmp_path)
    for name, owner in (("dog", OWNER), ("mine", OWNER), ("theirs", "b" * 64)):
        (tmp_path / name).mkdir()
        Job(tmp_path / name, owner, os.getpid(), psutil.Process().create_time()).save()
    seen = watched(jobs, "dog", None, ann)
    assert seen["stop"].interactive and watched(jobs, "dog", seen["seen"], ann) == {}
    shutil.rmtree(tmp_path / "dog")
    for run in ("dog", "theirs", "../dog"):
        now = watched(jobs, run, seen["seen"], ann)
        assert "not there any more" in now["status"] and now["run"].value is None
        assert [value for _, value in now["run"].choices] == ["mine"]
        assert not (now["stop"].interactive or now["resume"].interactive or now["download"]["visible"])
    assert watched(jobs, None, None, ann) == {}


def test_a_run_lives_on_when_the_clock_is_set_and_a_reused_number_is_not_taken_for_it(tmp_path):
    (run := tmp_path / "dog").mkdir()
    Job(run, OWNER, os.getpid(), created=1.0, birth=birth_of(os.getpid())).save()
    job = Job.load(run)
    assert job.is_alive
    assert not replace(job, birth="another boot 1").is_alive


def ended(jobs: Jobs, job: Job) -> str:
    deadline = time.monotonic() + 40
    while jobs.state(job).is_active:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return jobs.state(job).message


@pytest.mark.parametrize("known", [True, False])
def test_a_killed_process_is_told_by_the_server_that_started_it_and_by_a_later_one(tmp_path, known):
    (script := tmp_path / "trainer.py").write_text("print('loading', flush=True); import time; time.sleep(60)")
    jobs = Jobs(tmp_path / "runs", script)
    job = jobs.start("dog", {}, OWNER)
    while "loading" not in job.log_tail():
        time.sleep(0.02)
    os.kill(job.pid, 9)
    told = ended(jobs, job) if known else (ended(jobs, job), ended(Jobs(tmp_path / "runs"), job))[1]
    assert "was killed" in told and "want of memory" in told and ("loading" in told) == (not known)
    with pytest.raises(UserError, match="dog has already ended"):
        jobs.stop("dog", OWNER)


def test_a_run_that_is_stopped_while_it_starts_has_not_failed(tmp_path):
    (script := tmp_path / "trainer.py").write_text("print('loading', flush=True); import time; time.sleep(60)")
    jobs = Jobs(tmp_path / "runs", script)
    job = jobs.start("dog", {}, OWNER)
    while "loading" not in job.log_tail():
        time.sleep(0.02)
    job = jobs.stop("dog", OWNER)
    assert "stopped before training had begun" in ended(jobs, job)
    state = jobs.state(jobs.owned("dog", OWNER))
    assert state.state == "interrupted" and not state.is_active
    assert "It was stopped before training had begun." in status_card(state, Metrics(tmp_path))


@pytest.mark.parametrize(
    "code, asked, log, words",
    [
        (-15, 1.0, "", "stopped before training had begun"),
        (-9, 1.0, "loading", "killed by SIGKILL."),
        (-11, 0.0, "loading", "killed by SIGSEGV."),
        (2, 0.0, "error: no photos", "error: no photos"),
        (None, 0.0, "KeyError: 1", "KeyError: 1"),
        (1, 0.0, "", "ended without a word"),
    ],
)
def test_why_a_process_is_gone_is_said_as_well_as_it_is_known(code, asked, log, words):
    assert words in why_it_ended(code, log, was_asked=bool(asked))


def test_a_run_stopped_before_its_first_step_boasts_of_no_checkpoint(tmp_path):
    state = JobState("interrupted", 0, 100, "", "stopped before the first step")
    assert "Stopped before the first step." in status_card(state, Metrics(tmp_path))
    assert "checkpoint is written" in status_card(replace(state, message=""), Metrics(tmp_path))


def test_after_the_last_photo_the_first_step_is_spoken_of(tmp_path):
    """On a CPU it takes minutes with SDXL, and nothing more is written before its end."""
    encoding = {"type": "phase", "phase": "caching", "done": 3, "total": 4}
    assert phase_of([encoding]) == "caching"
    last = phase_of([encoding, encoding | {"done": 4}])
    assert "Step 1 of 400" in status_card(JobState("running", 0, 400, last), Metrics(tmp_path))
    assert phase_of([encoding | {"done": 4}, {"type": "phase", "phase": "sampling"}]) == "sampling"


def test_training_is_found_from_any_folder_and_takes_nothing_from_there(tmp_path, monkeypatch):
    (tmp_path / "dreambooth_moslora.py").write_text("raise SystemExit('the wrong program')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("dog", {"pretrained_model_name_or_path": "toy"}, OWNER)
    assert "missing: --instance_prompt" in ended(jobs, job)
