"""The queue's runs, one after the other: what the page does in a thread, and the command `queue start` in the terminal.

Either may do it, or both: who takes a turn sees on the disk how the queue stands, so that a page or command that was
killed is missed by nobody.
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
"""Times that a run is killed without a new checkpoint between before it counts as failed."""
TURN_SEC = 1.0
UNREADABLE = "its file in the queue cannot be read; add it once more"

logger = logging.getLogger(__name__)


class QueueTurns:
    """`take` does what is due: note that a run has ended, go on with one that was cut off, or start the next."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.queue = jobs, RunQueue(jobs.runs_dir)

    def take(self) -> None:
        """Nothing while a run is going on, of the queue or not, or while another process takes its turn."""
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
        """Take a turn each second as long as this process lives and the folder of runs is there."""
        threading.Thread(target=self._keep_on, name="queue", daemon=True).start()

    def _keep_on(self) -> None:
        while self.jobs.runs_dir.is_dir():
            try:
                self.take()
            except Exception:  # a full disk, say: the next turn may do better
                logger.exception("The queue's turn failed")
            time.sleep(TURN_SEC)

    def _settle(self, run: QueuedRun) -> None:
        """No process trains the run: start it, or say how it ended."""
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
        """From the newest checkpoint, if it has been started before."""
        run_dir = self.jobs.runs_dir / run.name
        if is_held(run_dir):
            return
        goes_on = self._has_checkpoint_since(run.queued, run)
        settings = run.settings | ({"resume_from_checkpoint": "latest"} if goes_on else {})
        self.queue.note(replace(run, started=time.time()))
        try:
            self.jobs.start(run.name, settings, run.owner, run.folder)
        except (OSError, ValueError) as error:  # UserError is one, and so is a path that none can be
            if not self.jobs.current():  # else somebody was faster, and it is started later
                self.queue.end(run, "failed", one_line(error))

    def _has_checkpoint_since(self, when: float, run: QueuedRun) -> bool:
        newest = RunDir(self.jobs.runs_dir / run.name).latest_checkpoint()
        return newest is not None and newest.stat().st_mtime >= when


def is_held(run_dir: Path) -> bool:
    """Whether a process trains in that folder of which no record says so."""
    if not run_dir.is_dir():
        return False
    with suppress(UserError), locked(run_dir):
        return False
    return True
