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
from tests.ui.conftest import wait_for, write_run

DEEP = "[" * 100_000
SLEEPER = "print('loading', flush=True); import time; time.sleep(60)"
on_linux = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="only Linux has a file that is always full"
)


def start_run(jobs: Jobs, mode: str = "good", name: str = "dog", **config) -> Job:
    return jobs.start(name, {"mode": mode, "output_dir": str(jobs.runs_dir / name), **config})


def test_run_survives_its_server_and_blocks_a_second(jobs):
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


def test_resume_continues_the_same_run(jobs):
    job = start_run(jobs, steps=2)
    wait_for(lambda: jobs.get_state(job).state == "done")
    job = jobs.resume("dog")
    wait_for(lambda: jobs.get_state(job).state == "done")
    config = json.loads((job.run_dir / "job_config.json").read_text())
    assert (
        config["resume_from_checkpoint"] == "latest"
        and len(jobs.load_metrics(job).list_events("start")) == 2
    )


def test_terminal_run_resumes_with_its_settings(jobs):
    job = start_run(jobs, steps=2)
    wait_for(lambda: jobs.get_state(job).state == "done")
    (job.run_dir / "job_config.json").rename(job.run_dir / "train_config.json")
    (job.run_dir / "job.json").unlink()
    job = jobs.resume("dog")
    wait_for(lambda: jobs.get_state(job).state == "done")
    assert job.settings["steps"] == 2 and len(jobs.load_metrics(job).list_events("start")) == 2


def test_second_stop_kills_a_stubborn_process(jobs, monkeypatch):
    job = start_run(jobs, "stubborn")
    wait_for(lambda: jobs.get_state(job).step)
    assert jobs.stop("dog").stop_requested_sec
    stopping = jobs.load_job("dog")
    assert jobs.get_state(stopping).state == "stopping" and stopping.is_alive
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.KILL_AFTER_SEC", 0)
    jobs.stop("dog")
    wait_for(lambda: not job.is_alive)
    assert jobs.get_state(jobs.load_job("dog")).state == "failed"


def start_loading(jobs: Jobs) -> Job:
    """A run that is killed by any signal."""
    jobs.script.write_text(SLEEPER)
    job = jobs.start("dog", {})
    wait_for(lambda: "loading" in read_log_tail(job.run_dir))
    return job


def wait_for_end(jobs: Jobs, job: Job) -> str:
    wait_for(lambda: not jobs.get_state(job).is_active)
    return jobs.get_state(job).message


def test_run_stopped_while_starting_is_interrupted(jobs, tmp_path):
    start_loading(jobs)
    assert "stopped before training had begun" in wait_for_end(jobs, jobs.stop("dog"))
    state = jobs.get_state(jobs.load_job("dog"))
    assert state.state == "interrupted" and not state.is_active
    assert "It was stopped before training had begun." in render_status(state, EventLog(tmp_path))
    with pytest.raises(UserError, match="dog has already ended"):
        jobs.stop("dog")


def test_killed_run_is_reported_by_every_server(jobs):
    job = start_loading(jobs)
    os.kill(job.pid, 9)
    for server in (jobs, Jobs(jobs.runs_dir)):
        message = wait_for_end(server, job)
        assert "was killed" in message and "want of memory" in message and "loading" in message
    with pytest.raises(UserError, match="dog has already ended"):
        jobs.stop("dog")


@pytest.mark.parametrize(
    "code, is_stopped, log, message",
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
def test_ending_is_explained(code, is_stopped, log, message):
    assert message in explain_ending(code, log, is_stop_requested=bool(is_stopped))


def test_trainer_ignores_modules_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "dreambooth_moslora.py").write_text("raise SystemExit('the wrong program')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("dog", {"pretrained_model_name_or_path": "toy"})
    assert "missing: --instance_prompt" in wait_for_end(jobs, job)


@on_linux
def test_start_on_full_disk_is_reported(jobs):
    (jobs.runs_dir / "dog").mkdir()
    (jobs.runs_dir / "dog" / "job_config.json").symlink_to("/dev/full")
    with pytest.raises(gr.Error, match="disk is full"):
        wrap_errors(jobs.start)("dog", {"a": 1})


def test_process_is_identified_by_start_time(tmp_path):
    write_run(tmp_path / "dog", birth=read_process_start(os.getpid()))
    job = Job.load(tmp_path / "dog")
    assert job.is_alive and not replace(job, birth="another boot 1").is_alive


def test_resumed_run_starts_at_step_zero(tmp_path):
    now = time.time()
    job = write_run(tmp_path / "dog", birth=read_process_start(os.getpid()), began=now)
    jobs = Jobs(tmp_path)
    old = format_event("start", 0, 1.0) + format_event("step", 382, 2.0)
    replace_text(job.run_dir / "metrics.jsonl", old)
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("starting", 0)
    replace_text(
        job.run_dir / "metrics.jsonl",
        format_event("step", 200, 1.5) + format_event("start", 0, time.time()),
    )
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("running", 200)
    assert jobs.get_state(replace(job, birth="")).state == "failed"


def test_run_resumed_in_the_same_second_is_starting(jobs):
    """The earlier process's last events are not the new one's."""
    start_run(jobs)
    wait_for(lambda: jobs.get_state(jobs.find_active_job()).step)
    jobs.stop("dog")
    wait_for(lambda: jobs.find_active_job() is None)
    now = time.time()
    earlier = (
        format_event("start", 0, now - 9)
        + format_event("step", 5, now - 0.1)
        + format_event("end", 5, now - 0.1)
    )
    replace_text(jobs.runs_dir / "dog" / "metrics.jsonl", earlier)
    jobs.script.write_text("import time; time.sleep(60)")
    job = jobs.resume("dog")
    assert (jobs.get_state(job).state, jobs.get_state(job).step) == ("starting", 0)


def test_run_is_done_though_the_clock_was_put_back(tmp_path):
    """Its events are known by their place in the file: those behind its start are its own."""
    now = time.time()
    events = [
        {"type": "start", "time": now - 50},
        {"type": "end", "time": now - 40, "state": "failed"},
        {"type": "start", "time": now + 1},
        {"type": "step", "time": now + 2, "step": 7},
        {"type": "end", "time": now - 3600, "state": "done"},
    ]
    write_run(tmp_path / "dog", *events, began=now)
    (job,) = (jobs := Jobs(tmp_path)).list_jobs()
    assert (jobs.get_state(job).state, jobs.get_state(job).step, jobs.is_cut_off(job)) == (
        "done",
        7,
        False,
    )


def test_unreadable_settings_are_reported_and_log_is_compact(
    tmp_path,
):
    run = (job := write_run(tmp_path / "dog")).run_dir
    (run / "job.log").write_bytes(b"loading\n\n 1%|\r 50%|\r 99%|\n\r\nsaved\n")
    assert read_log_tail(job.run_dir) == "loading\n 99%|\nsaved"
    for content in ("", "[]"):
        (run / "job_config.json").write_text(content)
        with pytest.raises(UserError, match="job_config"):
            Jobs(tmp_path).resume("dog")


@pytest.mark.parametrize("record", ["", "nonsense", "[]", "{}", '{"folder": "x"}', DEEP])
def test_unreadable_record_is_no_run(tmp_path, record):
    (write_run(tmp_path / "dog").run_dir / "job.json").write_text(record)
    jobs = Jobs(tmp_path)
    assert jobs.list_jobs() == [] and jobs.find_active_job() is None
    with pytest.raises(UserError, match="there is no run called 'dog'"):
        jobs.stop("dog")


@pytest.fixture
def metrics(tmp_path) -> EventLog:
    (tmp_path / "run").mkdir()
    return EventLog(tmp_path / "run" / "metrics.jsonl")


def format_event(kind: str, step: int, when: float = 0.0, **facts) -> str:
    return json.dumps({"type": kind, "time": when, "step": step, **facts}) + "\n"


def replace_text(path, text: str) -> None:
    (fresh := path.with_name("fresh")).write_text(text)
    fresh.replace(path)


def test_replaced_metrics_are_read_again(metrics):
    for when in (1.0, 2.0):
        metrics.path.write_text(format_event("step", 5, when))
        assert [e["time"] for e in metrics.refresh().refresh().events] == [when]
    steps = [format_event("step", step, step) for step in range(1, 383)]
    metrics.path.write_text(format_event("start", 0) + "".join(steps))
    assert metrics.refresh().get_last("step")["step"] == 382
    replace_text(
        metrics.path,
        format_event("start", 0) + "".join(steps[:200]) + format_event("start", 200, 500.0),
    )
    assert (
        metrics.refresh().get_last("step")["step"] == 200 and metrics.events[-1]["type"] == "start"
    )
    with metrics.path.open("a") as file:
        file.writelines(format_event("step", step, 500.0 + step) for step in range(201, 500))
    assert [e["step"] for e in metrics.refresh().list_events("step")] == list(range(1, 500))


def test_metrics_wait_for_whole_lines_and_new_folders(
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
    metrics.path.write_text(
        "".join(format_event("step", step, time.time()) for step in range(1, 9))
    )
    assert len(metrics.refresh().events) == 8
