"""Training runs as processes, which go on when the page is closed or the app is restarted.

`runs/<name>/job.json` names the process; `metrics.jsonl` has the progress. A file requests a stop
after the current step, with a checkpoint (`processes.send_stop_request`). The queue's state is on
the disk: any server trains its runs, one after the other.
"""

import json
import logging
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import psutil

from dreambooth_moslora.disk import processes, queue, run_folder
from dreambooth_moslora.disk.atomic import rename_with_retry
from dreambooth_moslora.disk.contents import read_json
from dreambooth_moslora.disk.events import EventLog
from dreambooth_moslora.disk.process_identity import read_process_start
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.training.run_metrics import is_run_active

logger = logging.getLogger(__name__)


def find_phase(events: list[dict[str, Any]]) -> str:
    """Return what the trainer does now; "" before its first event.

    Training is the phase after a step, and after the last photo is encoded.
    """
    for event in reversed(events):
        if event["type"] in ("phase", "step"):
            was_last = event.get("phase") == "caching" and event.get("done") == event.get("total")
            return "training" if was_last else str(event.get("phase") or "training")
    return ""


TERMINAL_RUN_MESSAGE = "this run was begun in a terminal: stop it there with Ctrl-C"
"""Error for a run that the page cannot stop."""
JOB_NAME = "job.json"
"""File in the run's folder with the record of its process."""


@dataclass(frozen=True)
class Job:
    """Run of this page or of a terminal: its folder and its process."""

    run_dir: Path
    pid: int
    birth: str
    """Start time of the process, which tells it from others of its number."""
    began: float = 0.0
    """Time just before the process was started, s."""

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def changed_sec(self) -> float:
        """Return when it was started, or when a terminal's run last wrote an event, s."""
        record = self.run_dir / JOB_NAME
        if not record.is_file():
            record = run_folder.RunDir(self.run_dir).metrics_path
        return record.stat().st_mtime

    def save(self) -> None:
        """Write the record whole, or leave the old one. Raises OSError."""
        facts = {key: value for key, value in asdict(self).items() if key != "run_dir"}
        temporary = self.run_dir / queue.NEW_RECORD_NAME
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        rename_with_retry(temporary, self.run_dir / JOB_NAME)

    @classmethod
    def load(cls, run_dir: Path) -> "Job | None":
        """Load the run in the folder; None if there is none.

        A run that was begun in a terminal has no record here, so its process is not known.
        """
        if not (run_dir / JOB_NAME).is_file():
            is_run = run_folder.RunDir(run_dir).metrics_path.is_file()
            return cls(run_dir, pid=0, birth="") if is_run else None
        try:
            facts = read_json(run_dir / JOB_NAME)
            known_fields = facts.keys() & (cls.__dataclass_fields__.keys() - {"run_dir"})
            return cls(run_dir, **{name: facts[name] for name in known_fields})
        except (UserError, TypeError):
            return None

    @property
    def stop_requested_sec(self) -> float:
        """Return when a stop was requested since its start, s; 0: none was."""
        request = self.run_dir / processes.STOP_FILE_NAME
        return request.stat().st_mtime if request.exists() else 0.0

    @property
    def is_alive(self) -> bool:
        """Return whether it trains: its process exists, or a terminal's holds the folder."""
        return self.has_process or is_run_active(run_folder.RunDir(self.run_dir))

    @property
    def has_process(self) -> bool:
        """Return whether the started process still exists (a zombie does not count)."""
        try:
            # Another process may have got its number.
            is_same = read_process_start(self.pid) == self.birth
            return is_same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that it was started with. Raises UserError if the file holds none."""
        started = self.run_dir / processes.JOB_CONFIG_NAME
        if started.is_file():
            return read_json(started)
        # A terminal's run may have been moved since: its folder is the one that was found.
        settings = read_json(run_folder.RunDir(self.run_dir).config_path)
        return settings | {"output_dir": str(self.run_dir)}


KILL_AFTER_SEC = 30
"""A second request to stop kills the run when the first is older."""
RUN_NAME_PATTERN = re.compile(r"[^\W_][\w +-]*(\.[\w +-]+)*")
"""Letters, digits, space and `+-_`, with single dots between: no separator, no leading dot."""
MAX_RUN_NAME_CHARACTERS = 60
"""Characters of a new run's name at most."""
MAX_NAME_BYTES = 255
"""Bytes of any folder's name at most."""


@dataclass(frozen=True)
class JobState:
    """Progress of a run."""

    state: str
    """Starting, running, stopping, done, interrupted, or failed."""
    step: int
    max_train_steps: int
    phase: str
    """Phase of the trainer (`find_phase`)."""
    message: str = ""
    """Reason of its end."""

    @property
    def is_active(self) -> bool:
        return self.state in ("starting", "running", "stopping")


class Jobs:
    """Runs under `runs_dir`, one process at a time.

    - `runs_dir` has a folder for each run.
    - `script` trains in place of this package's `train`.
    - `make_room` gives the context manager around a start.
    """

    def __init__(
        self,
        runs_dir: Path,
        script: Path | None = None,
        make_room: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.runs_dir = runs_dir
        self.script = script
        self._make_room = make_room
        # The process that this server started last.
        self._child: subprocess.Popen | None = None
        self._metrics: dict[Path, EventLog] = {}
        self._lock = threading.Lock()

    def start(self, name: str, config: dict[str, Any]) -> Job:
        """Start training into `runs_dir`/`name`. Raises UserError while another run trains."""
        run_dir = self.run_dir(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        processes.write_settings(run_dir, config)
        return self._launch(run_dir)

    def resume(self, name: str) -> Job:
        """Resume from the last checkpoint.

        Raises UserError when the run is going on.
        """
        job = self.load_job(name)
        if job.is_alive:
            raise UserError(f"the run {job.name} is still going on")
        config = job.settings | {"resume_from_checkpoint": "latest"}
        processes.write_settings(job.run_dir, config)
        return self._launch(job.run_dir)

    def stop(self, name: str) -> Job:
        """Ask the trainer to end with a checkpoint; kill it at a second request after 30 s.

        Raises UserError for a run that has ended.
        """
        job = self.load_job(name)
        if not job.is_alive:
            raise UserError(f"the run {job.name} has already ended")
        if not job.has_process:
            raise UserError(TERMINAL_RUN_MESSAGE)
        stop_requested_sec = job.stop_requested_sec
        if stop_requested_sec and time.time() - stop_requested_sec > KILL_AFTER_SEC:
            processes.kill_process(job.pid)
        if not stop_requested_sec:
            processes.send_stop_request(job.run_dir)
            # A run without events has nothing to save.
            if not self._list_events(job):
                processes.kill_process(job.pid)
        return job

    def load_job(self, name: str) -> Job:
        """Load the run of that name. Raises UserError if there is none."""
        job = Job.load(self.run_dir(name))
        if job is None:
            raise UserError(f"there is no run called {name!r:.60}")
        return job

    def run_dir(self, name: str) -> Path:
        """Return the run's folder. Raises UserError for a name that would leave `runs_dir`."""
        is_name = isinstance(name, str) and RUN_NAME_PATTERN.fullmatch(name)
        if not is_name or len(name.encode()) > MAX_NAME_BYTES:
            raise UserError(f"{name!r:.60} cannot be the name of a run")
        return self.runs_dir / name

    def list_jobs(self) -> list[Job]:
        """List all runs of the folder, newest first, started by the page or in a terminal."""
        jobs = list(filter(None, map(Job.load, self.runs_dir.glob("*/"))))
        return sorted(jobs, key=lambda job: job.changed_sec, reverse=True)

    def find_active_job(self) -> Job | None:
        """Return the run in progress, or None."""
        # An ended process leaves the system's list only when its parent polls it.
        if self._child is not None:
            self._child.poll()
        return next((job for job in self.list_jobs() if job.is_alive), None)

    def load_metrics(self, job: Job) -> EventLog:
        """Read the run's events up to now."""
        with self._lock:
            path = run_folder.RunDir(job.run_dir).metrics_path
            return self._metrics.setdefault(path, EventLog(path)).refresh()

    def get_state(self, job: Job) -> JobState:
        """Return the run's progress, from its process and its events."""
        # Check the process first: once it has ended, its metrics are complete.
        alive = job.is_alive
        metrics = self.load_metrics(job)
        events = self._list_events(job)
        was_stopped_early = bool(job.stop_requested_sec) and not (alive or events)

        # The state: from the record of the trainer's end, or from its process.
        by_kind = {event.get("type"): event for event in events}
        end = by_kind.get("end", {})
        # A process that was stopped deletes the request before it ends.
        has_stopped = job.has_process and end.get("state") == "interrupted"
        if alive and (job.stop_requested_sec or has_stopped):
            state = "stopping"
        elif alive:
            state = "running" if events else "starting"
        elif end.get("state"):
            state = end["state"]
        else:
            state = "interrupted" if was_stopped_early else "failed"

        # The step. While a run starts, the file still belongs to an earlier start.
        is_starting = alive and not events
        past_events = [] if is_starting else [*metrics.list_events("step")[-1:], *events]
        step = max((int(event.get("step") or 0) for event in past_events), default=0)
        total = int(metrics.get_last("start").get("max_train_steps") or 0)

        # The reason of its end: a process that was killed has recorded none.
        message = str(end.get("message") or metrics.problem)
        if was_stopped_early:
            message = processes.STOPPED_EARLY_MESSAGE
        elif not (message or end or alive):
            message = processes.explain_ending(
                None,
                processes.read_log_tail(job.run_dir),
                is_stop_requested=bool(job.stop_requested_sec),
            )
        return JobState(
            state=state,
            step=step,
            max_train_steps=total,
            phase=find_phase(events),
            message=message,
        )

    def is_cut_off(self, job: Job) -> bool:
        """Return whether the run was killed, or its machine went down.

        False if it ended itself, or was stopped by a user.
        """
        if job.is_alive or job.stop_requested_sec:
            return False
        ends = [
            event.get("state") for event in self._list_events(job) if event.get("type") == "end"
        ]
        if ends:
            return ends[-1] == "interrupted"
        return processes.has_been_killed(None, processes.read_log_tail(job.run_dir))

    def _list_events(self, job: Job) -> list[dict[str, Any]]:
        """List events from the first that is not older than the run's process.

        Later ones may be older: the clock may be put back.
        """
        events = self.load_metrics(job).list_since_start()
        return list(dropwhile(lambda event: event.get("time", 0) < job.began, events))

    def _launch(self, run_dir: Path) -> Job:
        """Start the trainer on the settings in `run_dir`, and record its process.

        Raises UserError while another run is going on.
        """
        with self._make_room(), self._lock:
            running = self.find_active_job()
            if running:
                raise UserError(f"the run {running.name} is going on; one run at a time")
            # Start the process and record it.
            command = processes.TRAIN_ARGUMENTS if self.script is None else [str(self.script)]
            argv = (*command, "--config", str(run_dir / processes.JOB_CONFIG_NAME))
            began = time.time()
            child = self._child = processes.start_process(run_dir, argv)
            job = Job(run_dir, child.pid, birth=read_process_start(child.pid), began=began)
            job.save()
            return job


MAX_KILLS = 3
"""Kills without a new checkpoint between them after which a run counts as failed."""
KILLED_MESSAGE = f"it was killed {MAX_KILLS} times, perhaps for want of memory"
"""Message of such a run."""
TURN_SEC = 1.0
"""Seconds between two looks at the queue."""
UNREADABLE_MESSAGE = "its file in the queue cannot be read; add it once more"
"""Message of a queued run whose settings are gone."""


class QueueRunner:
    """Trainer of the queued runs, one after the other; `run_next` takes the next action.

    The action is to record the end of a run, to resume an interrupted one, or to start the next.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.queue = queue.RunQueue(jobs.runs_dir)

    def run_next(self) -> None:
        """Take the next action, if there is one.

        Does nothing while any run is in progress, or while another process holds the turn.
        """
        with self.queue.claim_turn() as is_mine:
            # Find the run whose turn it is.
            if not is_mine or self.jobs.find_active_job():
                return
            run = self.find_started_run() or self.queue.claim()
            if not run:
                return
            if not run.settings:
                self.queue.end(run, "failed", UNREADABLE_MESSAGE)
                return

            # Start a run that has not begun, or whose folder has an earlier process's record.
            job = Job.load(self.jobs.runs_dir / run.name)
            if not run.started or job is None or job.began < run.started:
                self._start(run)
                return

            # Record the end of a run that has ended, or was stopped.
            state = self.jobs.get_state(job)
            if not self.jobs.is_cut_off(job):
                self.queue.end(run, state.state, state.message)
                return

            # Resume a run that was cut off, unless it is killed repeatedly without progress.
            is_killed = state.state != "interrupted"
            newest = run_folder.RunDir(job.run_dir).find_latest_checkpoint()
            has_progress = newest is not None and newest.stat().st_mtime >= run.started
            killed = 0 if has_progress else run.killed + is_killed
            if killed >= MAX_KILLS:
                self.queue.end(run, "failed", KILLED_MESSAGE)
            else:
                self._start(replace(run, killed=killed))

    def find_started_run(self) -> queue.QueuedRun | None:
        """Return the run whose turn it is; None between two."""
        return next(iter(self.queue.list_started()), None)

    @property
    def is_empty(self) -> bool:
        return not (self.queue.list_started() or self.queue.list_waiting())

    def run_forever(self) -> None:
        """Call `run_next` every second while this process lives."""
        while True:
            try:
                self.run_next()
            except Exception:
                # Such as a full disk, or a folder that was deleted: the next turn may succeed.
                logger.exception("The queue's turn failed")
            time.sleep(TURN_SEC)

    def _start(self, run: queue.QueuedRun) -> None:
        """Start the run, from the newest checkpoint if it has been started before."""
        # A checkpoint in its folder, which was made for this run, is its own.
        folder = run_folder.RunDir(self.jobs.runs_dir / run.name)
        can_resume = bool(run.started) and folder.find_latest_checkpoint() is not None
        settings = run.settings | ({"resume_from_checkpoint": "latest"} if can_resume else {})
        # A start that fails is final, unless another run was faster.
        self.queue.note(replace(run, started=time.time()))
        try:
            self.jobs.start(run.name, settings)
        # UserError is a ValueError; so is the error of an impossible path.
        except (OSError, ValueError) as error:
            if not self.jobs.find_active_job():
                self.queue.end(run, "failed", format_error(error))
