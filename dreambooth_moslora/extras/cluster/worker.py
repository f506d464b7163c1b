"""Trains one subject on one machine.

A worker starts a command, and waits for its end. The training resumes from its newest checkpoint,
so a lost machine costs only the steps since then. Nothing here imports torch: a worker is small and
starts at once.

`python -m dreambooth_moslora.extras.cluster.worker PID COMMAND …` is the command, begun by the
process PID: when that is gone, the training finishes its step, writes a checkpoint and ends.
"""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from dreambooth_moslora.cli.terminal import EXIT_DONE, EXIT_INTERRUPTED, EXIT_MISTAKE
from dreambooth_moslora.disk import events, processes, queue, run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster.records import (
    Record,
    get_stop_path,
    is_finished,
    read_record,
    record_ending,
    write_record,
)

ERROR_PREFIX = "error: "
"""How the command's line for the user begins."""
POLL_SEC = 0.2
"""Seconds between two looks at the process."""
HOLD_NAME = queue.WORKER_LOCK_NAME
"""The worker's lock. Its training inherits it, so it is held until the training ends, even if the
worker dies first."""
LOCK_TIMEOUT_SEC = 120.0
"""How long a training whose worker is gone may take for its last step and checkpoint."""
MAX_KILLS = 3
"""How many times one machine starts a training that was killed."""
GUARD_COMMAND = ("-P", "-m", "dreambooth_moslora.extras.cluster.worker")
"""Arguments of Python by which a command ends with its worker."""


@dataclass(frozen=True)
class Job:
    """Training of one subject, as a worker gets it.

    run_dir: the run folder
    settings: of the run
    mark: a digest of settings and photos (`fleet_subjects.digest_run`)
    cpus: cores and threads
    gpus: share of a GPU; 0 to train on the CPU
    folder: where relative paths begin; empty for the worker's own folder
    """

    run_dir: str
    settings: Mapping[str, Any]
    mark: str
    cpus: int = 1
    gpus: float = 0.0
    folder: str = ""

    @property
    def unit(self) -> str:
        return "GPU" if self.gpus else "CPU"


def train_subject(job: Job) -> Record:
    """Train it to its end, or until the fleet is told to stop. The record is also written into the
    run folder."""
    run_dir = Path(job.run_dir)
    if is_finished(run_dir, job.mark):  # its machine was lost after it had finished
        return read_record(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        hold = lock_folder(run_dir)
        try:
            for _ in range(MAX_KILLS):  # one that is killed goes on from its newest checkpoint
                if get_stop_path(run_dir.parent).exists():
                    return record_ending(run_dir, "interrupted", "stopped before it began")
                code = train_once(job, run_dir, hold)
                if code >= 0 or get_stop_path(run_dir.parent).exists():
                    break
            return record_exit(run_dir, code)
        finally:
            queue.release_lock(run_dir / HOLD_NAME, hold)
    except UserError as error:
        return record_ending(run_dir, "failed", str(error))


def lock_folder(run_dir: Path) -> BinaryIO:
    """Lock the folder for a training, after a lost worker's has ended. Raises UserError when it
    does not, and without waiting when a file that the training writes to is a link."""
    queue.check_no_links(run_dir, "--out")
    end = time.monotonic() + LOCK_TIMEOUT_SEC
    while True:
        try:
            hold = queue.claim_lock(run_dir / HOLD_NAME, "--out")
            try:
                # refuse while a training that no fleet started runs there
                with queue.lock_folder(run_dir):
                    return hold
            except UserError:
                hold.close()
                raise
        except UserError:
            if time.monotonic() > end:
                raise
        time.sleep(POLL_SEC)


def train_once(job: Job, run_dir: Path, hold: BinaryIO) -> int:
    """Return the exit status; it is negative for a signal. The time is added to the record."""
    # note that it has begun; what earlier starts have cost is kept
    before = read_record(run_dir)
    is_known = has_started(before, job)
    begun = before if is_known else Record("running", job.mark, since=find_last_start(run_dir))
    begun = replace(
        begun,
        state="running",
        message="",
        unit=job.unit,
        starts=begun.starts + 1,
        machine=socket.gethostname(),
    )
    write_record(run_dir, begun)

    # train, and wait for the end
    resume = build_resume_settings(run_dir, before) if is_known else {}
    processes.write_settings(run_dir, {**job.settings, **resume})
    started = time.monotonic()
    arguments = ("train", "--config", str(run_dir / processes.JOB_CONFIG_NAME))
    process = start_guarded(job, arguments, (hold.fileno(),))
    code = watch(process, get_stop_path(run_dir.parent), run_dir)

    # add what it has cost
    seconds = time.monotonic() - started
    hours = seconds / 3600 * (job.gpus or job.cpus)
    spent = {"seconds": begun.seconds + seconds, "hours": begun.hours + hours}
    write_record(run_dir, replace(begun, **spent))
    return code


def has_started(before: Record | None, job: Job) -> bool:
    """Return whether this training was started before."""
    return before is not None and before.mark == job.mark and before.starts > 0


def build_resume_settings(run_dir: Path, before: Record) -> dict[str, str]:
    """Return the setting that resumes a run which was started before. If it ended while its base
    was loaded, before it took the folder, the checkpoints there belong to an earlier run and are
    not resumed."""
    has_begun = find_last_start(run_dir) not in (0.0, before.since)
    return {"resume_from_checkpoint": "latest"} if has_begun else {}


def find_last_start(run_dir: Path) -> float:
    """Return the time at which the last training in the folder took it; 0.0 without one. Such times
    are only compared for equality, as a clock may be set back."""
    starts = run_folder.RunDir(run_dir).read_events(events.RunStarted.kind)
    return (starts[-1].get("time") or 0.0) if starts else 0.0


def start_guarded(job: Job, argv: Sequence[str], holds: Sequence[int]) -> subprocess.Popen:
    """Start a command of this program that keeps the locks `holds` and does not outlive this
    process; its log is in the run folder. It has as many threads as cores: on CPUs the result's
    bytes depend on the number of threads."""
    folder = job.folder if os.path.isdir(job.folder) else None
    threads = {"OMP_NUM_THREADS": str(job.cpus)}
    command = (*GUARD_COMMAND, str(os.getpid()), *argv)
    return processes.start_process(
        Path(job.run_dir), command, threads, folder, inherited_files=holds
    )


def watch(process: subprocess.Popen, stop: Path, run_dir: Path) -> int:
    """Wait for its end. Once the fleet stops, or this task is cancelled, ask it to end with a
    checkpoint. It is killed if it does not answer."""
    stop_request_sec = 0.0
    try:
        while process.poll() is None:
            if not stop_request_sec and stop.exists():
                processes.send_stop_request(run_dir)
                stop_request_sec = time.time()
            if stop_request_sec and processes.has_stopped_answering(stop_request_sec, run_dir):
                processes.kill_process(process.pid)
            time.sleep(POLL_SEC)
        return process.returncode
    except BaseException:
        # Ray cancels a task by an exception in it
        processes.send_stop_request(run_dir)
        raise


def record_exit(run_dir: Path, code: int) -> Record:
    """Return the record of a training that has ended with the exit status `code`."""
    was_asked = get_stop_path(run_dir.parent).exists()
    if code == EXIT_DONE:
        return record_ending(run_dir, "done")
    if code == EXIT_INTERRUPTED or (was_asked and code in processes.SIGTERM_STATUSES):
        return record_ending(run_dir, "interrupted")

    # a person's mistake is told by the command itself; anything else is guessed from its end
    log = processes.read_log_tail(run_dir)
    errors = [
        line.removeprefix(ERROR_PREFIX)
        for line in log.splitlines()
        if line.startswith(ERROR_PREFIX)
    ]
    if code == EXIT_MISTAKE and errors:
        return record_ending(run_dir, "failed", errors[-1])
    return record_ending(
        run_dir, "failed", processes.explain_ending(code, log, is_stop_requested=was_asked)
    )


if __name__ == "__main__":
    processes.watch_parent(int(sys.argv.pop(1)), partial(signal.raise_signal, signal.SIGTERM))
    runpy.run_module("dreambooth_moslora", run_name="__main__")
