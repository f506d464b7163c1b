"""`queue`: the runs that wait, which `train … --queue` and the page add."""

import argparse
import os
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dreambooth_moslora.base.base import Base
from dreambooth_moslora.cli.terminal import INTERRUPTED, StopRequest
from dreambooth_moslora.disk.paths import user_path
from dreambooth_moslora.disk.queue import QueuedRun, RunQueue
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.launch import process_count
from dreambooth_moslora.settings.table import TrainConfig

if TYPE_CHECKING:
    from dreambooth_moslora.ui.jobs import Job, QueueTurns

RUNS = "runs"
EPILOG = """examples:
  queue                    what is trained now, what waits, and how the last ones ended
  queue start              train them one after the other; Ctrl-C saves, and the next start goes on from there
  queue stop               the run that is trained now saves and leaves the queue; the next begins
  queue move dog first     or up, down, last, or a number
  queue remove dog"""
PAUSED = "paused on the page: no next run starts until Go on there, or `queue start`"
NOTHING = "nothing waits; `train … --queue` adds a run"
ENDED_SHOWN = 10
POLL_SEC = 0.5
PLAIN_INTERVAL_SEC = 30.0  # Seconds between two lines of progress when the output is a file.


def queue_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    about = "list (default), start, stop, move NAME PLACE, or remove NAME"
    parser.add_argument("words", metavar="WHAT", nargs="*", default=["list"], help=about)
    parser.add_argument(
        "--runs_dir", metavar="DIR", default=RUNS, help=f"folder of the runs (default: {RUNS})"
    )


def run_queue(args: argparse.Namespace) -> int:
    from dreambooth_moslora.ui.jobs import Jobs, QueueTurns

    turns = QueueTurns(Jobs(Path(os.path.abspath(user_path(args.runs_dir)))))
    match args.words:
        case ["move" | "remove", *_] if not turns.jobs.runs_dir.is_dir():
            raise UserError(f"--runs_dir {args.runs_dir}: there is no such folder.")
        case ["list"] | []:
            print(spelled_out("\n".join(lines_of(turns))))
        case ["start"]:
            return train_all(turns)
        case ["stop"]:
            if (job := live_job(turns, turns.current())) is None:
                raise UserError("no run of the queue is trained now; `queue` lists those that wait")
            turns.jobs.stop(job.name)
            said = f"{job.name} finishes its step, saves and leaves the queue"
            print(spelled_out(f"{said}; its checkpoint stays in {job.run_dir}"))
        case ["move", name, place]:
            turns.queue.move(name, place)
            print(spelled_out("\n".join(lines_of(turns))))
        case ["remove", name]:
            turns.queue.remove(name)
            print(spelled_out(f"{name} was removed from the queue"))
        case _:
            raise UserError(
                f"queue {' '.join(args.words)}: say list, start, stop, move NAME PLACE, or remove NAME."
            )
    return 0


def enqueue(config: TrainConfig, argv: list[str]) -> str:
    """Check the run and queue it; returns a line to print. Raises UserError for whatever training
    would refuse."""
    from dreambooth_moslora.photos.folder import photo_report
    from dreambooth_moslora.plan.checks import check_folders, check_settings, family_settings
    from dreambooth_moslora.training.dry_run import made_lines
    from dreambooth_moslora.ui.jobs import Jobs

    if process_count() > 1:
        raise UserError("--queue: its runs are one process each; start it without a launcher.")
    if config.hub_token:
        raise UserError(
            "--hub_token: it would lie in the queue's file; log in instead (`hf auth login`)."
        )
    check_folders(config)
    base = Base.of(config)
    trained = replace(config, **family_settings(config, base))
    check_settings(trained, base)
    if config.resume_from_checkpoint:
        from dreambooth_moslora.training.checkpoint import resume_point

        resume_point(trained, RunDir(config.output_dir))
    made_lines(config, photo_report(config))  # no word may say what to look for
    run_dir = Path(os.path.abspath(config.output_dir))
    Jobs(run_dir.parent).run_dir(run_dir.name)
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)  # so that the next `train` chooses another name
    facts = {"folder": os.getcwd(), "argv": tuple(argv), "settings": config.to_dict()}
    try:
        place = RunQueue(run_dir.parent).add(
            QueuedRun(run_dir.name, is_new=is_new, queued=time.time(), **facts)
        )
    except BaseException:
        if is_new:
            with suppress(OSError):
                run_dir.rmdir()
        raise
    is_usual = run_dir.parent == Path(os.path.abspath(RUNS))
    start = "queue start" + ("" if is_usual else f" --runs_dir {shlex.quote(str(run_dir.parent))}")
    return f"{run_dir.name} waits, number {place} in the queue; `{start}` or the page trains it"


def lines_of(turns: "QueueTurns") -> list[str]:
    lines = [f"ended: {line}" for line in map(ending, turns.queue.ended()[-ENDED_SHOWN:])]
    for queued in turns.queue.started():
        job, said = live_job(turns, queued), "interrupted; its next turn resumes it"
        if job is not None:
            state = turns.jobs.state(job)
            said = (
                f"step {state.step} of {state.max_train_steps}"
                if state.max_train_steps
                else "starting"
            )
        lines.append(f"now: {queued.name}, {said}")
    for number, queued in enumerate(turns.queue.waiting(), 1):
        unsaid = "added on the page" if queued.settings else "its file cannot be read"
        said = shlex.join(queued.argv) or unsaid
        lines.append(f"{number:>3}  {queued.name}  {said}")
    lines += [PAUSED] * turns.queue.is_paused
    return lines if not turns.is_empty else [*lines, NOTHING]


def ending(event: dict[str, Any]) -> str:
    message = str(event.get("message") or "")
    return f"{event.get('name')} {event.get('state')}" + (f": {message}" if message else "")


def live_job(turns: "QueueTurns", queued: QueuedRun | None) -> "Job | None":
    from dreambooth_moslora.ui.jobs import Job

    job = Job.load(turns.jobs.runs_dir / queued.name) if queued else None
    return job if job is not None and job.is_alive else None


def train_all(turns: "QueueTurns") -> int:
    """Train until the queue is empty, and end a pause. Returns 0, 1 when some failed, 130 when
    stopped."""
    turns.queue.pause(False)
    if turns.is_empty:
        print(NOTHING, file=sys.stderr)
    told = len(turns.queue.ended())
    failed, bar = 0, Bar()
    with StopRequest() as stop:
        while not (turns.is_empty or stop()):
            turns.take()
            for event in turns.queue.ended()[told:]:
                bar.close()
                print(spelled_out(ending(event)), file=sys.stderr)
                told, failed = told + 1, failed + (event.get("state") == "failed")
            bar.show(turns)
            time.sleep(POLL_SEC)
        bar.close()
        if stop():  # the current run saves and stays first in the queue
            if (job := live_job(turns, turns.current())) is not None:
                turns.jobs.ask_to_stop(job)
                while job.is_alive:
                    turns.jobs.current()  # reaps an ended child, and ends one that does not answer
                    time.sleep(POLL_SEC)
            print("stopped; `queue start` continues", file=sys.stderr)
            return INTERRUPTED
    return 1 if failed else 0


class Bar:
    """Progress of the current run, with the remaining time."""

    def __init__(self) -> None:
        self.name, self.bar = "", None

    def show(self, turns: "QueueTurns") -> None:
        queued = turns.current()
        job = live_job(turns, queued)
        state = turns.jobs.state(job) if job else None
        if state is None or not state.max_train_steps:
            return
        if self.name != queued.name:
            self.close()
            interval = 0.2 if sys.stderr.isatty() else PLAIN_INTERVAL_SEC
            options = {"unit": "step", "initial": state.step, "mininterval": interval}
            self.name = queued.name
            self.bar = tqdm(total=state.max_train_steps, desc=spelled_out(queued.name), **options)
        self.bar.update(state.step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.name, self.bar = "", None
