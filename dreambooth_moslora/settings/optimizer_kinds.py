"""The optimizers, one row each. Settings, estimate, checkpoint and training read the same table.

Optimizers that only save memory are left out: Adam's states take a third of a GiB for SDXL at rank
16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = Any  # Stands for `settings.table.TrainConfig`, which imports this file.
SCHEDULE_FREE = "AdamWScheduleFree"  # The one that needs no schedule of the learning rate.


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: where it is, its arguments, and what its state costs."""

    home: str  # `module:name`, imported when a run begins
    options: Callable[[Config], dict[str, Any]]  # its arguments besides the groups and the rate
    package: str | None = None  # what pip installs for it
    in_8_bit: str | None = None
    # the values of a group that its steps change, which a checkpoint keeps
    learns: tuple[str, ...] = ()
    bytes_each: int = 16  # of one parameter: the fp32 weight, the gradient and the states
    one_rate: bool = False  # all groups share one learning rate
    averages: bool = False  # it publishes the average of its steps


def of_adam(config: Config) -> dict[str, Any]:
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


# Its arguments, each the setting `--prodigy_NAME`.
OF_PRODIGY = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
# By the name that `--optimizer` takes.
OPTIMIZERS = {
    "AdamW": OptimizerKind(
        home="torch.optim:AdamW",
        # fused: one kernel for the hundreds of small matrices takes a quarter of the loop's time on
        # a CPU
        options=lambda run: of_adam(run) | ({} if run.use_8bit_adam else {"fused": True}),
        in_8_bit="bitsandbytes.optim:AdamW8bit",
    ),
    # finds its rate (Mishchenko and Defazio 2023); the given one multiplies it
    "Prodigy": OptimizerKind(
        home="prodigyopt:Prodigy",
        options=lambda run: (
            of_adam(run) | {name: getattr(run, f"prodigy_{name}") for name in OF_PRODIGY}
        ),
        package="prodigyopt",
        one_rate=True,
        learns=("d", "d_max", "d_numerator", "d_denom", "d_hat", "k"),
        bytes_each=24,  # two states more than Adam
    ),
    # Defazio et al. 2024, arXiv 2405.15682
    SCHEDULE_FREE: OptimizerKind(
        home="schedulefree:AdamWScheduleFree",
        options=of_adam,
        package="schedulefree",
        averages=True,
        learns=("k", "weight_sum", "lr_max"),
    ),
    # Shazeer and Stern 2018; as kohya writes it: the given rate for weights of any size
    "Adafactor": OptimizerKind(
        home="transformers.optimization:Adafactor",
        options=lambda run: {"scale_parameter": False, "relative_step": False},
    ),
}
BYTES_IN_8_BIT = 10  # `bytes_each` with --use_8bit_adam.


def optimizer_of(config: Config) -> OptimizerKind:
    return OPTIMIZERS[config.optimizer]
