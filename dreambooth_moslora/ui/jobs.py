"""Training runs as processes of the server: they go on when the page is closed or the app is
restarted.

`runs/<name>/job.json` names the process; `metrics.jsonl`, which anyone may have edited, has the
progress. A file stops a run after its step, with a checkpoint (`processes.ask_to_stop`). The
queue's state is on the disk: any page or `queue start` trains its runs, one after the other.
"""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import dropwhile
from pathlib import Path
from typing import Any

import psutil

from dreambooth_moslora.disk import processes, queue, run_folder
from dreambooth_moslora.disk.atomic import rename
from dreambooth_moslora.disk.contents import small_text
from dreambooth_moslora.disk.events import Metrics
from dreambooth_moslora.disk.process_identity import birth_of
from dreambooth_moslora.errors import UserError, one_line
from dreambooth_moslora.values import is_finite_number

logger = logging.getLogger(__name__)

KINDS = {
    **dict.fromkeys(("step", "max_train_steps", "done", "total"), int),
    **dict.fromkeys(("time", "loss", "step_sec", "eta_sec", "memory_gib"), int | float),
    **dict.fromkeys(("phase", "state", "message"), str),
    "files": list,
    "config": dict,
}
"""Field -> the type that the page expects; null is always allowed."""


class RunEvents(Metrics):
    """Metrics without events whose fields have another type than the trainer writes."""

    def refresh(self) -> "RunEvents":
        known, count = self.events, len(self.events)
        super().refresh()
        start = count if self.events is known else 0
        self.events[start:] = [event for event in self.events[start:] if is_sound(event)]
        return self


def is_sound(event: dict[str, Any]) -> bool:
    if event["type"] == "step" and event.get("step") is None:
        return False
    return all(
        event.get(name) is None or isinstance(event[name], kind) for name, kind in KINDS.items()
    )


def phase_of(events: list[dict[str, Any]]) -> str:
    """What the trainer does now: it trains after a step, and after the last of the photos."""
    for event in reversed(events):
        if event["type"] in ("phase", "step"):
            was_last = event.get("phase") == "caching" and event.get("done") == event.get("total")
            return "training" if was_last else str(event.get("phase") or "training")
    return ""


JOB_NAME = "job.json"
REMARK = re.compile(
    r"^[\d-]+ [\d:,]+ WARNING dreambooth_moslora[\w.]*: (?:note: )?(.+)", re.MULTILINE
)


@dataclass(frozen=True)
class Job:
    """One run: its folder and its process. Paths in its settings are relative to `folder`."""

    run_dir: Path
    pid: int
    created: float
    stop_asked: float = 0.0
    birth: str = ""
    folder: str = ""
    began: float = 0.0
    """The clock just before the process was made: `created` is exact to a second only, and an
    earlier process may have ended within it."""

    @property
    def name(self) -> str:
        return self.run_dir.name

    def save(self) -> None:
        facts = {key: value for key, value in asdict(self).items() if key != "run_dir"}
        temporary = self.run_dir / queue.NEW_RECORD_NAME
        temporary.write_text(json.dumps(facts), encoding="utf-8")
        rename(temporary, self.run_dir / JOB_NAME)

    @classmethod
    def load(cls, run_dir: Path) -> "Job | None":
        """The record in the folder; None when it is missing or cannot be read. Reading a pipe would
        have no end."""
        if not (run_dir / JOB_NAME).is_file():
            return None
        names = [name for name in cls.__dataclass_fields__ if name != "run_dir"]
        try:
            facts = json.loads(small_text(run_dir / JOB_NAME))
            job = cls(run_dir, **{name: facts[name] for name in names if name in facts})
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        texts, numbers = (job.birth, job.folder), (job.created, job.stop_asked, job.began)
        is_sound = (
            type(job.pid) is int and job.pid > 0 and all(isinstance(text, str) for text in texts)
        )
        return job if is_sound and all(map(is_finite_number, numbers)) else None

    @property
    def is_of_terminal(self) -> bool:
        """Whether `train` began it in a terminal: it has no record, and is stopped there."""
        return not (self.run_dir / JOB_NAME).exists()

    @property
    def is_alive(self) -> bool:
        """Whether the started process still exists (a zombie does not count)."""
        try:
            process = psutil.Process(self.pid)
            by_clock = abs(process.create_time() - self.created) < 1.0
            same = birth_of(self.pid) == self.birth if self.birth else by_clock
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def log_tail(self) -> str:
        return processes.log_tail(self.run_dir)

    def remarks(self) -> list[str]:
        """What the trainer remarked, such as settings without effect: each warning in the beginning
        of its own log."""
        if not (path := run_folder.RunDir(self.run_dir).log_path).is_file():
            return []
        with path.open("rb") as file:
            text = file.read(processes.TAIL_BYTES).decode("utf-8", errors="replace")
        return list(dict.fromkeys(REMARK.findall(text)))


def job_of_terminal(run_dir: Path) -> Job:
    """The run in a folder without a record, and the process that the lock names, if it lives on
    this machine."""
    try:
        owner, began = queue.owner_of(run_dir), (run_dir / queue.OWNER_NAME).stat().st_mtime
        pid = int(re.fullmatch(rf"process (\d+) on {re.escape(socket.gethostname())}", owner)[1])
        created = psutil.Process(pid).create_time()
        if created <= began + 1:  # else another process has its number by now
            return Job(run_dir, pid, created)
    except (OSError, ValueError, TypeError, psutil.Error):
        pass
    return Job(run_dir, NO_PROCESS, 0.0)


NO_PROCESS = 0  # The number of no program's process.
KILL_AFTER_SEC = 30
RUN_NAME = re.compile(r"[^\W_][\w +-]*(\.[\w +-]+)*")
"""Letters, digits, space and `+-_`, with single dots between: no separator, no leading dot."""
MAX_RUN_NAME = 60  # Of a new run, characters
MOST_NAME_BYTES = 255  # Of any folder


@dataclass(frozen=True)
class JobState:
    """`state`: starting, running, stopping, done, interrupted, failed. `phase` is what the trainer
    does now."""

    state: str
    step: int
    max_train_steps: int
    phase: str
    message: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ("starting", "running", "stopping")


class Jobs:
    """The runs under `runs_dir`, one process at a time. `make_room` is a context manager around its
    start."""

    def __init__(
        self,
        runs_dir: Path,
        script: Path | None = None,
        make_room: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.runs_dir, self.script, self._make_room = runs_dir, script, make_room
        self._children: dict[int, subprocess.Popen] = {}
        self._exits: dict[int, int] = {}
        self._asked: dict[int, float] = {}  # process -> when it was asked to stop
        self._metrics: dict[Path, RunEvents] = {}
        self._lock = threading.Lock()

    def start(self, name: str, config: dict[str, Any], folder: str = "") -> Job:
        """Start training into `runs_dir`/`name`. Raises UserError while another run is going on."""
        run_dir = self.run_dir(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        processes.write_settings(run_dir, config)
        return self._launch(run_dir, folder)

    def resume(self, name: str) -> Job:
        """Resume from the last checkpoint. Raises UserError when the run is a terminal's, or is
        going on."""
        job = self.recorded(name)
        if job.is_alive:
            raise UserError(f"the run {job.name} is still going on")
        config = settings_of(job) | {"resume_from_checkpoint": "latest"}
        processes.write_settings(job.run_dir, config)
        return self._launch(job.run_dir, job.folder)

    def stop(self, name: str) -> Job:
        """Ask the trainer to end with a checkpoint; after 30 s, kill it with its children. Raises
        UserError."""
        job = self.recorded(name)
        if not job.is_alive:
            raise UserError(f"the run {job.name} has already ended")
        if job.stop_asked and time.time() - job.stop_asked > KILL_AFTER_SEC:
            processes.end_process(job.pid)
            return job
        if not job.stop_asked:
            job = self.ask_to_stop(job)
            with suppress(OSError):  # a full disk: this process remembers the request
                job.save()
        return job

    def ask_to_stop(self, job: Job) -> Job:
        """The request; `job` as it is then. A run that has not begun has nothing to save, and is
        ended: `terminate` is SIGTERM, which also asks, or on Windows the end. So is one that no
        request can be written for."""
        has_begun = bool(self._events_of(job))
        try:
            processes.ask_to_stop(job.run_dir)
        except OSError:
            has_begun = False
        if not has_begun:
            with suppress(psutil.Error):
                psutil.Process(job.pid).terminate()
        return replace(job, stop_asked=self._asked.setdefault(job.pid, time.time()))

    def recorded(self, name: str) -> Job:
        """A run of the page or of the queue. Raises UserError for any other."""
        if (job := Job.load(self.run_dir(name))) is None:
            raise UserError(f"there is no run called {name!r:.60} of a page or of the queue")
        return replace(job, stop_asked=job.stop_asked or self._asked.get(job.pid, 0.0))

    def run_dir(self, name: str) -> Path:
        """The run's folder. Raises UserError for a name that would leave `runs_dir`."""
        if name == "":
            raise UserError("choose a run; '' cannot be the name of a run")
        if (
            not isinstance(name, str)
            or not RUN_NAME.fullmatch(name)
            or len(name.encode()) > MOST_NAME_BYTES
        ):
            raise UserError(f"{name!r:.60} cannot be the name of a run")
        return self.runs_dir / name

    def all(self) -> list[Job]:
        """All runs of the page and of the queue, the newest first."""
        folders = sorted(
            self.runs_dir.glob(f"*/{JOB_NAME}"), key=lambda path: -path.stat().st_mtime
        )
        return [job for folder in folders if (job := Job.load(folder.parent))]

    def of_terminals(self) -> list[Job]:
        """The runs that `train` began in a terminal, the newest first."""
        found = []
        for path in self.runs_dir.glob("*/metrics.jsonl"):
            folder = path.parent
            if (
                RUN_NAME.fullmatch(folder.name)
                and path.is_file()
                and not os.path.lexists(folder / JOB_NAME)
            ):
                found.append(job_of_terminal(folder))
        return sorted(found, key=lambda job: -job.run_dir.stat().st_mtime)

    def seen(self, name: str) -> Job:
        """Any run. Raises UserError as `recorded`."""
        by_terminal = (job for job in self.of_terminals() if job.name == name)
        return next(by_terminal, None) or self.recorded(name)

    def current(self) -> Job | None:
        """The run in progress. One that was asked to stop and does not answer is ended."""
        self._reap()
        job = next((job for job in self.all() if job.is_alive), None)
        asked = (job.stop_asked or self._asked.get(job.pid, 0.0)) if job else 0.0
        if asked and processes.has_gone_silent(asked, [job.run_dir]):
            processes.end_process(job.pid)
            logger.warning("%s did not answer the request to stop and was ended", job.name)
        return job

    def metrics(self, job: Job) -> RunEvents:
        with self._lock:
            path = run_folder.RunDir(job.run_dir).metrics_path
            return self._metrics.setdefault(path, RunEvents(path)).refresh()

    def state(self, job: Job) -> JobState:
        # read before the metrics, which are complete once the process has ended
        alive = job.is_alive
        self._reap()
        metrics = self.metrics(job)
        events, code = self._events_of(job), self._exits.get(job.pid)
        # Windows' status of any that was killed, here of one that had begun
        if events and code == signal.SIGTERM:
            code = None
        by_kind = {event.get("type"): event for event in events}
        end = by_kind.get("end", {})
        if alive:
            state = "stopping" if job.stop_asked else "running" if events else "starting"
        else:
            # before it could record its end
            was_stopped_early = job.stop_asked and code in processes.STOPPED_EARLY
            state = end.get("state") or ("interrupted" if was_stopped_early else "failed")
        is_starting = alive and not events  # the file still belongs to an earlier start
        done = [] if is_starting else [*metrics.of("step")[-1:], *events]
        step = max((int(event.get("step") or 0) for event in done), default=0)
        total = int(metrics.last("start").get("max_train_steps") or 0)
        message = str(end.get("message") or metrics.problem)
        if not (message or end or alive):
            message = processes.why_it_ended(code, job.log_tail(), was_asked=bool(job.stop_asked))
        return JobState(state, step, total, phase_of(events), message)

    def was_cut_off(self, job: Job) -> bool:
        """Whether it neither ended itself nor was stopped by anybody: it was killed, or its machine
        went down."""
        if job.is_alive or job.stop_asked or job.pid in self._asked:
            return False
        self._reap()
        ends = [event.get("state") for event in self._events_of(job) if event.get("type") == "end"]
        return (
            ends[-1] == "interrupted"
            if ends
            else processes.was_killed(self._exits.get(job.pid), job.log_tail())
        )

    def _events_of(self, job: Job) -> list[dict[str, Any]]:
        """Events since the first that is not older than its process, as the clock may be put back
        later."""
        events, since = self.metrics(job).since_start(), job.began or job.created - 1
        return list(dropwhile(lambda event: (event.get("time") or 0) < since, events))

    def _launch(self, run_dir: Path, folder: str) -> Job:
        with self._make_room(), self._lock:
            if running := self.current():
                raise UserError(f"the run {running.name} is going on; one run at a time")
            command = processes.TRAIN if self.script is None else [str(self.script)]
            words = (*command, "--config", str(run_dir / processes.CONFIG_NAME))
            began = time.time()
            child = processes.start_logged(run_dir, words, folder=folder or None)
            self._children[child.pid] = child
            self._exits.pop(child.pid, None)
            self._asked.pop(child.pid, None)
            try:
                created, birth = psutil.Process(child.pid).create_time(), birth_of(child.pid)
                job = Job(run_dir, child.pid, created, birth=birth, folder=folder, began=began)
                job.save()
            except BaseException:  # an unrecorded process could not be stopped
                child.kill()
                raise
            return job

    def _reap(self) -> None:
        for pid, child in list(self._children.items()):
            if (code := child.poll()) is not None:
                self._exits[pid] = code
                self._children.pop(pid, None)


def settings_of(job: Job) -> dict[str, Any]:
    """Those that it was started with. Raises UserError for a file that holds none."""
    try:
        settings = json.loads(small_text(job.run_dir / processes.CONFIG_NAME))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"the settings of the run {job.name} cannot be read, so it cannot be resumed; start a new one"
        )
    return settings


KILLED_MOST = 3  # A run that is killed this many times without a new checkpoint counts as failed
TURN_SEC = 1.0
UNREADABLE = "its file in the queue cannot be read; add it once more"


class QueueTurns:
    """`take` does the next thing: record the end of a run, resume an interrupted one, or start the
    next."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.queue = jobs, queue.RunQueue(jobs.runs_dir)

    def take(self) -> None:
        """Does nothing while any run is in progress, or while another process holds the turn."""
        with self.queue.turn() as is_mine:
            if (
                not is_mine
                or self.jobs.current()
                or not (run := self.current() or self.queue.claim())
            ):
                return
            if not run.settings:
                self.queue.end(run, "failed", UNREADABLE)
                return
            job = Job.load(self.jobs.runs_dir / run.name)
            if not run.started or job is None or (job.began or job.created) < run.started - 1:
                self._start(run)
                return
            if not self.jobs.was_cut_off(job):
                state = self.jobs.state(job)
                self.queue.end(run, state.state, state.message)
                return
            is_killed = self.jobs.state(
                job
            ).state != "interrupted" and not processes.is_asked_to_stop(job.run_dir)
            killed = run.killed + is_killed
            killed = 0 if self._has_checkpoint_since(run.started, run) else killed
            if killed >= KILLED_MOST:
                self.queue.end(
                    run, "failed", f"it was killed {KILLED_MOST} times, perhaps for want of memory"
                )
            else:
                self._start(replace(run, killed=killed))

    def current(self) -> queue.QueuedRun | None:
        return next(iter(self.queue.started()), None)

    @property
    def is_empty(self) -> bool:
        return not (self.queue.started() or self.queue.waiting())

    def keep_on(self) -> None:
        """Call `take` every second while this process lives: a folder of runs that was deleted
        comes back."""
        while True:
            try:
                self.take()
            except Exception:  # such as a full disk: the next turn may succeed
                logger.exception("The queue's turn failed")
            time.sleep(TURN_SEC)

    def _start(self, run: queue.QueuedRun) -> None:
        """Start it, from the newest checkpoint if it has been started before."""
        run_dir = self.jobs.runs_dir / run.name
        try:
            queue.check_free(run_dir)
        except UserError:  # an unrecorded process trains there
            return
        since = 0.0 if run.is_new else run.queued  # the clock may be put back
        # before, another run wrote it
        goes_on = bool(run.started) and self._has_checkpoint_since(since, run)
        settings = run.settings | ({"resume_from_checkpoint": "latest"} if goes_on else {})
        self.queue.note(replace(run, started=time.time()))
        try:
            queue.refuse_links(run_dir, "--output_dir")
            self.jobs.start(run.name, settings, run.folder)
        # UserError is a ValueError; so is the error of an impossible path
        except (OSError, ValueError) as error:
            if not self.jobs.current():  # else another run was faster, and this one starts later
                self.queue.end(run, "failed", one_line(error))

    def _has_checkpoint_since(self, when: float, run: queue.QueuedRun) -> bool:
        newest = run_folder.RunDir(self.jobs.runs_dir / run.name).latest_checkpoint()
        return newest is not None and newest.stat().st_mtime >= when
