"""A fleet from its list to its end.

Missing subjects are trained, each on its own, and their ends are recorded. What a training needs of
a machine is known by the estimate of `--dry_run`. A cluster task is one subject, or with `--per_gpu
N` a group: runs that can share their steps (`together`), as they are on one base with micro-batches
of one shape. Its key is the subject's name, or a tuple of names.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.base import machine
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import ray_fleet, records, worker
from dreambooth_moslora.extras.cluster.fleet_subjects import Subject, mark_of
from dreambooth_moslora.plan import checks, memory
from dreambooth_moslora.settings import optimizer_kinds, table

ALIKE_GROUPS = ("base model", "adapter", "memory and speed")
"""Groups of settings in which runs must agree to share their steps."""
ALIKE = (
    "resolution",
    "with_prior_preservation",
    "prior",
    "train_batch_size",
    "gradient_accumulation_steps",
    "do_edm_style_training",
    "guidance_scale",
    "max_sequence_length",
)
"""Settings of other groups in which they must agree, too."""
OWN = ("init_adapter", "mixer_lr_scale", "dataloader_num_workers")
"""Settings in ALIKE_GROUPS that may nevertheless differ between runs."""


def needs_to_be_alone(config: table.TrainConfig) -> str | None:
    """The flag that keeps a run from sharing steps with any other; None when there is none."""
    caches_attention = config.cache_cross_attention or "cached" in (config.memory or "")
    reasons = {
        "--train_text_encoder": config.train_text_encoder,
        "--train_text_encoder_ti": config.train_text_encoder_ti,
        "--use_dora": config.use_dora,
        "--lora_dropout": config.lora_dropout > 0,
        "--enable_bucket": config.enable_bucket,
        "--caching off": config.caching == "off",
        "--base_quantization int8": config.base_quantization == "int8",
        "--compile on": config.compile == "on",
        "--prior_every": config.prior_every > 1,
        "--cache_cross_attention": caches_attention,
    }
    return next((flag for flag, is_given in reasons.items() if is_given), None)


def shared_settings(config: table.TrainConfig) -> tuple[object, ...]:
    """The values of the settings in which runs must agree to share their steps."""
    found = []
    for item in fields(config):
        if item.metadata["group"] in ALIKE_GROUPS and item.name not in OWN:
            found.append(item.name)
    return tuple(getattr(config, name) for name in (*found, *ALIKE))


PROCESS_GIB = 0.5
"""Memory of the libraries, beside the estimate's tensors."""
SHARED_PLANS = tuple(
    name for name, plan in table.PLANS.items() if "cache_cross_attention" not in plan
)
"""The plans of `--memory auto` with which runs can share a base."""


@dataclass(frozen=True)
class Machines:
    """A cluster's machines, and what the user says of them.

    gpu_gib: memory of one GPU; None when the fleet trains on CPUs
    node_gib: memory of the largest machine
    per_gpu: trainings at once on a GPU; None for as many as fit
    cpus: cores of each training
    """

    gpu_gib: float | None
    node_gib: float
    per_gpu: int | None = None
    cpus: int = 1

    @classmethod
    def of_cluster(cls, per_gpu: int | None = None, cpus: int = 1) -> "Machines":
        """Those of the connected Ray cluster; all GPUs are assumed alike."""
        import ray

        # this process may have no GPU: a tiny task asks on a machine that has one
        @ray.remote(num_cpus=0, num_gpus=0.01)
        def own_gpu_bytes() -> int:
            import torch

            return torch.cuda.get_device_properties(0).total_memory

        gpu_gib = ray.get(own_gpu_bytes.remote()) / machine.GIB if ray_fleet.has_gpus() else None

        # RAM that Ray may give to tasks
        rooms = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
        return cls(
            gpu_gib=gpu_gib,
            node_gib=max(rooms, default=0) / machine.GIB,
            per_gpu=per_gpu,
            cpus=cpus,
        )

    def resources_for(self, config: table.TrainConfig) -> ray_fleet.Resources:
        """What one training asks for, at most the largest machine. Raises UserError for a damaged
        base."""
        # the peak by the memory plan that it will have
        plan = plan_name(config, self.gpu_gib) or "full"
        planned = replace(config, **memory.plan_settings(config, plan))
        need = memory.estimate(planned, base_size(config), 1).peak_gib

        # on CPUs its memory, on a GPU its share
        if self.gpu_gib is None:
            return ray_fleet.Resources(self.cpus, memory_gib=min(need + PROCESS_GIB, self.node_gib))
        count = self.per_gpu or max(1, int(memory.USABLE * self.gpu_gib / need))
        return ray_fleet.Resources(self.cpus, gpus=int(10_000 / count) / 10_000)

    def at_once(self, config: table.TrainConfig) -> int:
        """How many such trainings share a process: `per_gpu`, or fewer if the GPU is too small.
        Raises UserError."""
        count = self.per_gpu or 1
        if self.gpu_gib is None:
            return count
        while count > 1 and group_gib(config, count) > memory.USABLE * self.gpu_gib:
            count -= 1
        return count

    def resources_for_group(self, config: table.TrainConfig, at_once: int) -> ray_fleet.Resources:
        """What `at_once` such trainings in one process ask for: a whole GPU, or cores and memory.
        Raises UserError."""
        if self.gpu_gib is not None:
            return ray_fleet.Resources(self.cpus, gpus=1.0)
        need = group_gib(config, at_once)
        return ray_fleet.Resources(self.cpus, memory_gib=min(need + PROCESS_GIB, self.node_gib))


def group_gib(config: table.TrainConfig, count: int) -> float:
    """Peak memory of one base with `count` adapters, for a step on the rows of all, GiB."""
    # one run with as many rows, which has one of the adapters
    joint = replace(config, train_batch_size=config.train_batch_size * count)
    of_one = memory.estimate(joint, base_size(config), 1)

    # the other adapters, with their gradients and moments
    bytes_each = optimizer_kinds.optimizer_of(config).bytes_each
    of_others = (count - 1) * of_one.adapter_parameters * bytes_each
    return of_one.peak_gib + of_others / machine.GIB


def plan_name(config: table.TrainConfig, gpu_gib: float | None) -> str | None:
    """The memory plan that `--memory` means on these machines; None when it was not given."""
    if config.memory != "auto":
        return config.memory
    return memory.fitting(config, base_size(config), gpu_gib, SHARED_PLANS)


def base_size(config: table.TrainConfig) -> memory.BaseSize:
    """The size of the run's base with the layers that it adapts. Raises UserError."""
    return size_of(Base.of(config), config.target_modules, config.lora_blocks)


@lru_cache(maxsize=32)
def size_of(
    base: Base, target_modules: tuple[str, ...], lora_blocks: tuple[str, ...]
) -> memory.BaseSize:
    """The size of a base with its family's layers, or those named. Its files are opened once.
    Raises UserError."""
    base.check()
    config = table.TrainConfig(target_modules=target_modules, lora_blocks=lora_blocks)
    targets = checks.family_settings(config, base).get("target_modules", target_modules)
    return memory.size_of_base(base, targets)


MOST_ROUNDS = 8
"""Subjects of a group for each that its process trains at once."""
LOOK_SEC = 2.0
"""Seconds between two looks at the records of running groups."""


def grouped(
    tasks: Iterable[ray_fleet.Task],
    machines: Machines,
    total: int,
    room: Callable[[ray_fleet.Resources], int],
) -> Iterator[ray_fleet.Task]:
    """With `--per_gpu N`, join subjects that can share their steps into tasks; a process trains N
    of a task at once. A task gets one machine's share of the `total` subjects, at most MOST_ROUNDS
    times N: a lost one costs little.

    tasks: of one subject each
    total: number of subjects
    room: how many tasks with such needs the cluster holds at once
    """
    if (machines.per_gpu or 1) < 2:
        yield from tasks
        return
    waiting: dict[tuple, list[ray_fleet.Task]] = defaultdict(list)  # by what they must agree in
    sizes: dict[tuple, int] = {}
    for task in tasks:
        config = table.TrainConfig.from_dict(task.arguments[0].settings)
        at_once = 1 if needs_to_be_alone(config) else machines.at_once(config)
        if at_once == 1:
            yield task
            continue
        # the size of a group, known from the first of its kind
        kind = shared_settings(config)
        if kind not in sizes:
            share = -(-total // room(machines.resources_for_group(config, at_once)))
            sizes[kind] = min(MOST_ROUNDS * at_once, share)
        # a full group goes at once
        waiting[kind].append(task)
        if len(waiting[kind]) == sizes[kind]:
            yield as_group(waiting.pop(kind), machines)
    for found in waiting.values():
        yield as_group(found, machines)


def as_group(tasks: Sequence[ray_fleet.Task], machines: Machines) -> ray_fleet.Task:
    """One task of several; one alone stays what it is."""
    if len(tasks) == 1:
        return tasks[0]
    config = table.TrainConfig.from_dict(tasks[0].arguments[0].settings)
    at_once = min(machines.at_once(config), len(tasks))
    needs = machines.resources_for_group(config, at_once)
    jobs = tuple(replace(task.arguments[0], gpus=needs.gpus) for task in tasks)
    return ray_fleet.Task(
        key=tuple(task.key for task in tasks),
        arguments=(worker.Group(jobs, at_once),),
        resources=needs,
    )


class GroupsUnderWay:
    """Reports each subject of a group as soon as it ends, since the group's task returns only after
    the last one."""

    def __init__(self, tell: Callable[[str, records.Record], None]):
        self.tell = tell
        self._looked = time.monotonic()
        # name -> job and record before the start, of subjects that have not been reported
        self._before: dict[str, tuple[worker.Job, records.Record | None]] = {}

    def noted(self, tasks: Iterable[ray_fleet.Task]) -> Iterator[ray_fleet.Task]:
        """Pass the tasks on, after noting their groups' records as they are before the start."""
        for task in tasks:
            (work,) = task.arguments
            if isinstance(work, worker.Group):
                for name, job in zip(task.key, work.jobs, strict=True):
                    self._before[name] = job, records.read_record(Path(job.run_dir))
            yield task

    def look(self) -> None:
        """Read the records of running groups every few seconds, and report the subjects that have
        ended."""
        if time.monotonic() - self._looked < LOOK_SEC:
            return
        self._looked = time.monotonic()
        for name, (job, before) in list(self._before.items()):
            record = records.read_record(Path(job.run_dir))
            # the record of an earlier training does not count
            is_own = record is not None and record != before and record.mark == job.mark
            if is_own and record.state in ("done", "failed"):
                del self._before[name]
                self.tell(name, record)

    def untold(
        self, task: ray_fleet.Task, result: records.Record | list[records.Record] | ray_fleet.Lost
    ) -> list[tuple[str, records.Record | ray_fleet.Lost]]:
        """The results that have not been reported; one of a lost group may have finished before."""
        work = task.arguments[0]
        if not isinstance(work, worker.Group):
            return [(task.key, result)]
        found = []
        for number, (name, job) in enumerate(zip(task.key, work.jobs, strict=True)):
            if self._before.pop(name, None) is None:
                continue
            record = result[number] if isinstance(result, list) else result
            folder = Path(job.run_dir)
            if isinstance(record, ray_fleet.Lost) and records.is_finished(folder, job.mark):
                record = records.read_record(folder)
            found.append((name, record))
        return found


NOT_SHARED = (
    "{name} was trained elsewhere and is not here: --out must be a folder that all machines share"
)
"""Why a subject that a worker calls done has failed."""


@dataclass(frozen=True)
class Ending:
    """A subject has ended as `record` says. If `is_again`, its machine was lost and it starts again
    elsewhere."""

    name: str
    record: records.Record
    is_again: bool = False


@contextmanager
def begun(out: Path, subjects: Sequence[Subject]) -> Iterator[None]:
    """Hold a fleet's folder for the block, and write its subjects. Raises UserError while another
    holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with queue.locked(out, "--out"):
        records.write_names(out, [subject.name for subject in subjects])
        records.stop_path(out).unlink(missing_ok=True)
        try:
            yield
        finally:
            records.stop_path(out).unlink(missing_ok=True)


def missing(out: Path, subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
    """The subjects that are not done with these settings and photos, each with its mark; a faulty
    one's is empty."""
    found = []
    for subject in subjects:
        try:
            mark = "" if subject.error else mark_of(subject.settings)
        except (OSError, UserError) as error:
            mark = ""
            subject = replace(subject, error=str(error))
        if not mark or not records.is_finished(out / subject.name, mark):
            found.append((subject, mark))
    return found


def run_fleet(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
    should_stop: Callable[[], bool] = bool,
    train: Callable[
        [worker.Job | worker.Group], records.Record | list[records.Record]
    ] = worker.train_work,
    check: Callable[[Path, records.Record | ray_fleet.Lost], records.Record] | None = None,
    url: str = "",
) -> None:
    """Train all of `todo` on the connected cluster, within `begun`.

    todo: subjects and their marks
    out: the fleet's folder, which may be a local view of `url`
    on_end: called with an `Ending` for each subject
    should_stop: once it says so, running trainings end at a checkpoint and none begins
    train: what a worker calls
    check: compares a worker's answer with the files of its run folder; by default `checked`
    url: of the bucket to which workers send the run folders (`remote_output`)
    """

    def tell(name: str, result: records.Record | ray_fleet.Lost) -> None:
        on_end(Ending(name, (check or checked)(out / name, result)))

    groups = GroupsUnderWay(tell)

    def stop() -> bool:
        # it is asked again and again, so groups report their subjects by it too
        groups.look()
        if should_stop():
            records.stop_path(out).touch()
        return records.stop_path(out).exists()

    def again(task: ray_fleet.Task, reason: str) -> None:
        for name in (task.key,) if isinstance(task.key, str) else task.key:
            on_end(Ending(name, records.Record("running", message=reason), is_again=True))

    # subjects become tasks as there is room for them
    alone = tasks_of(todo, out, machines, on_end=on_end, url=url)
    tasks = groups.noted(grouped(alone, machines, len(todo), ray_fleet.room_for))
    endings = ray_fleet.run_tasks(train, tasks, should_stop=stop, on_retry=again)
    for task, result in endings:
        for name, found in groups.untold(task, result):
            tell(name, found)


def tasks_of(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
    url: str = "",
) -> Iterator[ray_fleet.Task]:
    """Make the tasks lazily, as there is room for them. A subject that cannot be trained ends
    here."""
    for subject, mark in todo:
        try:
            if subject.error:
                raise UserError(subject.error)
            config = table.TrainConfig.from_dict(subject.settings)
            needs = machines.resources_for(config)
        except UserError as error:
            on_end(Ending(subject.name, records.ended(out / subject.name, "failed", str(error))))
            continue

        # the worker must not choose another memory plan than the one that was estimated
        settings = dict(subject.settings)
        if plan := plan_name(config, machines.gpu_gib):
            settings["memory"] = plan
        job = worker.Job(
            run_dir=str(out / subject.name),
            settings=settings,
            mark=mark,
            cpus=machines.cpus,
            gpus=needs.gpus,
            folder=os.getcwd(),
            url=f"{url}/{subject.name}" if url else "",
        )
        yield ray_fleet.Task(subject.name, (job,), needs)


def checked(
    run_dir: Path, result: records.Record | ray_fleet.Lost, reason: str = NOT_SHARED
) -> records.Record:
    """The worker's answer, or a failure when its machine was lost or, for this `reason`, its
    adapter is not here."""
    if isinstance(result, ray_fleet.Lost):
        return records.ended(run_dir, "failed", result.reason)
    if result.state == "done" and not run_folder.RunDir(run_dir).adapter_path.is_file():
        return records.ended(run_dir, "failed", reason.format(name=run_dir.name))
    return result
