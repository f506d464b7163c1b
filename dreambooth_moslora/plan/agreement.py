"""What the processes of a run agree on before it begins.

Processes with different settings would train different adapters, or wait for each other for ever.
So they agree on the flags and files, then on what is chosen by the GPU with the least free memory.
One process asks nobody, and then nothing here loads torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import get_world_size
from dreambooth_moslora.settings import train_config

Result = TypeVar("Result")


def is_single_process() -> bool:
    """Return whether a launcher started no other process of this run."""
    return get_world_size() < 2


def agree_on_result(
    find: Callable[[], Result], format_result: Callable[[Result], str] = lambda found: ""
) -> Result:
    """Return what each process finds. Raises UserError on all where one has other `words`, or where
    `find` raises it."""
    if is_single_process():
        return find()
    from dreambooth_moslora.plan.distributed import join_processes, require_agreement

    return require_agreement(
        join_processes(), find, format_result, "give all processes the same flags and files."
    )


def check_same_settings(config: train_config.TrainConfig) -> None:
    """Raise UserError on all processes where one has other settings."""
    agree_on_result(lambda: config, lambda own: format_settings(own.to_dict()))


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return a line for each setting that the processes must share, given or not."""
    apart = {*train_config.list_settings("secret"), *train_config.list_settings("per_process")}
    lines = []
    for name, item in train_config.SETTINGS.items():
        if name not in apart:
            value = train_config.parse_setting(name, settings.get(name, item.default))
            lines.append(f"--{name} {value!r}")
    return "\n".join(lines)


def get_min_free_gib() -> float | None:
    """Return GiB that are free on the GPU of the process that has the least, so that all choose the
    same; None without a GPU. All must call it."""
    own = devices.measure_free_gpu_gib()
    if is_single_process():
        return own
    from dreambooth_moslora.plan.distributed import gather_results, join_processes

    told = gather_results(join_processes(), [own], None)
    return min((free for free in told if free is not None), default=None)
