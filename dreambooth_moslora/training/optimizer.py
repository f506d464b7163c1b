"""Parameter groups, optimizers, their states in a checkpoint, and the average over the steps.

The schedule-free optimizer (Defazio et al. 2024, arXiv 2405.15682) keeps an average x of its steps.
It is published, scored and sampled instead of the weights, from which training continues; a
checkpoint holds both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dreambooth_moslora.errors import UserError
from dreambooth_moslora.method.moslora import list_adapter_parameters, list_mixer_parameters
from dreambooth_moslora.settings import family_facts, optimizers, train_config


def build_parameter_groups(
    config: train_config.TrainConfig,
    components: dict[str, torch.nn.Module],
    world_size: int = 1,
) -> list[dict]:
    """Return the parameters in groups, each with its own rate and decay.

    config: the run's settings
    components: the modules that hold the adapter, by diffusers' names
    world_size: the number of processes

    For each component there is a group of A and B and one of the mixers. Empty groups are left out.
    """
    # As in diffusers' script, `scale_lr` scales the denoiser's rate, and that of text encoders
    # only where they have none of their own.
    unet_lr = config.learning_rate
    if config.scale_lr:
        unet_lr *= config.gradient_accumulation_steps * config.train_batch_size * world_size
    text_lr = config.text_encoder_lr or unet_lr
    if optimizers.get_optimizer_kind(config).one_rate:
        text_lr = unet_lr

    groups: list[dict] = []

    def add(name: str, params: list[torch.nn.Parameter], lr: float, decay: float) -> None:
        if params:
            groups.append({"name": name, "params": params, "lr": lr, "weight_decay": decay})

    for name, module in components.items():
        is_text = name not in family_facts.DENOISERS
        lr = text_lr if is_text else unet_lr
        decay = config.adam_weight_decay_text_encoder if is_text else config.adam_weight_decay
        mixers = [p for _, p in list_mixer_parameters(module)]
        mixer_ids = {id(p) for p in mixers}
        factors = [p for _, p in list_adapter_parameters(module) if id(p) not in mixer_ids]

        # Mixers do not decay: that would pull them to zero, not to their start.
        add(name, factors, lr=lr, decay=decay)
        add(f"{name}.mixer", mixers, lr=lr * config.mixer_lr_scale, decay=0.0)
    return groups


def get_optimizer_name(config: train_config.TrainConfig) -> str:
    """Return the optimizer's name. Optimizers of the same name read each other's states."""
    is_8_bit = config.use_8bit_adam and optimizers.get_optimizer_kind(config).in_8_bit
    return f"{config.optimizer}8bit" if is_8_bit else config.optimizer


def make_optimizer(config: train_config.TrainConfig, groups: list[dict]) -> Optimizer:
    """Return the optimizer of `config.optimizer`, by its row of the table. Raises UserError when
    its package is missing."""
    kind = optimizers.get_optimizer_kind(config)
    is_8_bit = config.use_8bit_adam and kind.in_8_bit

    # Its package is imported only for a run that uses it.
    home = kind.in_8_bit if is_8_bit else kind.import_path
    try:
        optimizer_class = import_object(home)
    except ImportError as error:
        package = "bitsandbytes" if is_8_bit else kind.package
        flag = "--use_8bit_adam" if is_8_bit else f"--optimizer {config.optimizer}"
        raise UserError(f"{flag} needs {package}: pip install {package}.") from error

    # Each group has its own rate; some optimizers ask for one all the same. One that averages has
    # to be told that it trains.
    optimizer = optimizer_class(groups, lr=groups[0]["lr"], **kind.build_options(config))
    if kind.averages:
        optimizer.train()
    return optimizer


def make_lr_schedule(
    config: train_config.TrainConfig, optimizer: Optimizer, max_train_steps: int
) -> LambdaLR:
    """Return the learning-rate schedule of `config.lr_scheduler`, in optimizer steps of any number
    of processes.

    `checkpoint.restore_optimizer` reads its `lr_lambdas`: all that diffusers gives are LambdaLR.
    """
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        # polynomial divides by the steps after the warm-up, after the run's last step too
        num_training_steps=max(max_train_steps, config.lr_warmup_steps + 1),
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def import_object(home: str) -> Any:
    """Import the object of `module:name`. Raises ImportError."""
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


def merge_group_settings(states: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a checkpoint's states with the settings of the optimizer's groups.

    What the steps have learnt, such as Prodigy's estimate of the rate, is the checkpoint's. Raises
    ValueError for another number of groups.
    """
    learns = {name for kind in optimizers.OPTIMIZERS.values() for name in kind.learns}
    groups = optimizer.state_dict()["param_groups"]
    for group, saved_group in zip(groups, states["param_groups"], strict=True):
        group.update({name: saved_group[name] for name in learns & saved_group.keys()})
    return {"state": states["state"], "param_groups": groups}


@dataclass(frozen=True)
class ScheduleFreeAverage:
    """x of the schedule-free optimizer. In training its parameters are
    y = (1 - beta1)·z + beta1·x."""

    parameters: list[torch.nn.Parameter]
    optimizer: Optimizer

    @torch.no_grad()
    def compute_average(self) -> list[torch.Tensor]:
        """x of each parameter, in its shape. One that took no step has no z and is its own
        average."""
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        ahead = [self.optimizer.state[p].get("z", p) for p in self.parameters]
        return [y.lerp(z, 1 - 1 / beta1) for y, z in zip(self.parameters, ahead, strict=True)]


def build_average(
    config: train_config.TrainConfig, parameters: list[torch.nn.Parameter], optimizer: Optimizer
) -> ScheduleFreeAverage | None:
    """Return the average that the optimizer keeps; None if it keeps none."""
    if not optimizers.get_optimizer_kind(config).averages:
        return None
    return ScheduleFreeAverage(parameters, optimizer)


@contextmanager
def use_averaged_weights(
    average: ScheduleFreeAverage | None, parameters: list[torch.nn.Parameter]
) -> Iterator[None]:
    """Swap the averaged weights in for the duration of the block; afterwards the weights return bit
    for bit. Do not nest."""
    if average is None:
        yield
        return
    weights = clone_weights(parameters)
    copy_into(average.compute_average(), parameters)
    try:
        yield
    finally:
        copy_into(weights, parameters)


def clone_weights(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Copies of the weights, on the same device."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def copy_into(values: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """Write the values into the parameters, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
