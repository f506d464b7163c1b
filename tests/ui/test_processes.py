"""The page's trainings: one process each, which outlives the server, and what is read of its events."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.events import Metrics
from dreambooth_moslora.ui.jobs import Job, Jobs
from dreambooth_moslora.ui.train_form import TrainForm
from dreambooth_moslora.ui.train_start import free_run_dir
from dreambooth_moslora.ui.train_watch import fidelity_table, loss_table, samples_of, status_card
from tests.ui.test_handlers import OTHER, OWNER, visitor

TRAINER = '''
"""Stands in for the training program where a real one would be too slow or too well-behaved."""
import json, signal, sys, time
config = json.load(open(sys.argv[2]))
mode, out = config["mode"], config["output_dir"] + "/metrics.jsonl"
def say(kind, **facts):
    with open(out, "a") as file:
        file.write(json.dumps({"type": kind, "time": time.time(), **facts}) + "\\n")
if mode == "crash":
    print("error: the photos are gone", file=sys.stderr)
    sys.exit(2)
stop = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else lambda *_: stop.append(1))
say("start", max_train_steps=1000, config={})
say("phase", phase=config.get("phase", "loading"), done=0, total=1)
for step in range(1, 1001):
    say("step", step=step, loss=1.0, loss_instance=1.0, loss_prior=None, lr=1e-4, step_sec=0.05, eta_sec=9.0)
    time.sleep(0.05)
    if stop or step == config.get("steps", 1000):
        break
say("end", state="interrupted" if stop else "done", step=step, message="")
'''


@pytest.fixture
def jobs(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    (tmp_path / "runs").mkdir()
    found = Jobs(tmp_path / "runs", script)
    yield found
    for job in found.all():
        if job.is_alive:
            os.kill(job.pid, 9)


def start(jobs: Jobs, mode: str = "good", name: str = "dog", **config) -> Job:
    return jobs.start(name, {"mode": mode, "output_dir": str(jobs.runs_dir / name), **config}, OWNER)


def wait_for(condition, seconds: float = 40.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def test_a_run_survives_the_server_that_started_it(jobs):
    """Another process starts the run and is gone; this one finds it, watches it and stops it."""
    code = (
        "import sys; from pathlib import Path; from dreambooth_moslora.ui.jobs import Jobs\n"
        f"jobs = Jobs(Path({str(jobs.runs_dir)!r}), Path({str(jobs.script)!r}))\n"
        f"jobs.start('dog', {{'mode': 'good', 'output_dir': {str(jobs.runs_dir / 'dog')!r}}}, {OWNER!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    job = jobs.current()
    assert job is not None and job.is_alive
    first = wait_for(lambda: jobs.state(job).step)
    wait_for(lambda: jobs.state(job).step > first)
    assert jobs.stop("dog", OWNER).stop_asked
    wait_for(lambda: jobs.state(jobs.owned("dog", OWNER)).state == "interrupted")
    assert jobs.current() is None


def test_one_run_at_a_time_and_only_the_owner_has_a_say(jobs):
    start(jobs)
    with pytest.raises(UserError, match="your run dog"):
        start(jobs, name="cat")
    with pytest.raises(UserError, match="another visitor's"):
        jobs.start("cat", {}, OTHER)
    for action in (jobs.stop, jobs.resume):
        with pytest.raises(UserError, match="you have no run"):
            action("dog", OTHER)
    with pytest.raises(UserError, match="still going on"):
        jobs.resume("dog", OWNER)
    assert jobs.current().name == "dog" and jobs.of(OTHER) == []


def test_resume_adds_the_checkpoint_to_the_same_run(jobs):
    job = start(jobs, steps=2)
    wait_for(lambda: jobs.state(job).state == "done")
    job = jobs.resume("dog", OWNER)
    wait_for(lambda: jobs.state(job).state == "done")
    config = json.loads((job.run_dir / "job_config.json").read_text())
    assert config["resume_from_checkpoint"] == "latest" and len(jobs.metrics(job).of("start")) == 2


def test_a_step_after_a_phase_means_that_it_trains(jobs):
    job = start(jobs, phase="sampling")
    state = wait_for(lambda: (s := jobs.state(job)).step > 1 and s)
    assert state.phase == "training"
    assert f"Step {state.step} of 1000" in status_card(state, jobs.metrics(job))


def test_a_crash_shows_its_last_words(jobs):
    job = start(jobs, "crash")
    state = wait_for(lambda: (s := jobs.state(job)).state == "failed" and s)
    assert "the photos are gone" in state.message
    assert "the photos are gone" in status_card(state, jobs.metrics(job))


def test_a_process_that_will_not_stop_is_killed_at_the_second_asking(jobs, monkeypatch):
    job = start(jobs, "stubborn")
    wait_for(lambda: jobs.state(job).step)
    stopping = jobs.stop("dog", OWNER)
    assert jobs.state(stopping).state == "stopping" and stopping.is_alive
    monkeypatch.setattr("dreambooth_moslora.ui.jobs.KILL_AFTER_SEC", 0)
    jobs.stop("dog", OWNER)
    wait_for(lambda: not job.is_alive)
    assert jobs.state(jobs.owned("dog", OWNER)).state == "failed"


def test_a_reused_process_number_is_not_taken_for_the_run(tmp_path):
    job = Job(tmp_path, OWNER, os.getpid(), created=0.0)
    assert not job.is_alive
    assert replace(job, created=__import__("psutil").Process().create_time()).is_alive


def test_metrics_wait_for_the_rest_of_a_half_written_line(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.refresh().events == []
    with metrics.path.open("a") as file:
        file.write('{"type": "start"}\nnonsense\n[1]\n{"type": "st')
        file.flush()
        assert [e["type"] for e in metrics.refresh().events] == ["start"]
        file.write('ep", "step": 1}\n')
    assert metrics.refresh().last("step") == {"type": "step", "step": 1}


def written(tmp_path, *events) -> Metrics:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return Metrics(tmp_path / "metrics.jsonl").refresh()


def test_the_loss_plot_keeps_instance_and_prior_apart_and_a_resumed_step_once(tmp_path):
    steps = [{"type": "step", "step": s, "loss_instance": 1.0, "loss_prior": 0.5} for s in (1, 2, 3, 2, 3)]
    table = loss_table(written(tmp_path, *steps, {"type": "step", "step": 4, "loss_instance": float("nan")}))
    assert table.groupby("part")["loss"].mean().to_dict() == {"subject": 1.0, "class (prior)": 0.5}
    assert list(table[table.part == "subject"].step) == [1, 2, 3]


def test_of_many_samples_the_bases_own_and_the_newest_are_shown(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in range(40):
        (tmp_path / "samples" / f"{step}.png").write_bytes(b"x")
    metrics = written(tmp_path, *({"type": "sample", "step": s, "files": [f"{s}.png"]} for s in range(40)))
    shown = [caption for _, caption in samples_of(Job(tmp_path, OWNER, 1, 0.0), metrics, visitor(tmp_path))]
    assert shown == ["step 0", *(f"step {s}" for s in range(40 - len(shown) + 1, 40))] and len(shown) < 40


def test_scores_and_samples_of_a_run_are_shown_step_0_first(tmp_path):
    (tmp_path / "samples").mkdir()
    for step in (0, 10):
        (tmp_path / "samples" / f"step_{step}.png").write_bytes(b"x")
    events = [{"type": "sample", "step": s, "files": [f"samples/step_{s}.png", "../../etc/passwd"]} for s in (0, 10)]
    metrics = written(
        tmp_path, *events, {"type": "evaluation", "step": 10, "clip_t": 0.7, "pres": 1, "note": "x", "time": 5}
    )
    job, ann = Job(tmp_path, OWNER, 1, 0.0), visitor(tmp_path)
    shown = samples_of(job, metrics, ann)
    assert [caption for _, caption in shown] == ["step 0", "step 10"]
    assert all(Path(path).is_relative_to(ann.folder) for path, _ in shown)
    assert fidelity_table(metrics).to_dict("records") == [{"step": 10, "score": 0.7, "measure": "prompt"}]


def test_a_run_gets_a_free_name_that_is_a_folder_name(jobs):
    form = TrainForm("sks", "guinea pig", run_name="")
    assert free_run_dir(jobs, form).name == "guinea-pig"
    (jobs.runs_dir / "guinea-pig").mkdir()
    assert free_run_dir(jobs, form).name == "guinea-pig-2"
    assert free_run_dir(jobs, replace(form, run_name="../../x")).parent == jobs.runs_dir


@pytest.mark.parametrize(
    "words, name",
    [
        ("-dog", "dog"),
        ("d..g", "d.g"),
        ("dog.", "dog"),
        ("_ +", "run"),
        ("Bär v2.1", "Bär-v2.1"),
        ("a" * 59 + ".b", "a" * 59),
        ("d@/<g", "d-g"),
    ],
)
def test_any_word_names_a_run(jobs, words, name):
    assert free_run_dir(jobs, TrainForm("sks", words)).name == name


def test_the_log_shows_a_progress_bars_last_state_and_no_empty_lines(tmp_path):
    job = Job(tmp_path, OWNER, 1, 0.0)
    (tmp_path / "job.log").write_bytes(b"loading\n\n 1%|\r 50%|\r 99%|\n\r\nsaved\n")
    assert job.log_tail() == "loading\n 99%|\nsaved"
