"""Run folder, lock, stop and queue with Windows' answers (`tests/helpers/windows.py`)."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from dreambooth_moslora.cli.terminal import run_to_exit_code
from dreambooth_moslora.disk import atomic, processes
from dreambooth_moslora.disk.atomic import (
    clean_temporaries,
    rename_with_retry,
    write_atomic,
    write_atomic_directory,
)
from dreambooth_moslora.disk.events import read_events
from dreambooth_moslora.disk.process_identity import compute_process_token
from dreambooth_moslora.disk.queue import LOCK_NAME, QueuedRun, lock_folder
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster.records import get_stop_path
from dreambooth_moslora.extras.cluster.worker import Job as Work
from dreambooth_moslora.extras.cluster.worker import train_subject
from dreambooth_moslora.ui.jobs import Jobs, QueueRunner
from tests.helpers.tiny_training import adapter_sha256, paint_photos, tiny_config
from tests.training.test_loop import HOLD
from tests.ui.conftest import TRAINER, wait_for

pytestmark = [
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="what is open is read in /proc"
    ),
    pytest.mark.usefixtures("windows"),
]


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_lock_ends_with_its_process(is_killed, tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match="another process is training there"),
            lock_folder(tmp_path),
        ):
            pass
        if is_killed:
            holder.kill()
    with lock_folder(tmp_path):
        assert LOCK_NAME in os.listdir(tmp_path)
    assert LOCK_NAME not in os.listdir(tmp_path)


def write_checkpoint(folder, text: str) -> None:
    with write_atomic_directory(folder) as new:
        (new / "weights").write_text(text)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_checkpoint_waits_for_open_files(is_new, closes, tmp_path, monkeypatch):
    """Replace a checkpoint while a scanner has the new file open, or a viewer the old one."""
    folder, opened = tmp_path / "checkpoint-1", []
    write_checkpoint(folder, "old")

    def open_and_rename(source, target) -> None:
        if not opened and is_new == (source.suffix == ".new"):
            opened.append((source / "weights").open())
            if closes:
                threading.Timer(0.3, opened[0].close).start()
        rename_with_retry(source, target)

    monkeypatch.setattr(atomic, "rename_with_retry", open_and_rename)
    monkeypatch.setattr(atomic, "RENAME_TIMEOUT_SEC", 20 if closes else 0.2)
    with nullcontext() if closes else pytest.raises(PermissionError):
        write_checkpoint(folder, "new")
    assert (folder / "weights").read_text() == ("new" if closes else "old")
    opened[0].close()
    clean_temporaries(tmp_path)
    assert RunDir(tmp_path).list_checkpoint_folders() == [folder]


def test_a_file_that_stays_open_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "RENAME_TIMEOUT_SEC", 0)
    (sheet := tmp_path / "contact_sheet.png").write_text("old")
    with sheet.open():
        assert run_to_exit_code(lambda: write_atomic(sheet, "new")) == 2
    message = f"error: The process cannot access the file: {sheet}.\n"
    assert capsys.readouterr().err == message
    assert os.listdir(tmp_path) == [sheet.name]


@pytest.mark.parametrize("is_same", [True, False])
def test_a_process_is_recognised_by_its_start(is_same, tmp_path):
    token = compute_process_token(os.getppid()) if is_same else "0123abcd"
    (temporary := tmp_path / f".checkpoint-7.{os.getppid()}-{token}.new").mkdir()
    clean_temporaries(tmp_path)
    assert temporary.exists() == is_same


def test_a_stop_request_ends_one_run_of_the_queue(tmp_path):
    (script := tmp_path / "trainer.py").write_text(TRAINER)
    runner = QueueRunner(jobs := Jobs(tmp_path / "runs", script))
    for name in ("dog", "cat"):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        settings = {
            "mode": "good",
            "steps": 1000 if name == "dog" else 2,
            "output_dir": str(folder),
        }
        runner.queue.add(QueuedRun(name, settings=settings, queued=time.time()))
    runner.run_next()
    wait_for(lambda: (job := jobs.find_active_job()) and jobs.get_state(job).step)
    jobs.stop("dog")
    processes.send_stop_request(tmp_path / "runs" / "cat")  # left there by an earlier run
    wait_for(lambda: runner.run_next() or runner.is_empty)
    assert {event["name"]: event["state"] for event in read_events(runner.queue.ended_path)} == {
        "dog": "interrupted",
        "cat": "done",
    }


def test_a_training_has_a_console_of_its_own(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: options.update(kwargs))
    processes.start_process(tmp_path, ["-c", ""])
    assert options["creationflags"] == 0x08000000 and "start_new_session" not in options


def build_settings(base, folder) -> dict:
    """Return the settings of a long run, those that are set."""
    config = tiny_config(
        base,
        paint_photos(folder / "photos"),
        folder / "runs" / "dog",
        max_train_steps=100_000,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
    )
    return {name: value for name, value in config.to_dict().items() if value is not None}


@pytest.mark.slow
def test_a_stopped_training_resumes_to_the_same_bytes(tiny_base, tmp_path):
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("dog", build_settings(tiny_base, tmp_path))
    wait_for(lambda: jobs.get_state(job).step or not job.is_alive, 120)
    jobs.stop("dog")
    wait_for(lambda: not job.is_alive, 120)
    run, state = RunDir(job.run_dir), jobs.get_state(jobs.load_job("dog"))
    assert state.state == "interrupted", processes.read_log_tail(job.run_dir)
    assert (
        run.adapter_path.is_file()
        and run.find_latest_checkpoint()
        and not (run.path / processes.STOP_FILE_NAME).exists()
    )
    settings = json.loads((run.path / processes.JOB_CONFIG_NAME).read_text())
    settings["max_train_steps"] = state.step + 2
    processes.write_settings(run.path, settings)
    job = jobs.resume("dog")
    wait_for(lambda: not job.is_alive, 120)
    assert jobs.get_state(job).state == "done", processes.read_log_tail(job.run_dir)
    resumed = adapter_sha256(run.path)
    shutil.rmtree(run.path)
    job = jobs.start("dog", settings)
    wait_for(lambda: not job.is_alive, 120)
    assert adapter_sha256(run.path) == resumed


@pytest.mark.slow
def test_a_fleets_stop_leaves_a_checkpoint(tiny_base, tmp_path):
    out, results = tmp_path / "runs", []
    settings = build_settings(tiny_base, tmp_path)
    work = threading.Thread(
        target=lambda: results.append(train_subject(Work(str(out / "dog"), settings, "mark")))
    )
    work.start()
    wait_for(
        lambda: RunDir(out / "dog").find_latest_checkpoint() if (out / "dog").exists() else None,
        120,
    )
    get_stop_path(out).touch()
    work.join(timeout=120)
    assert results[0].state == "interrupted" and RunDir(out / "dog").adapter_path.is_file()
