"""Turns: of the page's pipeline and a training on one GPU, and of the runs that wait.

Most machines cannot hold SDXL twice. On a GPU the pipeline moves to the host while a run trains; without one it leaves
memory: in fp32 SDXL takes 13 GiB. The queue's runs are trained one after the other, in a thread of the page or in the
command `queue start`; several processes may do so at once, and as the queue's state is on the disk, another one goes on
when a page or command is killed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_moslora.base.machine import has_gpu
from dreambooth_moslora.core.errors import UserError, one_line
from dreambooth_moslora.disk.queue import QueuedRun, RunQueue, locked
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.ui.jobs import Job, Jobs

if TYPE_CHECKING:
    from dreambooth_moslora.generation.pipeline import SubjectPipeline

BUSY = "this machine is training a run; pictures can be drawn again when the run has ended or is stopped"


class GpuTurns:
    """Keeps the pipeline out of a run's way while `is_training()`. A small base is never moved, as both fit.

    `pipeline()` waits for the base, `loaded()` does not, `unload()` forgets it.
    """

    def __init__(
        self,
        pipeline: Callable[[], "SubjectPipeline"],
        loaded: Callable[[], "SubjectPipeline | None"],
        unload: Callable[[], None],
        is_training: Callable[[], bool],
        *,
        is_small: bool,
    ) -> None:
        self._pipeline, self._loaded, self._unload = pipeline, loaded, unload
        self._is_training, self._is_small = is_training, is_small
        self._lock = threading.Lock()  # not an RLock: another thread may close the generator

    def check_memory(self) -> None:
        """Raises UserError while the base must not be loaded: beside a run, without a GPU."""
        if not self._is_small and self._is_training() and not has_gpu():
            raise UserError(BUSY)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Wraps all pictures of a request. Raises UserError while a run trains."""
        if self._is_small:
            yield
            return
        self._pipeline()  # not under the lock: loading takes long
        with self._lock:
            if self._is_training():
                raise UserError(BUSY)
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Wraps the start of a run: waits for the current pictures, then makes room for it.

        With a GPU, a pipeline that is still loading is left alone, as it loads into the CPU's memory.
        """
        with self._lock:
            if not self._is_small:
                self._make_room()
            yield

    def _make_room(self) -> None:
        pipeline = self._loaded()
        if has_gpu() if pipeline is None else pipeline.has_gpu:
            if pipeline is not None:
                pipeline.rest()
            return
        del pipeline
        self._unload()


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
