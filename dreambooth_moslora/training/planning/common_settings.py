"""The settings of a run that several processes train. With different ones they would train different adapters, or wait
for each other for ever.

    flags and files --agreed--> choices and memory plan, by the GPU with the least free memory --agreed--> training

One process asks nobody, and then nothing here loads torch.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from dreambooth_moslora.core.config.train_config import TrainConfig, checked_setting
from dreambooth_moslora.training.planning.estimate import free_gib_of_gpu

__all__ = ["checked_by_all", "in_lines", "least_free_gib", "same_config", "same_for_all"]

Result = TypeVar("Result")
OF_A_PROCESS = ("local_rank", "cache_dir")
"""Settings that may differ: a launcher may number the processes by a flag, and each machine has its own disk."""
SAME_SETTINGS = "give all processes the same flags and files."


def is_alone() -> bool:
    """Whether a launcher started no other process of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2


def same_for_all(find: Callable[[], Result], words: Callable[[Result], str]) -> Result:
    """What each process finds. Raises UserError on all where one finds other settings, with the lines of `words` that
    differ, and where `find` raises it in one."""
    if is_alone():
        return find()
    from dreambooth_moslora.training.accelerator import joined
    from dreambooth_moslora.training.processes import agreed

    return agreed(joined(), find, words, SAME_SETTINGS)


def same_config(config: TrainConfig) -> TrainConfig:
    """`config`. Raises UserError on all processes where one has another."""
    return same_for_all(lambda: config, lambda own: in_lines(own.to_dict()))


def checked_by_all(check: Callable[[], Result]) -> Result:
    """What `check` returns. Its error in one process is raised on all."""
    if is_alone():
        return check()
    from dreambooth_moslora.training.accelerator import joined
    from dreambooth_moslora.training.processes import on_each

    return on_each(joined(), check)


def in_lines(settings: Mapping[str, Any]) -> str:
    """A line for each setting that the processes must share; one that is not given has its default."""
    shared = [item for item in fields(TrainConfig) if not item.metadata["secret"] and item.name not in OF_A_PROCESS]
    values = {item.name: checked_setting(item.name, settings.get(item.name, item.default)) for item in shared}
    return "\n".join(f"--{name} {value!r}" for name, value in values.items())


def least_free_gib(*, is_later: bool = False) -> float | None:
    """`free_gib_of_gpu` of the process that has the least, so that all choose the same. All must call it."""
    own = free_gib_of_gpu(is_later=is_later)
    if is_alone():
        return own
    from dreambooth_moslora.training.accelerator import joined
    from dreambooth_moslora.training.processes import told_by_each

    told = told_by_each(joined(), own)
    return min((free for free in told if free is not None), default=None)
