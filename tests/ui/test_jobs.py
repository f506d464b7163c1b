"""The page's trainings: one process each, which outlives the server, whatever changes under it."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import gradio as gr
import pytest

from dreambooth_moslora.disk.events import EventLog
from dreambooth_moslora.disk.process_identity import read_process_start
from dreambooth_moslora.disk.processes import explain_ending, read_log_tail
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.ui.events import wrap_errors
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.train.run_cards import render_status
from tests.ui.conftest import recorded, wait_for

DEEP = "[" * 100_000
SLEEPER = "print('loading', flush=True); import time; time.sleep(60)"
on_linux = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="only Linux has a file that is always full"
)


def start(jobs: Jobs, mode: str = "good", name: str = "dog", **config) -> Job:
    return jobs.start(name, {"mode": mode, "output_dir": str(jobs.runs_dir / name), **config})


def test_a_run_survives_the_server_that_started_it_and_is_the_only_one(jobs):
    """Another process starts the run and is gone; this one finds it, watches it and stops it."""
    code = (
        "import sys; from pathlib import Path; from dreambooth_moslora.ui.jobs import Jobs\n"
        f"jobs = Jobs(Path({str(jobs.runs_dir)!r}), Path({str(jobs.script)!r}))\n"
        f"jobs.start('dog', {{'mode': 'good', 'output_dir': {str(jobs.runs_dir / 'dog')!r}}})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    job = jobs.find_active_job()
    assert job is not None and job.is_alive
    with pytest.raises(UserError, match="the run dog is going on"):
        jobs.start("cat", {})
    with pytest.raises(UserError, match="still going on"):
        jobs.resume("dog")
    first = wait_for(lambda: jobs.get_state(job).step)
    wait_for(lambda: jobs.get_state(job).step > first)
    assert jobs.stop("dog").stop_requested_sec
    wait_for(lambda: jobs.get_state(jobs.load_job("dog")).state == "interrupted")
    assert jobs.find_active_job() is None


def test_resume_adds_the_checkpoint_to_the_same_run(jobs):
    job = start(jobs, steps=2)
    wait_for(lambda: jobs.get_state(job).state == "done")
    job = jobs.resume("dog")
    wait_for(lambda: jobs.get_state(job).state == "done")
    config = json.loads((job.run_dir / "job_config.json").read_text())
    assert (
        config["resume_from_checkpoint"] == "latest"
        and len(jobs.load_metrics(job).list_events("start")) == 2
    )


def test_a_run_of_a_terminal_is_resumed_with_the_settings_that_it_kept(jobs):
    job = start(jobs, steps=2)
    wait_for(lambda: jobs.get_state(job).state == "done")
    (job.run_dir / "job_config.json").rename(job.run_dir / "train_config.json")
    (job.run_dir / "job.json").unlink()
    job = jobs.resume("dog")
    wait_for(lambda: jobs.get_state(job).state == "done")
    assert job.settings["steps"] == 2 and len(jobs.load_metrics(job).list_events("start")) == 2


def test_a_process_that_will_not_stop_is_killed_at_the_second_asking(jobs, monkeypatch):
    job = start(jobs, "stubborn")
    wait_for(lambda: jobs.get_state(job).step)
    assert jobs.stop("dog").stop_requested_sec
    stopping = jobs.load_job("dog")
    assert jobs.get_state(stopping).state == "stopping" and stopping.is_alive
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.KILL_AFTER_SEC", 0)
    jobs.stop("dog")
    wait_for(lambda: not job.is_alive)
    assert jobs.get_state(jobs.load_job("dog")).state == "failed"


def loading(jobs: Jobs) -> Job:
    """A run that is killed by any signal."""
    jobs.script.write_text(SLEEPER)
    job = jobs.start("dog", {})
    wait_for(lambda: "loading" in read_log_tail(job.run_dir))
    return job


def ended(jobs: Jobs, job: Job) -> str:
    wait_for(lambda: not jobs.get_state(job).is_active)
    return jobs.get_state(job).message


def test_a_run_that_is_stopped_while_it_starts_has_not_failed(jobs, tmp_path):
    loading(jobs)
    assert "stopped before training had begun" in ended(jobs, jobs.stop("dog"))
    state = jobs.get_state(jobs.load_job("dog"))
    assert state.state == "interrupted" and not state.is_active
    assert "It was stopped before training had begun." in render_status(state, EventLog(tmp_path))
    with pytest.raises(UserError, match="dog has already ended"):
        jobs.stop("dog")


def test_a_killed_process_is_told_by_the_server_that_started_it_and_by_a_later_one(jobs):
    job = loading(jobs)
    os.kill(job.pid, 9)
    for server in (jobs, Jobs(jobs.runs_dir)):
        told = ended(server, job)
        assert "was killed" in told and "want of memory" in told and "loading" in told
    with pytest.raises(UserError, match="dog has already ended"):
        jobs.stop("dog")


@pytest.mark.parametrize(
    "code, asked, log, words",
    [
        (-15, 1.0, "", "stopped before training had begun"),
        (15, 1.0, "", "stopped before training had begun"),
        (-9, 1.0, "loading", "killed; its last words: loading"),
        (-11, 0.0, "loading", "killed, perhaps for want of memory; its last words: loading"),
        (2, 0.0, "error: no photos", "error: no photos"),
        (None, 0.0, "KeyError: 1", "KeyError: 1"),
        (1, 0.0, "", "ended without a word"),
    ],
)
def test_why_a_process_is_gone_is_said_as_well_as_it_is_known(code, asked, log, words):
    assert words in explain_ending(code, log, is_stop_requested=bool(asked))


def test_training_is_found_from_any_folder_and_takes_nothing_from_there(tmp_path, monkeypatch):
    (tmp_path / "dreambooth_moslora.py").write_text("raise SystemExit('the wrong program')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("dog", {"pretrained_model_name_or_path": "toy"})
    assert "missing: --instance_prompt" in ended(jobs, job)


@on_linux
def test_a_start_on_a_full_disk_is_refused_in_words(jobs):
    (jobs.runs_dir / "dog").mkdir()
    (jobs.runs_dir / "dog" / "job_config.json").symlink_to("/dev/full")
    with pytest.raises(gr.Error, match="disk is full"):
        wrap_errors(jobs.start)("dog", {"a": 1})


def test_a_process_is_known_by_its_birth_and_not_by_its_number_alone(tmp_path):
    recorded(tmp_path / "dog", birth=read_process_start(os.getpid()))
    job = Job.load(tmp_path / "dog")
    assert job.is_alive and not replace(job, birth="another boot 1").is_alive


def test_while_it_starts_a_resumed_run_is_at_none_of_the_earlier_steps(tmp_path):
    now = time.time()
    job = recorded(tmp_path / "dog", birth=read_process_start(os.getpid()), began=now)
    jobs = Jobs(tmp_path)
    old = line("start", 0, 1.0) + line("step", 382, 2.0)
    replaced(job.run_dir / "metrics.jsonl", old)
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("starting", 0)
    replaced(job.run_dir / "metrics.jsonl", line("step", 200, 1.5) + line("start", 0, time.time()))
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("running", 200)
    assert jobs.get_state(replace(job, birth="")).state == "failed"


def test_a_run_resumed_in_the_second_of_its_end_is_starting(jobs):
    """The earlier process's last events are not the new one's."""
    start(jobs)
    wait_for(lambda: jobs.get_state(jobs.find_active_job()).step)
    jobs.stop("dog")
    wait_for(lambda: jobs.find_active_job() is None)
    now = time.time()
    earlier = line("start", 0, now - 9) + line("step", 5, now - 0.1) + line("end", 5, now - 0.1)
    replaced(jobs.runs_dir / "dog" / "metrics.jsonl", earlier)
    jobs.script.write_text("import time; time.sleep(60)")
    job = jobs.resume("dog")
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("starting", 0)


def test_a_run_that_ended_while_the_clock_was_put_back_is_done(tmp_path):
    """Its events are known by their place in the file: those behind its start are its own."""
    now = time.time()
    events = [
        {"type": "start", "time": now - 50},
        {"type": "end", "time": now - 40, "state": "failed"},
        {"type": "start", "time": now + 1},
        {"type": "step", "time": now + 2, "step": 7},
        {"type": "end", "time": now - 3600, "state": "done"},
    ]
    recorded(tmp_path / "dog", *events, began=now)
    (job,) = (jobs := Jobs(tmp_path)).list_jobs()
    assert (jobs.get_state(job).state, jobs.get_state(job).step, jobs.is_cut_off(job)) == (
        "done",
        7,
        False,
    )


def test_settings_that_cannot_be_read_are_told_and_the_log_has_a_bars_last_state_and_no_empty_line(
    tmp_path,
):
    run = (job := recorded(tmp_path / "dog")).run_dir
    (run / "job.log").write_bytes(b"loading\n\n 1%|\r 50%|\r 99%|\n\r\nsaved\n")
    assert read_log_tail(job.run_dir) == "loading\n 99%|\nsaved"
    for content in ("", "[]"):
        (run / "job_config.json").write_text(content)
        with pytest.raises(UserError, match="job_config"):
            Jobs(tmp_path).resume("dog")


@pytest.mark.parametrize("record", ["", "nonsense", "[]", "{}", '{"folder": "x"}', DEEP])
def test_a_record_that_cannot_be_read_is_no_run(tmp_path, record):
    (recorded(tmp_path / "dog").run_dir / "job.json").write_text(record)
    jobs = Jobs(tmp_path)
    assert jobs.list_jobs() == [] and jobs.find_active_job() is None
    with pytest.raises(UserError, match="there is no run called 'dog'"):
        jobs.stop("dog")


@pytest.fixture
def metrics(tmp_path) -> EventLog:
    (tmp_path / "run").mkdir()
    return EventLog(tmp_path / "run" / "metrics.jsonl")


def line(kind: str, step: int, when: float = 0.0, **facts) -> str:
    return json.dumps({"type": kind, "time": when, "step": step, **facts}) + "\n"


def replaced(path, text: str) -> None:
    (fresh := path.with_name("fresh")).write_text(text)
    fresh.replace(path)


def test_a_run_that_goes_on_from_an_older_checkpoint_is_read_anew_even_at_the_same_length(metrics):
    for when in (1.0, 2.0):
        metrics.path.write_text(line("step", 5, when))
        assert [e["time"] for e in metrics.refresh().refresh().events] == [when]
    steps = [line("step", step, step) for step in range(1, 383)]
    metrics.path.write_text(line("start", 0) + "".join(steps))
    assert metrics.refresh().get_last("step")["step"] == 382
    replaced(metrics.path, line("start", 0) + "".join(steps[:200]) + line("start", 200, 500.0))
    assert (
        metrics.refresh().get_last("step")["step"] == 200 and metrics.events[-1]["type"] == "start"
    )
    with metrics.path.open("a") as file:
        file.writelines(line("step", step, 500.0 + step) for step in range(201, 500))
    assert [e["step"] for e in metrics.refresh().list_events("step")] == list(range(1, 500))


def test_metrics_wait_for_the_rest_of_a_half_written_line_and_begin_anew_in_a_deleted_folder(
    metrics,
):
    assert metrics.refresh().events == []
    with metrics.path.open("a") as file:
        file.write('{"type": "start"}\nnonsense\n[1]\n{"type": "st')
        file.flush()
        assert [e["type"] for e in metrics.refresh().events] == ["start"]
        file.write('ep", "step": 1}\n')
    assert metrics.refresh().get_last("step") == {"type": "step", "step": 1}
    shutil.rmtree(metrics.path.parent)
    assert metrics.refresh().events == []
    metrics.path.parent.mkdir()
    metrics.path.write_text("".join(line("step", step, time.time()) for step in range(1, 9)))
    assert len(metrics.refresh().events) == 8
