"""Agree between the processes of a run before torch is imported: a run of one process needs none
of it. `distributed` has the exchange itself, and imports torch."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import get_world_size
from dreambooth_moslora.settings import parsing, setting_names, train_config

Result = TypeVar("Result")


def is_single_process() -> bool:
    """Return whether a launcher started no other process of this run."""
    return get_world_size() < 2


def agree_on_result(
    find: Callable[[], Result], format_result: Callable[[Result], str] = lambda result: ""
) -> Result:
    """Return each process's result of `find`. Raises UserError on all processes where the text of
    one differs, or where `find` raises it."""
    if is_single_process():
        return find()
    from dreambooth_moslora.plan.distributed import join_processes, require_agreement

    return require_agreement(
        join_processes(), find, format_result, "give all processes the same flags and files."
    )


def check_same_settings(config: train_config.TrainConfig) -> None:
    """Raise UserError on all processes where one has other settings."""
    agree_on_result(lambda: config, lambda settings: format_settings(settings.to_dict()))


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return a line for each setting that the processes must share, also for defaults."""
    excluded = {*setting_names.list_settings("secret"), *setting_names.list_settings("per_process")}
    defaults = {name: item.default for name, item in setting_names.SETTINGS.items()}
    values = defaults | parsing.parse_settings(settings)
    return "\n".join(
        f"--{name} {value!r}" for name, value in values.items() if name not in excluded
    )


def get_min_free_gib() -> float | None:
    """Return the free memory, GiB, of the GPU of the process that has the least, so that all choose
    the same; None without a GPU. All processes must call it."""
    local_gib = devices.measure_free_gpu_gib()
    if is_single_process():
        return local_gib
    from dreambooth_moslora.plan.distributed import gather_results, join_processes

    free_gibs = gather_results(join_processes(), [local_gib], None)
    return min((free for free in free_gibs if free is not None), default=None)
