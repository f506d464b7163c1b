"""What a training needs of a machine, and which subjects share a process.

Which runs can share their steps (`extras.cluster.together`): runs on one base with micro-batches of one shape.

What one training needs of a machine, by the estimate of `--dry_run`: a fraction of a GPU, or cores and memory.

Which subjects of a fleet share a process (`--per_gpu N`), and reports of each subject as it ends.

A cluster task is one subject, or with `--per_gpu` a group. Its key is the subject's name, or a tuple of names.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.base.files import base_folder
from dreambooth_moslora.extras.cluster.on_ray import Lost, Resources, Task
from dreambooth_moslora.extras.cluster.records import Record, is_finished, read_record
from dreambooth_moslora.extras.cluster.worker import Group, Job
from dreambooth_moslora.plan.memory import (
    GIB,
    PLANS,
    USABLE,
    BaseSize,
    estimate,
    fitting,
    size_of_base,
    with_plan,
)
from dreambooth_moslora.settings.optimizers import optimizer_of
from dreambooth_moslora.settings.table import TrainConfig

ALIKE_GROUPS = ("base model", "adapter", "memory and speed")
ALIKE = (
    *("resolution", "with_prior_preservation", "prior", "train_batch_size", "gradient_accumulation_steps"),
    "do_edm_style_training",
)
OWN = ("init_adapter", "mixer_lr_scale", "dataloader_num_workers")
"""Settings in ALIKE_GROUPS that may nevertheless differ between runs."""


def needs_to_be_alone(config: TrainConfig) -> str | None:
    """The flag that keeps a run from sharing steps with any other; None when there is none."""
    reasons = {
        "--train_text_encoder": config.train_text_encoder,
        "--train_text_encoder_ti": config.train_text_encoder_ti,
        "--use_dora": config.use_dora,
        "--lora_dropout": config.lora_dropout > 0,
        "--enable_bucket": config.enable_bucket,
        "--caching off": config.caching == "off",
        "--base_quantization int8": config.base_quantization == "int8",
        "--compile on": config.compile == "on",
        "--cache_cross_attention": config.cache_cross_attention or "cached" in (config.memory or ""),
    }
    return next((flag for flag, is_given in reasons.items() if is_given), None)


def shared_settings(config: TrainConfig) -> tuple[object, ...]:
    """The values of the settings in which runs must agree to share their steps."""
    found = [f.name for f in fields(config) if f.metadata["group"] in ALIKE_GROUPS and f.name not in OWN]
    return tuple(getattr(config, name) for name in (*found, *ALIKE))


PROCESS_GIB = 0.5
"""Memory of the libraries, beside the estimate's tensors."""
SHARED_PLANS = tuple(name for name in PLANS if "cache_cross_attention" not in PLANS[name])
"""The plans of `--memory auto` with which runs can share a base."""


@dataclass(frozen=True)
class Machines:
    """A cluster's machines: `gpu_gib` of one GPU (None: the fleet trains on CPUs), `node_gib` of the largest machine.

    The user sets `per_gpu`, trainings at once on a GPU (None: as many as fit), and `cpus`, cores of each
    training.
    """

    gpu_gib: float | None
    node_gib: float
    per_gpu: int | None = None
    cpus: int = 1

    def resources_for(self, config: TrainConfig) -> Resources:
        """What one training asks for. It is capped at the largest machine: there, a run that does not fit says
        so itself.

        Raises UserError for a damaged base.
        """
        need = estimate(with_plan(config, plan_name(config, self.gpu_gib) or "full"), base_size(config), 1).peak_gib
        if self.gpu_gib is None:
            return Resources(self.cpus, memory_gib=min(need + PROCESS_GIB, self.node_gib))
        count = self.per_gpu or max(1, int(USABLE * self.gpu_gib / need))
        return Resources(self.cpus, gpus=int(10_000 / count) / 10_000)

    def at_once(self, config: TrainConfig) -> int:
        """How many such trainings share a process: `per_gpu`, or fewer if the GPU is too small. Raises UserError."""
        count = self.per_gpu or 1
        while self.gpu_gib is not None and count > 1 and group_gib(config, count) > USABLE * self.gpu_gib:
            count -= 1
        return count

    def resources_for_group(self, config: TrainConfig, at_once: int) -> Resources:
        """What `at_once` such trainings in one process ask for: a whole GPU, or cores and memory. Raises UserError."""
        if self.gpu_gib is not None:
            return Resources(self.cpus, gpus=1.0)
        return Resources(self.cpus, memory_gib=min(group_gib(config, at_once) + PROCESS_GIB, self.node_gib))


def group_gib(config: TrainConfig, count: int) -> float:
    """Peak memory of one base with `count` adapters, for a step on the rows of all, GiB."""
    of_all = estimate(replace(config, train_batch_size=config.train_batch_size * count), base_size(config), 1)
    return of_all.peak_gib + (count - 1) * of_all.adapter_parameters * optimizer_of(config).bytes_each / GIB


def plan_name(config: TrainConfig, gpu_gib: float | None) -> str | None:
    """The memory plan that `--memory` means on these machines; None when the option was not given."""
    if config.memory != "auto":
        return config.memory
    return fitting(config, base_size(config), gpu_gib, SHARED_PLANS)


def base_size(config: TrainConfig) -> BaseSize:
    named = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir", "target_modules")
    return size_of(tuple((name, getattr(config, name)) for name in named))


@lru_cache(maxsize=32)
def size_of(named: tuple[tuple[str, object], ...]) -> BaseSize:
    """The size of the base that these settings name. Its files are opened once."""
    config = replace(TrainConfig(), **dict(named))
    return size_of_base(base_folder(config), config.target_modules, config.variant)


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
