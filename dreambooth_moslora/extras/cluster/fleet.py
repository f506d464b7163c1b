"""Train a fleet from its list to its end.

Missing subjects are trained, each on its own, and their ends are recorded. What a training needs of
a machine is known by the estimate of `--dry_run`. A cluster task is one subject, and its key is the
subject's name.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.base import Base
from dreambooth_moslora.disk import queue, run_folder
from dreambooth_moslora.errors import UserError
from dreambooth_moslora.extras.cluster import ray_fleet, records, worker
from dreambooth_moslora.extras.cluster.fleet_subjects import Subject, digest_run
from dreambooth_moslora.plan import defaults, memory, memory_plans, validation
from dreambooth_moslora.plan.base_size import BaseSize, find_base_size
from dreambooth_moslora.settings import train_config

PROCESS_GIB = 0.5
"""Memory of the libraries, beside the estimate's tensors."""


@dataclass(frozen=True)
class Machines:
    """Machines of a cluster, with the user's flags about them.

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
    def from_cluster(cls, per_gpu: int | None = None, cpus: int = 1) -> "Machines":
        """Return the machines of the connected Ray cluster; all GPUs are assumed alike."""
        import ray

        # this process may have no GPU: a tiny task asks on a machine that has one
        @ray.remote(num_cpus=0, num_gpus=0.01)
        def get_gpu_bytes() -> int:
            import torch

            return torch.cuda.get_device_properties(0).total_memory

        gpu_gib = ray.get(get_gpu_bytes.remote()) / devices.GIB if ray_fleet.has_gpus() else None

        # RAM that Ray may give to tasks
        rooms = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
        return cls(
            gpu_gib=gpu_gib,
            node_gib=max(rooms, default=0) / devices.GIB,
            per_gpu=per_gpu,
            cpus=cpus,
        )

    def estimate_resources(self, config: train_config.TrainConfig) -> ray_fleet.Resources:
        """Estimate what one training requests, at most the largest machine. Raises UserError for a
        damaged base."""
        # the peak by the memory plan that it will have
        plan = self.choose_memory_plan(config)
        if plan:
            config = replace(config, **memory_plans.get_plan_settings(config, plan))
        need = memory.estimate_memory(config, load_base_size(config), 1).peak_gib

        # on CPUs its memory, on a GPU its share
        if self.gpu_gib is None:
            return ray_fleet.Resources(self.cpus, memory_gib=min(need + PROCESS_GIB, self.node_gib))
        count = self.per_gpu or max(1, int(memory_plans.USABLE_RATIO * self.gpu_gib / need))
        return ray_fleet.Resources(self.cpus, gpus=int(10_000 / count) / 10_000)

    def choose_memory_plan(self, config: train_config.TrainConfig) -> str | None:
        """Return the memory plan of `--memory` on these machines; None without the flag. Raises
        UserError."""
        return memory_plans.choose_plan(config, load_base_size(config), self.gpu_gib)


def load_base_size(config: train_config.TrainConfig) -> BaseSize:
    """Return the size of the run's base with the layers that it adapts. Raises UserError."""
    return measure_base_size(Base.of(config), config.target_modules, config.lora_blocks)


@lru_cache(maxsize=32)
def measure_base_size(
    base: Base, target_modules: tuple[str, ...], lora_blocks: tuple[str, ...]
) -> BaseSize:
    """Measure a base with its family's layers, or those named. Its files are opened once. Raises
    UserError."""
    base.check()
    config = train_config.TrainConfig(target_modules=target_modules, lora_blocks=lora_blocks)
    validation.check_base_settings(config, base)
    targets = defaults.choose_family_settings(config, base).get("target_modules", target_modules)
    return find_base_size(base, targets)


NOT_SHARED_MESSAGE = (
    "{name} was trained elsewhere and is not here: --out must be a folder that all machines share"
)
"""Why a subject that a worker calls done has failed."""


@dataclass(frozen=True)
class Ending:
    """End of a subject's training, with its `record`. If `is_retry`, its machine was lost and it
    starts again elsewhere."""

    name: str
    record: records.Record
    is_retry: bool = False


@contextmanager
def lock_fleet(out: Path, subjects: Sequence[Subject]) -> Iterator[None]:
    """Hold a fleet's folder for the block, and write its subjects. Raises UserError while another
    holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with queue.lock_folder(out, "--out"):
        records.write_names(out, [subject.name for subject in subjects])
        records.get_stop_path(out).unlink(missing_ok=True)
        try:
            yield
        finally:
            records.get_stop_path(out).unlink(missing_ok=True)


def list_unfinished(out: Path, subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
    """List the subjects that are not done with these settings and photos, each with its mark; a
    faulty one's is empty."""
    unfinished = []
    for subject in subjects:
        try:
            mark = "" if subject.error else digest_run(subject.settings)
        except (OSError, UserError) as error:
            mark = ""
            subject = replace(subject, error=str(error))
        if not mark or not records.is_finished(out / subject.name, mark):
            unfinished.append((subject, mark))
    return unfinished


def run_fleet(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
    should_stop: Callable[[], bool] = bool,
    train: Callable[[worker.Job], records.Record] = worker.train_subject,
) -> None:
    """Train all of `todo` on the connected cluster.

    todo: subjects and their marks
    out: the fleet's folder
    on_end: called with an `Ending` for each subject
    should_stop: once it says so, running trainings end at a checkpoint and none begins
    train: what a worker calls
    """

    def stop() -> bool:
        if should_stop():
            records.get_stop_path(out).touch()
        return records.get_stop_path(out).exists()

    def report_retry(task: ray_fleet.Task, reason: str) -> None:
        on_end(Ending(task.key, records.Record("running", message=reason), is_retry=True))

    # subjects become tasks as there is room for them
    tasks = build_tasks(todo, out, machines, on_end=on_end)
    endings = ray_fleet.run_tasks(train, tasks, should_stop=stop, on_retry=report_retry)
    for task, result in endings:
        on_end(Ending(task.key, check_result(out / task.key, result)))


def build_tasks(
    todo: Sequence[tuple[Subject, str]],
    out: Path,
    machines: Machines,
    on_end: Callable[[Ending], None],
) -> Iterator[ray_fleet.Task]:
    """Make the tasks lazily, as there is room for them. A subject that cannot be trained ends
    here."""
    for subject, mark in todo:
        try:
            if subject.error:
                raise UserError(subject.error)
            config = train_config.TrainConfig.from_dict(subject.settings)
            needs = machines.estimate_resources(config)
        except UserError as error:
            on_end(
                Ending(
                    subject.name, records.record_ending(out / subject.name, "failed", str(error))
                )
            )
            continue

        # the worker must not choose another memory plan than the one that was estimated
        settings = dict(subject.settings)
        if plan := machines.choose_memory_plan(config):
            settings["memory"] = plan
        job = worker.Job(
            run_dir=str(out / subject.name),
            settings=settings,
            mark=mark,
            cpus=machines.cpus,
            gpus=needs.gpus,
            folder=os.getcwd(),
        )
        yield ray_fleet.Task(subject.name, (job,), needs)


def check_result(run_dir: Path, result: records.Record | ray_fleet.LostTask) -> records.Record:
    """Return the worker's answer, or a failure when its machine was lost or its adapter is
    missing."""
    if isinstance(result, ray_fleet.LostTask):
        return records.record_ending(run_dir, "failed", result.reason)
    if result.state == "done" and not run_folder.RunDir(run_dir).adapter_path.is_file():
        return records.record_ending(
            run_dir, "failed", NOT_SHARED_MESSAGE.format(name=run_dir.name)
        )
    return result
