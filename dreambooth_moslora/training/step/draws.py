"""The random draws of a micro-batch: noise, its levels, and the prompts whose prior is kept.

Each draw is named by (seed, "micro", number of the micro-batch, what), so that it does not depend on other
draws.
"""

import torch
from torch import Tensor

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.seeding import generator, rng
from dreambooth_moslora.training.step.objective import NoiseSchedule, offset_noise, sample_timesteps

__all__ = ["noise_and_levels", "prior_prompts"]


def noise_and_levels(
    config: TrainConfig, schedule: NoiseSchedule, shape: torch.Size, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """The noise of `shape` (B, 4, h, w) and the noise levels' index (B,) in the schedule, both on the CPU."""
    names = (config.seed, "micro", micro_batch)
    noise = torch.randn(shape, generator=generator(*names, "noise"))
    noise = offset_noise(noise, config.noise_offset, generator(*names, "noise offset"))
    bias = (config.timestep_bias_strategy, config.timestep_bias_multiplier, config.timestep_bias_portion)
    return noise, sample_timesteps(schedule, shape[0], generator(*names, "level"), *bias)


def prior_prompts(config: TrainConfig, classes: list[str], micro_batch: int) -> list[str]:
    """The prompts whose prior is kept beside each photo of a micro-batch: the prompt of its class, or with
    equal chance a random one of `prior_prompts`."""
    draws = rng(config.seed, "micro", micro_batch, "prior prompts")
    return [draws.choice((of_class, draws.choice(config.prior_prompts or (of_class,)))) for of_class in classes]
