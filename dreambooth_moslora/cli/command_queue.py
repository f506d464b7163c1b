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
from dreambooth_moslora.base.machine import process_count
from dreambooth_moslora.cli.terminal import INTERRUPTED, StopRequest
from dreambooth_moslora.disk.paths import user_path
from dreambooth_moslora.disk.queue import QueuedRun, RunQueue
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.errors import UserError, spelled_out
from dreambooth_moslora.settings.table import TrainConfig

if TYPE_CHECKING:
    from dreambooth_moslora.ui.jobs import Job, QueueTurns

# The folder of the runs by default
RUNS = "runs"
EPILOG = """examples:
  queue                    what is trained now, what waits, and how the last ones ended
  queue start              train them one after the other; Ctrl-C saves, and the next start goes on
                           from there
  queue stop               the run that is trained now saves and leaves the queue; the next begins
  queue move dog first     or up, down, last, or a number
  queue remove dog"""
PAUSED = "paused on the page: no next run starts until Go on there, or `queue start`"
NOTHING = "nothing waits; `train … --queue` adds a run"
# How many of the last ended runs are listed
ENDED_SHOWN = 10
# Seconds between two looks at the run that is trained, which is another process
POLL_SEC = 0.5
# Seconds between two lines of progress when the output is a file
PLAIN_INTERVAL_SEC = 30.0


def queue_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    about = "list (default), start, stop, move NAME PLACE, or remove NAME"
    parser.add_argument("words", metavar="WHAT", nargs="*", default=["list"], help=about)
    parser.add_argument(
        "--runs_dir", metavar="DIR", default=RUNS, help=f"folder of the runs (default: {RUNS})"
    )


def run_queue(args: argparse.Namespace) -> int:
    """Do what the words say. Raises UserError."""
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
            job = live_job(turns, turns.current())
            if job is None:
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
            said = " ".join(args.words)
            known = "list, start, stop, move NAME PLACE, or remove NAME"
            raise UserError(f"queue {said}: say {known}.")
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

    # All that training would refuse: nobody may be there when its turn comes.
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

    # The folder reserves the name: the next `train` of the same word chooses another one.
    is_new = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    queued = QueuedRun(
        run_dir.name,
        folder=os.getcwd(),
        argv=tuple(argv),
        settings=config.to_dict(),
        is_new=is_new,
        queued=time.time(),
    )
    try:
        place = RunQueue(run_dir.parent).add(queued)
    except BaseException:
        if is_new:
            with suppress(OSError):
                run_dir.rmdir()
        raise

    start = "queue start"
    if run_dir.parent != Path(os.path.abspath(RUNS)):
        start += f" --runs_dir {shlex.quote(str(run_dir.parent))}"
    return f"{run_dir.name} waits, number {place} in the queue; `{start}` or the page trains it"


def lines_of(turns: "QueueTurns") -> list[str]:
    """The last ended runs, the one that is trained now, those that wait, and whether it pauses."""
    lines = [f"ended: {ending(event)}" for event in turns.queue.ended()[-ENDED_SHOWN:]]

    # A started run without a live process was cut off, as by a power failure.
    for queued in turns.queue.started():
        job = live_job(turns, queued)
        if job is None:
            said = "interrupted; its next turn resumes it"
        else:
            state = turns.jobs.state(job)
            said = "starting"
            if state.max_train_steps:
                said = f"step {state.step} of {state.max_train_steps}"
        lines.append(f"now: {queued.name}, {said}")

    for number, queued in enumerate(turns.queue.waiting(), 1):
        unsaid = "added on the page" if queued.settings else "its file cannot be read"
        said = shlex.join(queued.argv) or unsaid
        lines.append(f"{number:>3}  {queued.name}  {said}")

    if turns.queue.is_paused:
        lines.append(PAUSED)
    if turns.is_empty:
        lines.append(NOTHING)
    return lines


def ending(event: dict[str, Any]) -> str:
    """How a run of the queue ended."""
    said = f"{event.get('name')} {event.get('state')}"
    message = str(event.get("message") or "")
    return f"{said}: {message}" if message else said


def live_job(turns: "QueueTurns", queued: QueuedRun | None) -> "Job | None":
    """The process that trains the run; None if there is none, or it has ended."""
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
    failed = 0
    bar = Bar()
    with StopRequest() as stop:
        while not (turns.is_empty or stop()):
            # Start the next run when none is trained; each is a process of its own.
            turns.take()

            # Say how runs ended since the last look.
            for event in turns.queue.ended()[told:]:
                bar.close()
                print(spelled_out(ending(event)), file=sys.stderr)
                told += 1
                failed += event.get("state") == "failed"
            bar.show(turns)
            time.sleep(POLL_SEC)
        bar.close()

        # The current run saves, and stays first in the queue.
        if stop():
            job = live_job(turns, turns.current())
            if job is not None:
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
        self.name = ""  # of its run
        self.bar: tqdm | None = None

    def show(self, turns: "QueueTurns") -> None:
        """Bring it up to date. It begins anew with the next run."""
        queued = turns.current()
        job = live_job(turns, queued)
        state = turns.jobs.state(job) if job else None
        if state is None or not state.max_train_steps:
            return
        if self.name != queued.name:
            self.close()
            self.name = queued.name
            self.bar = tqdm(
                total=state.max_train_steps,
                initial=state.step,
                desc=spelled_out(queued.name),
                unit="step",
                mininterval=0.2 if sys.stderr.isatty() else PLAIN_INTERVAL_SEC,
            )
        self.bar.update(state.step - self.bar.n)

    def close(self) -> None:
        """End it, if there is one."""
        if self.bar is not None:
            self.bar.close()
        self.name = ""
        self.bar = None
