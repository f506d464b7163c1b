"""Ray, as far as this program uses it.

Join or start a cluster, and run tasks on it in a bounded window.

A task is a module-level function and its arguments. If it raises, or its machine is lost too often,
the caller gets a `LostTask` for it; other tasks go on.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dreambooth_moslora.base.devices import GIB
from dreambooth_moslora.disk.paths import get_import_environment
from dreambooth_moslora.errors import UserError, format_error
from dreambooth_moslora.settings.rules import find_package_version

INSTALL = 'pip install "ray[default]>=2.50,<3"'
"""How a person gets Ray."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's minimum, which suffices: tasks exchange only names and numbers."""
EMBEDDED_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # on Linux too: one machine alone, listening on the loopback
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Serve's replicas unpickle from any address: accept only senders with Ray's token
    "RAY_AUTH_MODE": "token",
    # tasks keep the priority of this process: the machine is here for them
    "RAY_worker_niceness": "0",
}
"""Environment of a Ray that this program starts on this machine alone."""
MIN_PENDING_TASKS = 64
"""Tasks queued in Ray beside the running ones: enough to keep a cluster busy and to let it grow."""
WAIT_SEC = 0.5
"""Seconds between two looks at a stop."""
LOSS_REASONS = {
    "WorkerCrashedError": "its worker was killed",
    "NodeDiedError": "its machine was lost",
    "OutOfMemoryError": "its machine ran out of memory",
    "LocalRayletDiedError": "its machine was lost",
}
"""Ray's error -> what it means for a training."""


@dataclass(frozen=True)
class Resources:
    """Request of one task: CPU cores, GPUs (a fraction is allowed), and RAM in GiB."""

    cpus: float = 1
    gpus: float = 0.0
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Task:
    """`key` tells the caller which one has ended; `arguments` are those of the function."""

    key: Any
    arguments: tuple
    resources: Resources = Resources()


@dataclass(frozen=True)
class LostTask:
    """Task without a result. `reason`: the function's error, or what happened to its machine."""

    reason: str


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Connect to Ray for the length of the block. Without an address, start it on this machine
    alone. Raises UserError when Ray is not installed, does not start here, or no cluster answers.
    """
    # before the import, at which Ray reads its environment; a cluster has settings of its own
    for name, value in EMBEDDED_ENV.items():
        if address is None or "USAGE" in name:
            os.environ[name] = value
    if find_package_version("ray") is None:
        raise UserError(f"fleets need Ray: {INSTALL}.")
    import ray

    # workers import the same program as this process
    if address is None:
        os.environ.update(get_import_environment())
        options = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        options = {"address": address, "runtime_env": {"env_vars": get_import_environment()}}
    try:
        ray.init(**options, log_to_driver=False, logging_level="error")
    # it raises Exception itself when a busy machine starts it too slowly
    except Exception as error:
        where = "on this machine" if address is None else f"at --ray_address {address}"
        raise UserError(
            f"Ray cannot be reached {where}: {format_error(error).removesuffix('.')}."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_tasks(
    function: Callable,
    tasks: Iterable[Task],
    *,
    retries: int = 5,
    window: int | None = None,
    should_stop: Callable[[], bool] = bool,
    on_retry: Callable[[Task, str], None] = lambda task, reason: None,
) -> Iterator[tuple[Task, Any]]:
    """Yield (task, result or `LostTask`) as tasks end.

    function: called on the cluster with a task's arguments
    tasks: taken one by one, as there is room
    retries: how often a task is submitted again whose machine was lost
    window: most tasks that are submitted at once; by default a little more than the cluster holds
    should_stop: once it says so, none is started; running ones are waited for
    on_retry: called with a task that is submitted again, and the reason
    """
    import ray

    # this function retries by itself, so that `on_retry` hears of it
    remote = ray.remote(max_retries=0, max_calls=0)(function)
    source = iter(tasks)
    running: dict[Any, Task] = {}
    lost: Counter = Counter()
    while True:
        # fill the window, which grows with the cluster
        most = window or MIN_PENDING_TASKS + int(ray.cluster_resources().get("CPU", 0))
        while len(running) < most and not should_stop():
            task = next(source, None)
            if task is None:
                break
            running[start_task(remote, task)] = task
        if not running:
            return

        # wait for one, then take all that have ended
        ray.wait(list(running), timeout=WAIT_SEC)
        ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        for reference in ready:
            task = running.pop(reference)
            result, is_machines = get_result(reference)
            if is_machines and lost[task.key] < retries and not should_stop():
                lost[task.key] += 1
                on_retry(task, result.reason)
                running[start_task(remote, task)] = task
            else:
                lost.pop(task.key, None)
                yield task, result


def start_task(remote: Any, task: Task) -> Any:
    needs = task.resources
    options: dict[str, Any] = {"num_cpus": needs.cpus}
    if needs.gpus:
        options["num_gpus"] = needs.gpus
    if needs.memory_gib:
        options["memory"] = int(needs.memory_gib * GIB)
    return remote.options(**options).remote(*task.arguments)


def get_result(reference: Any) -> tuple[Any, bool]:
    """(Its result or `LostTask`, whether its worker or machine was lost rather than its function
    failing)."""
    import ray

    try:
        return ray.get(reference), False
    except ray.exceptions.RayTaskError as error:
        return LostTask(format_error(f"{type(error.cause).__name__}: {error.cause}")), False
    except ray.exceptions.RayError as error:
        return LostTask(LOSS_REASONS.get(type(error).__name__, format_error(error))), True


def count_slots(resources: Resources) -> int:
    """Count how many such tasks the live machines hold at once; at least 1."""
    import ray

    count = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        wants = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gib * GIB}
        count += int(min(has.get(name, 0) / amount for name, amount in wants.items() if amount))
    return max(1, count)


def has_gpus() -> bool:
    import ray

    return bool(ray.cluster_resources().get("GPU"))
