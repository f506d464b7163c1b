"""What the processes of a run agree on before it begins.

Processes with different settings would train different adapters, or wait for each other for ever.
So they agree on the flags and files, then on what is chosen by the GPU with the least free memory.
One process asks nobody, and then nothing here loads torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dreambooth_moslora.base import devices
from dreambooth_moslora.base.devices import process_count
from dreambooth_moslora.settings import train_config

Result = TypeVar("Result")


def is_alone() -> bool:
    """Whether a launcher started no other process of this run."""
    return process_count() < 2


def by_all(find: Callable[[], Result], words: Callable[[Result], str] = lambda found: "") -> Result:
    """What each process finds. Raises UserError on all where one has other `words`, or where `find`
    raises it."""
    if is_alone():
        return find()
    from dreambooth_moslora.plan.distributed import agreed, joined

    return agreed(joined(), find, words, "give all processes the same flags and files.")


def check_same(config: train_config.TrainConfig) -> None:
    """Raises UserError on all processes where one has other settings."""
    by_all(lambda: config, lambda own: in_lines(own.to_dict()))


def in_lines(settings: Mapping[str, Any]) -> str:
    """A line for each setting that the processes must share, given or not."""
    apart = {*train_config.named("secret"), *train_config.named("per_process")}
    lines = []
    for name, item in train_config.SETTINGS.items():
        if name not in apart:
            value = train_config.checked_setting(name, settings.get(name, item.default))
            lines.append(f"--{name} {value!r}")
    return "\n".join(lines)


def least_free_gib() -> float | None:
    """GiB that are free on the GPU of the process that has the least, so that all choose the same;
    None without a GPU. All must call it."""
    own = devices.free_gib_of_gpu()
    if is_alone():
        return own
    from dreambooth_moslora.plan.distributed import exchange, joined

    told = exchange(joined(), [own], None)
    return min((free for free in told if free is not None), default=None)
