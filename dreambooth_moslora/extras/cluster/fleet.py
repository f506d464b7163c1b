"""A fleet from its list to its end; the cells of a study go the same way.

A fleet from its list to its end: missing subjects are trained, each on its own, and their ends are recorded.

The cells of a study as tasks of a cluster (`compare --ray_address`). They write the same result files as
without Ray.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dreambooth_moslora.core import UserError
from dreambooth_moslora.disk.queue import locked
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.extras.cluster.on_ray import Lost, Task, room_for, run_tasks
from dreambooth_moslora.extras.cluster.records import (
    Record,
    is_finished,
    read_record,
    stop_path,
    write_names,
    write_record,
)
from dreambooth_moslora.extras.cluster.sizing import GroupsUnderWay, Machines, grouped, names_of, plan_name
from dreambooth_moslora.extras.cluster.subjects import Subject, mark_of
from dreambooth_moslora.extras.cluster.worker import Group, Job, train_work
from dreambooth_moslora.extras.lab.run import run_cell
from dreambooth_moslora.extras.lab.study import Cell, Study
from dreambooth_moslora.settings.table import TrainConfig

NOT_SHARED = "{name} was trained elsewhere and is not here: --out must be a folder that all machines share"


@dataclass(frozen=True)
class Ending:
    """A subject has ended as `record` says. If `is_again`, its machine was lost and it starts again elsewhere."""

    name: str
    record: Record
    is_again: bool = False


@contextmanager
def begun(out: Path, subjects: Sequence[Subject]) -> Iterator[None]:
    """Hold a fleet's folder for the length of the block, and write its list of subjects.

    Raises UserError while another fleet holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "--out"):
        write_names(out, [subject.name for subject in subjects])
        stop_path(out).unlink(missing_ok=True)
        try:
            yield
        finally:
            stop_path(out).unlink(missing_ok=True)


def missing(out: Path, subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
    """The subjects that are not done with these settings and photos, each with its mark; a faulty subject's
    mark is empty."""
    found = []
    for subject in subjects:
        try:
            mark = "" if subject.error else mark_of(subject.settings)
        except (OSError, UserError) as error:
            subject, mark = replace(subject, error=str(error)), ""
        if not mark or not is_finished(out / subject.name, mark):
            found.append((subject, mark))
    return found


def run_fleet(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
    should_stop: Callable[[], bool] = bool,
    train: Callable[[Job | Group], Record | list[Record]] = train_work,
    check: Callable[[Path, Record | Lost], Record] | None = None,
    url: str = "",
) -> None:
    """Train all of `todo` (from `missing`) on the connected cluster; each subject ends with an `Ending`.

    Call it within `begun`. A worker calls `train`; `check` compares its answer with the files here (`checked`).
    If the run folders are behind a URL, `out` is a local view of `url` (`remote_output`).
    """

    def tell(name: str, result: Record | Lost) -> None:
        on_end(Ending(name, (check or checked)(out / name, result)))

    groups = GroupsUnderWay(tell)

    def stop() -> bool:
        groups.look()
        if should_stop():
            stop_path(out).touch()
        return stop_path(out).exists()

    def again(task: Task, reason: str) -> None:
        for name in names_of(task):
            on_end(Ending(name, Record("running", message=reason), is_again=True))

    tasks = grouped(tasks_of(todo, out, machines, on_end, url), machines, len(todo), room_for)
    for task, result in run_tasks(train, groups.noted(tasks), should_stop=stop, on_retry=again):
        for name, found in groups.untold(task, result):
            tell(name, found)


def tasks_of(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
    url: str = "",
) -> Iterator[Task]:
    """Make the tasks lazily, as there is room for them. A subject that cannot be trained ends here."""
    for subject, mark in todo:
        try:
            if subject.error:
                raise UserError(subject.error)
            config = TrainConfig.from_dict(subject.settings)
            needs = machines.resources_for(config)
        except UserError as error:
            on_end(Ending(subject.name, failed(out / subject.name, str(error))))
            continue
        plan = plan_name(config, machines.gpu_gib)
        settings = {**subject.settings, **({"memory": plan} if plan else {})}
        there = f"{url}/{subject.name}" if url else ""
        job = Job(str(out / subject.name), settings, mark, machines.cpus, needs.gpus, os.getcwd(), there)
        yield Task(subject.name, (job,), needs)


def checked(run_dir: Path, result: Record | Lost, reason: str = NOT_SHARED) -> Record:
    """The worker's answer, or a failure when its machine was lost or, for this `reason`, its adapter is not here."""
    if isinstance(result, Lost):
        return failed(run_dir, result.reason)
    if result.state == "done" and not RunDir(run_dir).adapter_path.is_file():
        return failed(run_dir, reason.format(name=run_dir.name))
    return result


def failed(run_dir: Path, reason: str) -> Record:
    """Record a failure for a subject that has no worker to record it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = replace(read_record(run_dir) or Record("failed"), state="failed", message=reason)
    write_record(run_dir, record)
    return record


@dataclass(frozen=True)
class CellRunner:
    """Replaces `studies.run.run_cells`: runs as many cells at once as the `machines` hold, or at most `jobs`.

    A worker calls `run` for each cell.
    """

    machines: Machines
    jobs: int | None = None
    run: Callable = run_cell

    def __call__(
        self, study: Study, cells: Sequence[Cell], ranks: Mapping[tuple[str, int], int], out: Path, _jobs: int
    ) -> Iterator[tuple[Cell, float, str]]:
        started, tasks = time.monotonic(), self.tasks(study, cells, ranks, out)
        for task, result in run_tasks(in_folder, tasks, window=self.jobs):
            yield (task.key, time.monotonic() - started, result.reason) if isinstance(result, Lost) else result

    def tasks(self, study: Study, cells: Sequence[Cell], ranks: Mapping, out: Path) -> Iterator[Task]:
        for cell in cells:
            rank = ranks[cell.arm, cell.rank]
            needs = self.machines.resources_for(study.config_of(cell, rank, out))
            jobs = self.jobs or min(len(cells), room_for(needs))
            yield Task(cell, (os.getcwd(), self.run, study, cell, rank, out, jobs), needs)


def in_folder(folder: str, run: Callable, *arguments: object) -> tuple[Cell, float, str]:
    """A study's paths are relative to the folder of the command, which must exist at the same place on all machines."""
    os.chdir(folder)
    return run(*arguments)
