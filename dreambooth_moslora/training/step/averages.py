"""The average of the adapter over its steps: with one, it is the average that is published, scored and sampled.

    exponential (`--use_ema`)   m = d·m + (1 - d)·w after each step, d = min(decay, (1 + n)/(10 + n)) of diffusers
    schedule-free               x of Defazio et al. 2024 (arXiv 2405.15682), which that optimizer keeps by itself

The steps themselves go on from the weights w. A checkpoint holds both: the average as its adapter, for everybody who
loads it, and the weights beside it.
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
    """Of a list of parameters, in its order."""

    def update(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""

    def values(self) -> list[Tensor]: ...


class MovingAverage:
    """The exponential average of `parameters`, which it begins with.

    Early on it forgets faster than by `decay`: at step n it reaches about n/9 steps back, so that a run of a few
    hundred steps is not averaged with its start. As diffusers' `EMAModel`.
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
    """x of the schedule-free optimizer, whose parameters are y = (1 - beta1)·z + beta1·x while it trains."""

    def __init__(self, parameters: list[nn.Parameter], optimizer: Optimizer):
        self.parameters, self.optimizer = parameters, optimizer

    def update(self, step: int) -> None:
        """The optimizer does it."""

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """A parameter that took no step has no z: it is its own average."""
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        ahead = [self.optimizer.state[p].get("z", p) for p in self.parameters]
        return [y.lerp(z, 1 - 1 / beta1) for y, z in zip(self.parameters, ahead, strict=True)]


def average_of(config: TrainConfig, parameters: list[nn.Parameter], optimizer: Optimizer) -> Average | None:
    """None: the adapter is what its steps have made of it."""
    if config.optimizer == SCHEDULE_FREE:
        return ScheduleFreeAverage(parameters, optimizer)
    return MovingAverage(parameters, config.ema_decay) if config.use_ema else None


@contextmanager
def lent(average: Average | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters hold the average for the length of a `with` block, and their own bits afterwards. Not nested."""
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
