"""The run folder, its lock, a stop and the queue with Windows' answers
(`tests/helpers/windows.py`)."""

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
def test_the_lock_of_a_run_folder_holds_and_ends_with_its_process(is_killed, tmp_path):
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


def write(folder, text: str) -> None:
    with write_atomic_directory(folder) as new:
        (new / "weights").write_text(text)


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_checkpoint_waits_for_a_program_that_has_its_file_open_and_is_whole_with_either_end(
    is_new, closes, tmp_path, monkeypatch
):
    """A scanner has the new one's file open, or a viewer the old one's."""
    folder, begin, opened = tmp_path / "checkpoint-1", rename_with_retry, []
    write(folder, "old")

    def looked_at(source, target) -> None:
        if not opened and is_new == (source.suffix == ".new"):
            opened.append((source / "weights").open())
            if closes:
                threading.Timer(0.3, opened[0].close).start()
        begin(source, target)

    monkeypatch.setattr(atomic, "rename_with_retry", looked_at)
    monkeypatch.setattr(atomic, "RENAME_TIMEOUT_SEC", 20 if closes else 0.2)
    with nullcontext() if closes else pytest.raises(PermissionError):
        write(folder, "new")
    assert (folder / "weights").read_text() == ("new" if closes else "old")
    opened[0].close()
    clean_temporaries(tmp_path)
    assert RunDir(tmp_path).list_checkpoint_folders() == [folder]


def test_a_file_that_stays_open_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atomic, "RENAME_TIMEOUT_SEC", 0)
    (sheet := tmp_path / "contact_sheet.png").write_text("old")
    with sheet.open():
        assert run_to_exit_code(lambda: write_atomic(sheet, "new")) == 2
    said = f"error: The process cannot access the file: {sheet}.\n"
    assert capsys.readouterr().err == said
    assert os.listdir(tmp_path) == [sheet.name]


@pytest.mark.parametrize("is_same", [True, False])
def test_a_process_is_known_by_its_start_and_gets_no_signal(is_same, tmp_path):
    token = compute_process_token(os.getppid()) if is_same else "0123abcd"
    (left := tmp_path / f".checkpoint-7.{os.getppid()}-{token}.new").mkdir()
    clean_temporaries(tmp_path)
    assert left.exists() == is_same


def test_a_run_of_the_queue_is_asked_by_a_file_which_stops_no_later_one(tmp_path):
    (script := tmp_path / "trainer.py").write_text(TRAINER)
    turns = QueueRunner(jobs := Jobs(tmp_path / "runs", script))
    for name in ("dog", "cat"):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        settings = {
            "mode": "good",
            "steps": 1000 if name == "dog" else 2,
            "output_dir": str(folder),
        }
        turns.queue.add(QueuedRun(name, settings=settings, queued=time.time()))
    turns.run_next()
    wait_for(lambda: (job := jobs.find_active_job()) and jobs.get_state(job).step)
    jobs.stop("dog")
    processes.send_stop_request(tmp_path / "runs" / "cat")  # left there by an earlier run
    wait_for(lambda: turns.run_next() or turns.is_empty)
    assert {event["name"]: event["state"] for event in turns.queue.list_ended()} == {
        "dog": "interrupted",
        "cat": "done",
    }


def test_what_is_started_has_a_console_of_its_own_which_no_closed_one_ends(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **given: options.update(given))
    processes.start_process(tmp_path, ["-c", ""])
    assert options["creationflags"] == 0x08000000 and "start_new_session" not in options


def config_of(base, folder, **changes) -> dict:
    sizes = {
        "max_train_steps": 100_000,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
    } | changes
    return tiny_config(
        base, paint_photos(folder / "photos"), folder / "runs" / "dog", **sizes
    ).to_dict()


def told(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


@pytest.mark.slow
def test_a_training_that_is_stopped_leaves_a_checkpoint_and_goes_on_to_the_same_bytes(
    tiny_base, tmp_path
):
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("dog", told(config_of(tiny_base, tmp_path)))
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
    steps = state.step + 2
    settings = json.loads((run.path / processes.JOB_CONFIG_NAME).read_text()) | {
        "max_train_steps": steps
    }
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
    out, found = tmp_path / "runs", []
    settings = told(config_of(tiny_base, tmp_path))
    work = threading.Thread(
        target=lambda: found.append(train_subject(Work(str(out / "dog"), settings, "mark")))
    )
    work.start()
    wait_for(
        lambda: RunDir(out / "dog").find_latest_checkpoint() if (out / "dog").exists() else None,
        120,
    )
    get_stop_path(out).touch()
    work.join(timeout=120)
    assert found[0].state == "interrupted" and RunDir(out / "dog").adapter_path.is_file()
