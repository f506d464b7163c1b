"""Which subjects of a fleet share a process (`--per_gpu N`), and reports of each subject as it ends.

A cluster task is one subject, or with `--per_gpu` a group. Its key is the subject's name, or a tuple of names.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.fleet.cluster import Lost, Resources, Task
from dreambooth_moslora.fleet.group import Group
from dreambooth_moslora.fleet.records import Record, is_finished, read_record
from dreambooth_moslora.fleet.sizing import Machines
from dreambooth_moslora.fleet.worker import Job
from dreambooth_moslora.training.planning.sharing import needs_to_be_alone, shared_settings

__all__ = ["GroupsUnderWay", "grouped", "names_of", "results_of"]

MOST_ROUNDS = 8
LOOK_SEC = 2.0


def names_of(task: Task) -> tuple[str, ...]:
    """The names of the task's subjects."""
    return (task.key,) if isinstance(task.key, str) else task.key


def grouped(tasks: Iterable[Task], machines: Machines, total: int, room: Callable[[Resources], int]) -> Iterator[Task]:
    """With `--per_gpu N`, join subjects that can share their steps into tasks; a process trains N of a task at once.

    A task gets one machine's share of the `total` subjects, at most MOST_ROUNDS times N, so that a lost one
    costs little.
    """
    if (machines.per_gpu or 1) < 2:
        yield from tasks
        return
    waiting: dict[tuple, list[Task]] = {}
    sizes: dict[tuple, int] = {}
    for task in tasks:
        config = TrainConfig.from_dict(task.arguments[0].settings)
        at_once = 1 if needs_to_be_alone(config) else machines.at_once(config)
        if at_once == 1:
            yield task
            continue
        kind = shared_settings(config)
        if kind not in sizes:
            share = -(-total // room(machines.resources_for_group(config, at_once)))
            sizes[kind] = min(MOST_ROUNDS * at_once, share)
        found = waiting.setdefault(kind, [])
        found.append(task)
        if len(found) == sizes[kind]:
            yield as_group(waiting.pop(kind), machines)
    yield from (as_group(found, machines) for found in waiting.values())


def as_group(tasks: Sequence[Task], machines: Machines) -> Task:
    if len(tasks) == 1:
        return tasks[0]
    config = TrainConfig.from_dict(tasks[0].arguments[0].settings)
    at_once = min(machines.at_once(config), len(tasks))
    needs = machines.resources_for_group(config, at_once)
    jobs = tuple(replace(task.arguments[0], gpus=needs.gpus) for task in tasks)
    return Task(tuple(task.key for task in tasks), (Group(jobs, at_once),), needs)


def results_of(task: Task, result: Record | list[Record] | Lost) -> list[Record | Lost]:
    """One result per subject. A subject of a lost group may have finished before, and then keeps its record."""
    (work,) = task.arguments
    if isinstance(result, list):
        return result
    if not isinstance(work, Group):
        return [result]
    found = []
    for job in work.jobs:
        folder = Path(job.run_dir)
        found.append(read_record(folder) if is_finished(folder, job.mark) else result)
    return found


class GroupsUnderWay:
    """Reports each subject of a group as soon as it ends, since the group's task returns only after the last one."""

    def __init__(self, tell: Callable[[str, Record], None]):
        self.tell, self._looked = tell, time.monotonic()
        self._before: dict[str, tuple[Job, Record | None]] = {}

    def noted(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Pass the tasks on, after noting their groups' records as they are before the start."""
        for task in tasks:
            (work,) = task.arguments
            for name, job in zip(task.key, work.jobs, strict=True) if isinstance(work, Group) else ():
                self._before[name] = job, read_record(Path(job.run_dir))
            yield task

    def look(self) -> None:
        """Read the records of running groups every few seconds, and report the subjects that have ended."""
        if time.monotonic() - self._looked < LOOK_SEC:
            return
        self._looked = time.monotonic()
        for name, (job, before) in list(self._before.items()):
            record = read_record(Path(job.run_dir))
            if (
                record is not None
                and record != before
                and record.mark == job.mark
                and record.state in ("done", "failed")
            ):
                del self._before[name]
                self.tell(name, record)

    def untold(self, task: Task, result: Record | list[Record] | Lost) -> list[tuple[str, Record | Lost]]:
        """The results of the task's subjects that have not been reported yet."""
        found = list(zip(names_of(task), results_of(task, result), strict=True))
        if isinstance(task.arguments[0], Group):
            found = [(name, record) for name, record in found if self._before.pop(name, None) is not None]
        return found
