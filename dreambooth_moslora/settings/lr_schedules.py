"""The schedules of the learning rate, named as `diffusers.optimization.get_scheduler` does, and the
settings that each takes.
"""

from typing import Any

Config = Any  # Stands for `settings.train_config.TrainConfig`, which imports this file.

LR_SCHEDULES = {
    "linear": ("lr_warmup_steps",),
    "cosine": ("lr_warmup_steps",),
    "cosine_with_restarts": ("lr_warmup_steps", "lr_num_cycles"),
    "polynomial": ("lr_warmup_steps", "lr_power"),
    "constant": (),
    "constant_with_warmup": ("lr_warmup_steps",),
}
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")  # After the warm-up the rate stays.


def is_schedule_setting(config: Config, setting: str) -> bool:
    """Whether the run's schedule reads the setting."""
    return setting in LR_SCHEDULES[config.lr_scheduler]


def format_schedules(setting: str) -> str:
    """The words of the schedules that take a setting, as a sentence names them."""
    return " or ".join(name for name, settings in LR_SCHEDULES.items() if setting in settings)
