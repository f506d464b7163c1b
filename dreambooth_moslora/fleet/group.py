"""Several subjects in one process on one machine: they share a base and train together.

The process is `python -m dreambooth_moslora together`. It writes each subject's record as the subject begins
and ends. This module writes the records of subjects that the process did not live to end.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_moslora.core.errors import UserError
from dreambooth_moslora.core.run_files.job_endings import why_it_ended
from dreambooth_moslora.core.run_files.training_process import log_tail, write_settings
from dreambooth_moslora.fleet.records import Record, is_finished, read_record, stop_path, write_record
from dreambooth_moslora.fleet.worker import (
    KILLED_MOST,
    Job,
    ended,
    goes_on,
    held_for_training,
    start_guarded,
    train_subject,
    unit_of,
    watch,
)

__all__ = ["Group", "train_group", "train_work"]

ENDED = ("done", "failed", "interrupted")


@dataclass(frozen=True)
class Group:
    """Subjects for one worker; at most `at_once` of them train at once. Each has the same share of a machine."""

    jobs: tuple[Job, ...]
    at_once: int


def train_work(work: Job | Group) -> Record | list[Record]:
    """Train a worker's task: one subject or a group."""
    return train_group(work) if isinstance(work, Group) else train_subject(work)


def train_group(group: Group) -> list[Record]:
    """Train all subjects to their ends, or until the fleet is told to stop. The records are in the order of `jobs`."""
    with ExitStack() as stack:
        jobs, holds = [], []
        for job in group.jobs:
            if is_finished(Path(job.run_dir), job.mark):  # its machine was lost after it had finished
                continue
            Path(job.run_dir).mkdir(parents=True, exist_ok=True)
            try:
                holds.append(stack.enter_context(held_for_training(Path(job.run_dir))).fileno())
            except UserError as error:
                ended(job, "failed", str(error))
            else:
                enter(job)
                jobs.append(job)
        train_to_their_ends(jobs, group.at_once, tuple(holds))
    return [read_record(Path(job.run_dir)) or Record("failed", job.mark) for job in group.jobs]


def enter(job: Job) -> None:
    """Write a subject's record before it trains here. What it has cost so far is kept."""
    run_dir = Path(job.run_dir)
    before = read_record(run_dir)
    known = before if goes_on(before, job) else Record("waiting", job.mark)
    write_record(run_dir, replace(known, state="waiting", message="", unit=unit_of(job)))


def train_to_their_ends(jobs: Sequence[Job], at_once: int, holds: tuple[int, ...]) -> None:
    """Run the process; if it is killed, start it again for the unfinished subjects, a few times."""
    left, code = list(jobs), 0
    for _ in range(KILLED_MOST):
        if not left:
            return
        if stop_path(Path(left[0].run_dir).parent).exists():
            for job in left:
                ended(job, "interrupted", "stopped before it began")
            return
        code = train_once(left, at_once, holds)
        first, left = left[0], [job for job in left if not has_ended(job)]
        if code >= 0:
            break
    was_asked = bool(left) and stop_path(Path(left[0].run_dir).parent).exists()
    for job in left:
        reason = why_it_ended(code, log_tail(Path(first.run_dir)), was_asked=was_asked)
        ended(job, "interrupted" if was_asked else "failed", "" if was_asked else reason)


def train_once(jobs: Sequence[Job], at_once: int, holds: tuple[int, ...]) -> int:
    """Returns the exit status; it is negative for a signal."""
    for job in jobs:
        resumed = {"resume_from_checkpoint": "latest"} if read_record(Path(job.run_dir)).starts else {}
        write_settings(Path(job.run_dir), {**job.settings, **resumed})
    share = jobs[0].gpus or jobs[0].cpus
    words = ("together", "--at_once", str(at_once), "--share", str(share), *(job.run_dir for job in jobs))
    return watch(start_guarded(jobs[0], words, holds), stop_path(Path(jobs[0].run_dir).parent))


def has_ended(job: Job) -> bool:
    record = read_record(Path(job.run_dir))
    return record is not None and record.state in ENDED
