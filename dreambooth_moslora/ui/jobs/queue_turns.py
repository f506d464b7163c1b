"""Trains the queue's runs one after the other: in a thread of the page, or in the command `queue start`.

Several processes may do so at once. The queue's state is on the disk, so another one can go on when a page or
command is killed.
"""

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.training.run_folders.run_lock import locked
from dreambooth_moslora.training.run_folders.run_queue import QueuedRun, RunQueue
from dreambooth_moslora.ui.jobs.job import Job
from dreambooth_moslora.ui.jobs.jobs import Jobs

__all__ = ["QueueTurns"]

KILLED_MOST = 3
"""A run that is killed this many times without a new checkpoint counts as failed."""
TURN_SEC = 1.0
UNREADABLE = "its file in the queue cannot be read; add it once more"

logger = logging.getLogger(__name__)


class QueueTurns:
    """`take` does the next thing: record the end of a run, resume an interrupted one, or start the next."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.queue = jobs, RunQueue(jobs.runs_dir)

    def take(self) -> None:
        """Does nothing while any run is in progress, or while another process holds the turn."""
        with self.queue.turn() as is_mine:
            if not is_mine or self.jobs.current():
                return
            for run in self.queue.started()[:1] or filter(None, [self.queue.claim()]):
                self._settle(run)

    def current(self) -> QueuedRun | None:
        """The run whose turn it is."""
        return next(iter(self.queue.started()), None)

    @property
    def is_empty(self) -> bool:
        return not (self.queue.started() or self.queue.waiting())

    def in_background(self) -> None:
        """Call `take` every second while this process lives and the folder of runs exists."""
        threading.Thread(target=self._keep_on, name="queue", daemon=True).start()

    def _keep_on(self) -> None:
        while self.jobs.runs_dir.is_dir():
            try:
                self.take()
            except Exception:  # such as a full disk: the next turn may succeed
                logger.exception("The queue's turn failed")
            time.sleep(TURN_SEC)

    def _settle(self, run: QueuedRun) -> None:
        """The run has no process: start it, or record how it ended."""
        if not run.settings:
            self.queue.end(run, "failed", UNREADABLE)
            return
        job = Job.load(self.jobs.runs_dir / run.name)
        if not run.started or job is None or job.created < run.started - 1:
            self._start(run)
            return
        if self.jobs.was_cut_off(job):
            self._go_on(run)
            return
        state = self.jobs.state(job)
        self.queue.end(run, state.state, state.message)

    def _go_on(self, run: QueuedRun) -> None:
        killed = 0 if self._has_checkpoint_since(run.started, run) else run.killed + 1
        if killed >= KILLED_MOST:
            self.queue.end(run, "failed", f"it was killed {KILLED_MOST} times, perhaps for want of memory")
        else:
            self._start(replace(run, killed=killed))

    def _start(self, run: QueuedRun) -> None:
        """Start it, from the newest checkpoint if it has been started before."""
        run_dir = self.jobs.runs_dir / run.name
        if is_held(run_dir):
            return
        goes_on = self._has_checkpoint_since(run.queued, run)
        settings = run.settings | ({"resume_from_checkpoint": "latest"} if goes_on else {})
        self.queue.note(replace(run, started=time.time()))
        try:
            self.jobs.start(run.name, settings, run.owner, run.folder)
        except (OSError, ValueError) as error:  # UserError is a ValueError; so is the error of an impossible path
            if not self.jobs.current():  # else another run was faster, and this one starts later
                self.queue.end(run, "failed", one_line(error))

    def _has_checkpoint_since(self, when: float, run: QueuedRun) -> bool:
        newest = RunDir(self.jobs.runs_dir / run.name).latest_checkpoint()
        return newest is not None and newest.stat().st_mtime >= when


def is_held(run_dir: Path) -> bool:
    """Whether an unrecorded process trains in that folder."""
    if not run_dir.is_dir():
        return False
    with suppress(UserError), locked(run_dir):
        return False
    return True
