"""Optimizers, one row each, for settings, estimate, checkpoint and training.

Optimizers that only save memory are left out: Adam's states take a third of a GiB for SDXL at rank
16.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Any
"""Stands for `settings.train_config.TrainConfig`, which imports this file."""
SCHEDULE_FREE = "AdamWScheduleFree"
"""Optimizer that needs no schedule of the learning rate."""


def to_tuple(settings: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the settings of an argument, which has one or a tuple of them."""
    return (settings,) if isinstance(settings, str) else settings


@dataclass(frozen=True)
class OptimizerKind:
    """Optimizer: its class, its arguments, and the cost of its state."""

    import_path: str  # `module:name`, imported when a run begins
    summary: str  # in the help, after its name
    # its argument -> the setting with its value, or the settings of a pair. Other optimizers'
    # settings have no effect with it.
    arguments: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    # further arguments, the same in each run; not those of the class in 8 bit
    fixed: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None  # for pip
    in_8_bit: str | None = None
    # the values of a group that its steps change, which a checkpoint keeps
    learns: tuple[str, ...] = ()
    bytes_each: int = 16  # of one parameter: the fp32 weight, the gradient and the states
    one_rate: bool = False  # all groups share one learning rate
    averages: bool = False  # it publishes the average of its steps; the rate needs no schedule
    finds_rate: bool = False  # the learning rate multiplies the one that it finds

    def build_options(self, config: Config) -> dict[str, Any]:
        """Return its arguments besides the groups and the rate."""
        options: dict[str, Any] = {}
        for argument, settings in self.arguments.items():
            values = tuple(getattr(config, name) for name in to_tuple(settings))
            options[argument] = values[0] if isinstance(settings, str) else values
        is_8_bit = config.use_8bit_adam and self.in_8_bit
        return options if is_8_bit else options | self.fixed

    def has_setting(self, setting: str) -> bool:
        return any(setting in to_tuple(settings) for settings in self.arguments.values())


ADAM_ARGUMENTS = {"betas": ("adam_beta1", "adam_beta2"), "eps": "adam_epsilon"}
OPTIMIZERS = {
    "AdamW": OptimizerKind(
        import_path="torch.optim:AdamW",
        summary="is the usual one",
        arguments=ADAM_ARGUMENTS,
        # one kernel for the hundreds of small matrices takes a quarter of the loop's time on a CPU
        fixed={"fused": True},
        in_8_bit="bitsandbytes.optim:AdamW8bit",
    ),
    # Mishchenko and Defazio 2023
    "Prodigy": OptimizerKind(
        import_path="prodigyopt:Prodigy",
        summary="finds its rate",
        arguments=ADAM_ARGUMENTS
        | {
            "beta3": "prodigy_beta3",
            "decouple": "prodigy_decouple",
            "use_bias_correction": "prodigy_use_bias_correction",
            "safeguard_warmup": "prodigy_safeguard_warmup",
        },
        package="prodigyopt",
        one_rate=True,
        finds_rate=True,
        learns=("d", "d_max", "d_numerator", "d_denom", "d_hat", "k"),
        bytes_each=24,  # two states more than Adam
    ),
    # Defazio et al. 2024, arXiv 2405.15682
    SCHEDULE_FREE: OptimizerKind(
        import_path="schedulefree:AdamWScheduleFree",
        summary="needs no schedule",
        arguments=ADAM_ARGUMENTS,
        package="schedulefree",
        averages=True,
        learns=("k", "weight_sum", "lr_max", "scheduled_lr"),
    ),
    # Shazeer and Stern 2018; as in kohya, the learning rate does not depend on the weights' size
    "Adafactor": OptimizerKind(
        import_path="transformers.optimization:Adafactor",
        summary="is without momentum",
        fixed={"scale_parameter": False, "relative_step": False},
    ),
}
"""By the name that `--optimizer` takes."""
BYTES_IN_8_BIT = 10
"""`bytes_each` with --use_8bit_adam."""


def get_optimizer_kind(config: Config) -> OptimizerKind:
    return OPTIMIZERS[config.optimizer]


def format_optimizers(setting: str) -> str:
    """Return the names of the optimizers that take a setting, for a help text."""
    return ", ".join(name for name, kind in OPTIMIZERS.items() if kind.has_setting(setting))
