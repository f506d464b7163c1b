"""The average of the adapter over its steps. If there is one, it is published, scored and sampled instead of
the weights.

exponential (`--use_ema`)   m = d·m + (1 - d)·w after each step, d = min(decay, (1 + n)/(10 + n)) of diffusers
schedule-free               x of Defazio et al. 2024 (arXiv 2405.15682), which that optimizer keeps by itself

Training continues from the weights w. A checkpoint holds both: the average as its adapter, for all other
readers, and the weights in another file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.config.training_settings import SCHEDULE_FREE

__all__ = ["Average", "MovingAverage", "ScheduleFreeAverage", "average_of", "copies", "lent", "put"]


class Average(Protocol):
    """An average of a list of parameters; `values` has their order and shapes."""

    def update(self, step: int) -> None:
        """Call it after optimizer step number `step`, counted from 1."""

    def values(self) -> list[Tensor]: ...


class MovingAverage:
    """The exponential average of `parameters`; it starts at their values.

    At first it forgets faster than `decay` says: at step n it reaches about n/9 steps back, so that a run of a
    few hundred steps does not average in its start. Same as diffusers' `EMAModel`.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self._mean = copies(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        before = step - 1
        decay = min(self.decay, (1 + before) / (10 + before)) if before else 0.0
        torch._foreach_lerp_(self._mean, list(self.parameters), 1 - decay)

    def values(self) -> list[Tensor]:
        return self._mean


class ScheduleFreeAverage:
    """x of the schedule-free optimizer. In training its parameters are y = (1 - beta1)·z + beta1·x."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: Optimizer):
        self.parameters, self.optimizer = parameters, optimizer

    def update(self, step: int) -> None:
        """Does nothing: the optimizer updates x."""

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """x of each parameter, in its shape. One that took no step has no z and is its own average."""
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        ahead = [self.optimizer.state[p].get("z", p) for p in self.parameters]
        return [y.lerp(z, 1 - 1 / beta1) for y, z in zip(self.parameters, ahead, strict=True)]


def average_of(config: TrainConfig, parameters: list[nn.Parameter], optimizer: Optimizer) -> Average | None:
    """The average that these settings ask for; None for none."""
    if config.optimizer == SCHEDULE_FREE:
        return ScheduleFreeAverage(parameters, optimizer)
    return MovingAverage(parameters, config.ema_decay) if config.use_ema else None


@contextmanager
def lent(average: Average | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """For the length of the block the parameters hold the average; afterwards their own bits return. Do not nest."""
    if average is None:
        yield
        return
    own = copies(parameters)
    put(average.values(), parameters)
    try:
        yield
    finally:
        put(own, parameters)


def copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def put(values: list[Tensor], parameters: list[nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
