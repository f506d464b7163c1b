"""Schedules of the learning rate, as in `diffusers.optimization.get_scheduler`, and their
settings."""

from typing import Any

Config = Any
"""Stands for `settings.train_config.TrainConfig`, which imports this file."""

LR_SCHEDULES = {
    "linear": ("lr_warmup_steps",),
    "cosine": ("lr_warmup_steps",),
    "cosine_with_restarts": ("lr_warmup_steps", "lr_num_cycles"),
    "polynomial": ("lr_warmup_steps", "lr_power"),
    "constant": (),
    "constant_with_warmup": ("lr_warmup_steps",),
}
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
"""Schedules whose rate is constant after the warm-up."""


def is_schedule_setting(config: Config, setting: str) -> bool:
    """Return whether the run's schedule reads the setting."""
    return setting in LR_SCHEDULES[config.lr_scheduler]


def format_schedules(setting: str) -> str:
    """Return the names of the schedules that read a setting, for a sentence."""
    return " or ".join(name for name, settings in LR_SCHEDULES.items() if setting in settings)
