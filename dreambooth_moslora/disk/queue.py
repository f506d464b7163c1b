"""Lock of a run folder, and the queue of waiting runs.

One run at a time trains in a folder: it locks `run.lock`. The system releases the lock when the
process ends in any way, so the file of a killed run blocks nobody.

The queue is the folder `.queue` in the folder of runs:

    waiting/NAME.json    a waiting run with all its settings, and when it was added
    started/NAME.json    the run whose turn it is, until it has ended
    ended.jsonl          one line for each run that has ended, and how

A process must hold `claim_turn` to start or end runs, so only one does.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from filelock import lock_descriptor

from dreambooth_moslora.disk import events, processes, run_folder
from dreambooth_moslora.disk.atomic import clean_temporaries, rename_with_retry, write_atomic
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.errors import UserError, escape_control_characters, format_error

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
"""File that a run locks."""
WORKER_LOCK_NAME = ".worker.lock"
"""File that a fleet's worker locks."""
NEW_RECORD_NAME = ".job.json.tmp"
"""Temporary name of job.json."""
OPENED_FILE_NAMES = (
    LOCK_NAME,
    run_folder.METRICS_NAME,
    run_folder.LOG_NAME,
    processes.JOB_LOG_NAME,
    processes.JOB_CONFIG_NAME,
    WORKER_LOCK_NAME,
    NEW_RECORD_NAME,
)
"""Files that are written in place, while others are replaced; the last four by a queue and a fleet.
"""


@contextmanager
def lock_folder(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Lock the existing `folder` of the option `flag` for the block.

    Raises UserError when another run has locked it, or when a file that a run writes to is a link
    or a pipe: somebody else may have made the folder.
    """
    check_no_links(folder, flag)
    path = folder / LOCK_NAME
    file = claim_lock(path, flag)
    try:
        yield
    finally:
        release_lock(path, file)


def check_no_links(folder: Path, flag: str) -> None:
    """Raise UserError for a link or a pipe under the name of a file that a run writes to."""
    for path in (folder / name for name in OPENED_FILE_NAMES):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{flag} {folder}: {path.name} in it is no file of its own; remove it.")


def release_lock(path: Path, file: BinaryIO) -> None:
    """Remove the file and release its lock, in the order that the system allows.

    Windows removes no open file, and none that the next owner has opened meanwhile.
    """
    try:
        path.unlink()
    except PermissionError:
        file.close()
        with suppress(OSError):
            path.unlink()
    except OSError:
        pass
    file.close()


def check_unlocked(folder: Path) -> None:
    """Raise UserError when a run has locked the folder, which need not exist."""
    path = folder / LOCK_NAME
    if path.is_file():
        claim_lock(path, "--output_dir").close()


def claim_lock(path: Path, flag: str) -> BinaryIO:
    """Open and lock the file, created again if its owner removes it.

    Raises UserError when another process has locked it.
    """
    while True:
        file = path.open("a+b")
        if not lock_file(file, path.parent):
            file.close()
            raise UserError(
                f"{flag} {path.parent}: another process is training there; wait for its end, or "
                "name another folder."
            )
        with suppress(FileNotFoundError):  # its last owner removed it between the two lines above
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def lock_file(file: BinaryIO, folder: Path) -> bool:
    """Lock the open file in `folder`, and return whether this process has the lock.

    The lock lasts until this process, and those that inherit the file, have closed it or ended.
    Where files cannot be locked (some network disks) a warning says so, and the run continues.
    """
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        warn_no_locks(folder, format_error(error.strerror))
        return True


@cache  # the page takes the queue's lock every second
def warn_no_locks(folder: Path, reason: str) -> None:
    text = (
        f"{folder}: files there cannot be locked ({reason}), so two runs in it are not kept apart"
    )
    logger.warning("%s", escape_control_characters(text))


QUEUE_NAME = ".queue"
QUEUE_TIMEOUT_SEC = 30.0
"""How long another process may lock the waiting runs."""
QUEUE_POLL_SEC = 0.02


@dataclass(frozen=True)
class QueuedRun:
    """Run in the queue: a file there, until the run has ended."""

    name: str
    # checked; {} if its file could not be read
    settings: dict[str, Any] = field(default_factory=dict)
    queued: float = 0.0  # time, s
    started: float = 0.0  # time, s
    killed: int = 0  # how often since its last checkpoint

    @classmethod
    def load(cls, path: Path) -> "QueuedRun":
        """Return the run of a file; if it cannot be read, a run of its name without settings."""
        with suppress(UserError):
            run = read_json(path, cls)
            if run.name == path.stem:
                return run
        return cls(path.stem)


class RunQueue:
    """Queue of the runs in `runs_dir`. It creates no files until a run is added."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.folder = runs_dir / QUEUE_NAME
        self.ended_path = self.folder / "ended.jsonl"

    def add(self, run: QueuedRun) -> int:
        """Add a run behind the others, and return its position from 1.

        Raises UserError for a name that is in the queue.
        """
        with self._lock_waiting():
            waiting = self.list_waiting()
            if run.name in {queued.name for queued in waiting + self.list_started()}:
                raise UserError(f"the run {run.name} is in the queue already")
            self._write("waiting", run)
            return len(waiting) + 1

    def list_waiting(self) -> list[QueuedRun]:
        """Return the waiting runs, the first that was added first."""
        return sorted(self._read_runs("waiting"), key=lambda run: run.queued)

    def list_started(self) -> list[QueuedRun]:
        """Return the run whose turn it is, or an empty list."""
        return sorted(self._read_runs("started"), key=lambda run: run.started)

    def remove(self, name: str) -> QueuedRun:
        """Remove a waiting run, and its folder if nothing was trained there.

        Raises UserError for a run that does not wait.
        """
        with self._lock_waiting():
            run = next((run for run in self.list_waiting() if run.name == name), None)
            if run is None:
                raise UserError(f"no run called {name!r:.60} waits in the queue")
            self._get_path("waiting", name).unlink()
        run_dir = run_folder.RunDir(self.runs_dir / name)
        if not run_dir.metrics_path.exists():
            shutil.rmtree(run_dir.path, ignore_errors=True)
        return run

    @contextmanager
    def claim_turn(self) -> Iterator[bool]:
        """Yield whether this process may start and end runs of the queue for the duration of the
        block."""
        lock = None
        if self.folder.is_dir():
            with suppress(UserError):
                lock = claim_lock(self.folder / "turn.lock", "--runs_dir")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.close()

    def claim(self) -> QueuedRun | None:
        """Move the first waiting run to `started` and return it; None when none waits."""
        with self._lock_waiting():
            waiting = self.list_waiting()
            if not waiting:
                return None
            run = waiting[0]
            (self.folder / "started").mkdir(exist_ok=True)
            rename_with_retry(
                self._get_path("waiting", run.name), self._get_path("started", run.name)
            )
            return run

    def note(self, run: QueuedRun) -> None:
        """Record the changes of the run whose turn it is."""
        self._write("started", run)

    def end(self, run: QueuedRun, state: str, message: str) -> None:
        """Record the end of a run; `state` is done, interrupted or failed."""
        facts = {"type": "ended", "time": time.time(), "name": run.name, "state": state}
        events.append_event(self.ended_path, facts | {"message": message})
        self._get_path("started", run.name).unlink(missing_ok=True)

    def _read_runs(self, kind: str) -> list[QueuedRun]:
        """Read the runs of a folder; reading a pipe would never end."""
        paths = [path for path in (self.folder / kind).glob("[!.]*.json") if not path.is_fifo()]
        return [QueuedRun.load(path) for path in paths]

    def _get_path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.json"

    def _write(self, kind: str, run: QueuedRun) -> None:
        path = self._get_path(kind, run.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_temporaries(path.parent)
        write_atomic(path, json.dumps(asdict(run), indent=1))

    @contextmanager
    def _lock_waiting(self) -> Iterator[None]:
        """Lock the waiting runs for the block, which must be short.

        Raises UserError when another process has them locked for QUEUE_TIMEOUT_SEC.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + QUEUE_TIMEOUT_SEC
        while True:
            with suppress(UserError):
                lock = claim_lock(self.folder / "order.lock", "--runs_dir")
                break
            if time.monotonic() > end:
                raise UserError(
                    f"{self.folder}: another process is changing the queue and does not end"
                )
            time.sleep(QUEUE_POLL_SEC)
        try:
            yield
        finally:
            lock.close()
