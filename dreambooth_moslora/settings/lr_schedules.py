"""The schedules of the learning rate, one row each. Settings, remarks and training read the same
table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Any  # Stands for `settings.table.TrainConfig`, which imports this file.
DIFFUSERS = "diffusers.optimization"


@dataclass(frozen=True)
class LrSchedule:
    """One schedule: where it is, and what it takes.

    A run that goes on computes its rate from `lr_lambdas`. So the function has to return a
    `LambdaLR`, as those of diffusers do.
    """

    home: str  # `module:name` of a function of the optimizer and the arguments
    # its argument -> the setting that gives it
    arguments: Mapping[str, str]
    # after the warm-up the rate stays; else it takes `num_training_steps` too
    is_constant: bool = False

    def options(self, config: Config, steps: int) -> dict[str, Any]:
        """Its arguments besides the optimizer, for a run of so many steps."""
        found = {name: getattr(config, setting) for name, setting in self.arguments.items()}
        return found if self.is_constant else found | {"num_training_steps": steps}

    def takes(self, setting: str) -> bool:
        return setting in self.arguments.values()


WARM_UP = {"num_warmup_steps": "lr_warmup_steps"}
# By the word that `--lr_scheduler` takes.
LR_SCHEDULES = {
    "linear": LrSchedule(
        home=f"{DIFFUSERS}:get_linear_schedule_with_warmup",
        arguments=WARM_UP,
    ),
    "cosine": LrSchedule(
        home=f"{DIFFUSERS}:get_cosine_schedule_with_warmup",
        arguments=WARM_UP,
    ),
    "cosine_with_restarts": LrSchedule(
        home=f"{DIFFUSERS}:get_cosine_with_hard_restarts_schedule_with_warmup",
        arguments=WARM_UP | {"num_cycles": "lr_num_cycles"},
    ),
    "polynomial": LrSchedule(
        home=f"{DIFFUSERS}:get_polynomial_decay_schedule_with_warmup",
        arguments=WARM_UP | {"power": "lr_power"},
    ),
    "constant": LrSchedule(
        home=f"{DIFFUSERS}:get_constant_schedule",
        arguments={},
        is_constant=True,
    ),
    "constant_with_warmup": LrSchedule(
        home=f"{DIFFUSERS}:get_constant_schedule_with_warmup",
        arguments=WARM_UP,
        is_constant=True,
    ),
}
CONSTANT = tuple(name for name, kind in LR_SCHEDULES.items() if kind.is_constant)


def schedule_of(config: Config) -> LrSchedule:
    return LR_SCHEDULES[config.lr_scheduler]


def has_warm_up(config: Config) -> bool:
    return schedule_of(config).takes("lr_warmup_steps")


def that_take(setting: str) -> str:
    """The words of the schedules that take a setting, as a sentence names them."""
    return " or ".join(name for name, kind in LR_SCHEDULES.items() if kind.takes(setting))
