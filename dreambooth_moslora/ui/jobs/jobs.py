"""Training runs as processes of the server: they go on when the page is closed or the app is restarted.

`runs/<name>/job.json` names the process and its owner; `metrics.jsonl` has the progress. A signal stops a run:
the trainer finishes its step and writes a checkpoint.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.job_endings import was_killed, why_it_ended
from dreambooth_moslora.core.run_files.run_folder import RunDir
from dreambooth_moslora.core.run_files.training_process import CONFIG_NAME, TRAIN, start_training, write_settings
from dreambooth_moslora.ui.jobs.job import JOB_NAME, Job, birth_of
from dreambooth_moslora.ui.jobs.run_events import RunEvents, phase_of

__all__ = ["JobState", "Jobs", "run_name_of", "settings_of"]

KILL_AFTER_SEC = 30
RUN_NAME = re.compile(r"[^\W_][\w +-]*(\.[\w +-]+)*")
"""Letters, digits, space and `+-_`, with single dots between: no separator, no leading dot."""
MAX_RUN_NAME = 60
ACTIVE = ("starting", "running", "stopping")


@dataclass(frozen=True)
class JobState:
    """`state`: starting, running, stopping, done, interrupted, failed. `phase` is what the trainer does now."""

    state: str
    step: int
    max_train_steps: int
    phase: str
    message: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


def run_name_of(text: str) -> str:
    """Turn any text into a valid RUN_NAME: spaces and forbidden characters become dashes."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^\w.+-]+", "-", text))
    return re.sub(r"^[\W_]+", "", name)[:MAX_RUN_NAME].rstrip(".-") or "run"


class Jobs:
    """The runs under `runs_dir`. One process at a time; only its owner may stop it.

    `make_room` is a context manager around the start of a process.
    """

    def __init__(
        self,
        runs_dir: Path,
        script: Path | None = None,
        make_room: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.runs_dir, self.script, self._make_room = runs_dir, script, make_room
        self.public_names = {f"{runs_dir}/": ""}  # text in messages -> its replacement for visitors
        self._children: dict[int, subprocess.Popen] = {}
        self._exits: dict[int, int] = {}
        self._asked: dict[int, float] = {}  # process -> when it was asked to stop
        self._metrics: dict[Path, RunEvents] = {}
        self._lock = threading.Lock()

    def told(self, text: str) -> str:
        """The text without folders of this machine, which visitors should not see."""
        for place, name in self.public_names.items():
            text = text.replace(place, name)
        return text

    def start(self, name: str, config: dict[str, Any], owner: str, folder: str = "") -> Job:
        """Start training into `runs_dir`/`name`. Raises UserError while another run is going on."""
        run_dir = self.run_dir(name)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_settings(run_dir, config)
        return self._launch(run_dir, owner, folder)

    def resume(self, name: str, owner: str) -> Job:
        """Resume from the last checkpoint. Raises UserError when the run is another's or is going on."""
        job = self.owned(name, owner)
        if job.is_alive:
            raise UserError(f"the run {job.name} is still going on")
        config = settings_of(job) | {"resume_from_checkpoint": "latest"}
        write_settings(job.run_dir, config)
        return self._launch(job.run_dir, owner, job.folder)

    def stop(self, name: str, owner: str) -> Job:
        """Ask the trainer to end with a checkpoint; when called again after 30 s, kill it with its children.
        Raises UserError."""
        job = self.owned(name, owner)
        if not job.is_alive:
            raise UserError(f"the run {job.name} has already ended")
        if job.stop_asked and time.time() - job.stop_asked > KILL_AFTER_SEC:
            _kill_tree(job.pid)
            return job
        if not job.stop_asked:
            os.kill(job.pid, signal.SIGTERM)
            job = replace(job, stop_asked=self._asked.setdefault(job.pid, time.time()))
            with suppress(OSError):  # a full disk: this process remembers the request
                job.save()
        return job

    def owned(self, name: str, owner: str) -> Job:
        """The visitor's run. Raises the same UserError for a missing run and for another visitor's."""
        job = Job.load(self.run_dir(name))
        if job is None or job.owner != owner:
            raise UserError(f"you have no run called {name!r:.60}")
        return replace(job, stop_asked=job.stop_asked or self._asked.get(job.pid, 0.0))

    def run_dir(self, name: str) -> Path:
        """The run's folder. Raises UserError for a name that would leave `runs_dir`."""
        if name == "":
            raise UserError("choose a run; '' cannot be the name of a run")
        if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
            raise UserError(f"{name!r:.60} cannot be the name of a run")
        return self.runs_dir / name

    def all(self) -> list[Job]:
        """All runs, the newest first."""
        folders = sorted(self.runs_dir.glob(f"*/{JOB_NAME}"), key=lambda path: -path.stat().st_mtime)
        return [job for folder in folders if (job := Job.load(folder.parent))]

    def of(self, owner: str) -> list[Job]:
        return [job for job in self.all() if job.owner == owner]

    def current(self) -> Job | None:
        """The run in progress, whoever owns it."""
        self._reap()
        return next((job for job in self.all() if job.is_alive), None)

    def metrics(self, job: Job) -> RunEvents:
        with self._lock:
            path = RunDir(job.run_dir).metrics_path
            return self._metrics.setdefault(path, RunEvents(path)).refresh()

    def state(self, job: Job) -> JobState:
        alive = job.is_alive  # read before the metrics, which are complete once the process has ended
        self._reap()
        metrics = self.metrics(job)
        events = self._events_of(job)
        by_kind = {event.get("type"): event for event in events}
        end = by_kind.get("end", {})
        if alive:
            state = "stopping" if job.stop_asked else "running" if events else "starting"
        else:
            state = end.get("state") or ("interrupted" if self._was_stopped_early(job) else "failed")
        is_starting = alive and not events  # the file still belongs to an earlier start
        done = [] if is_starting else [*metrics.of("step")[-1:], *events]
        step = max((int(event.get("step") or 0) for event in done), default=0)
        total = int(metrics.last("start").get("max_train_steps") or 0)
        message = str(end.get("message") or "") or ("" if end or alive else self._why_it_ended(job))
        return JobState(state, step, total, phase_of(events), message)

    def _was_stopped_early(self, job: Job) -> bool:
        """Whether its owner stopped it before it could record its end."""
        return bool(job.stop_asked) and self._exits.get(job.pid) == -signal.SIGTERM

    def was_cut_off(self, job: Job) -> bool:
        """Whether it neither ended itself nor was stopped by its owner: it was killed, or its machine went down."""
        if job.is_alive or job.stop_asked or job.pid in self._asked:
            return False
        self._reap()
        ends = [event.get("state") for event in self._events_of(job) if event.get("type") == "end"]
        return ends[-1] == "interrupted" if ends else was_killed(self._exits.get(job.pid), job.log_tail())

    def _events_of(self, job: Job) -> list[dict[str, Any]]:
        """Events of its last start."""
        events = self.metrics(job).since_start()
        return [event for event in events if (event.get("time") or 0) >= job.created - 1]

    def _why_it_ended(self, job: Job) -> str:
        return why_it_ended(self._exits.get(job.pid), job.log_tail(), was_asked=bool(job.stop_asked))

    def _launch(self, run_dir: Path, owner: str, folder: str) -> Job:
        with self._make_room(), self._lock:
            if running := self.current():
                whose = "your run " + running.name if running.owner == owner else "another visitor's run"
                raise UserError(f"{whose} is going on; one run at a time")
            child = self._spawn(run_dir, folder)
            self._children[child.pid] = child
            self._exits.pop(child.pid, None)
            self._asked.pop(child.pid, None)
            try:
                created, birth = psutil.Process(child.pid).create_time(), birth_of(child.pid)
                job = Job(run_dir, owner, child.pid, created, birth=birth, folder=folder)
                job.save()
            except BaseException:  # an unrecorded process could not be stopped
                child.kill()
                raise
            return job

    def _spawn(self, run_dir: Path, folder: str) -> subprocess.Popen:
        command = TRAIN if self.script is None else [str(self.script)]
        return start_training(run_dir, command, folder=folder or None)

    def _reap(self) -> None:
        for pid, child in list(self._children.items()):
            if (code := child.poll()) is not None:
                self._exits[pid] = code
                self._children.pop(pid, None)


def settings_of(job: Job) -> dict[str, Any]:
    """Those that it was started with. Raises UserError for a file that holds none."""
    try:
        settings = json.loads((job.run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"the settings of the run {job.name} cannot be read, so it cannot be resumed; start a new one")
    return settings


def _kill_tree(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            process.kill()
    except psutil.Error:
        return
