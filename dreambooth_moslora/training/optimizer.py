"""Parameter groups, optimizers, their states in a checkpoint, and averages over the steps.

**States** in a checkpoint are checked before PyTorch's kernels read them: a kernel would read and write beyond the end
of a smaller moment. What is expected comes from a copy of the optimizer that takes one step.

**Average** of the adapter over its steps. If there is one, it is published, scored and sampled instead of the weights,
from which training continues; a checkpoint holds both.

exponential (`--use_ema`)   m = d·m + (1 - d)·w after each step, d = min(decay, (1 + n)/(10 + n)) of diffusers
schedule-free               x of Defazio et al. 2024 (arXiv 2405.15682), which that optimizer keeps by itself
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dreambooth_moslora.adapters.moslora import adapter_parameters, mixer_parameters
from dreambooth_moslora.core import UserError, is_number
from dreambooth_moslora.settings import families, optimizer_kinds, table


def parameter_groups(
    config: table.TrainConfig,
    components: dict[str, torch.nn.Module],
    world_size: int = 1,
    tokens: Sequence[torch.nn.Parameter] = (),
) -> list[dict]:
    """Groups of A and B, and of mixers, for the UNet and each text encoder, then of new tokens, without empty ones.
    Mixers do not decay: that would pull them to zero, not to their start; in LoRA+ they belong to B's group. As in
    diffusers' script, `scale_lr` scales only the UNet's rate, which text encoders without one use too."""
    lr_scale = config.gradient_accumulation_steps * config.train_batch_size * world_size if config.scale_lr else 1
    groups = []
    unet_lr = lr_scale * config.learning_rate
    text_lr = unet_lr if optimizer_kinds.optimizer_of(config).one_rate else config.text_encoder_lr or unet_lr
    for name, module in components.items():
        is_text = name not in families.DENOISERS
        lr = text_lr if is_text else unet_lr
        decay = config.adam_weight_decay_text_encoder if is_text else config.adam_weight_decay
        mixers = [p for _, p in mixer_parameters(module)]
        mixer_ids = {id(p) for p in mixers}
        others = [p for _, p in adapter_parameters(module) if id(p) not in mixer_ids]
        mixer_lr = lr * config.mixer_lr_scale
        groups.append({"name": name, "params": others, "lr": lr, "weight_decay": decay})
        groups.append({"name": f"{name}.mixer", "params": mixers, "lr": mixer_lr, "weight_decay": 0.0})
    groups.append({"name": "tokens", "params": list(tokens), "lr": text_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def optimizer_kind(config: table.TrainConfig) -> str:
    """The optimizer's name. Optimizers of the same name read each other's states."""
    is_8_bit = config.use_8bit_adam and optimizer_kinds.optimizer_of(config).in_8_bit
    return f"{config.optimizer}8bit" if is_8_bit else config.optimizer


def make_optimizer(config: table.TrainConfig, groups: list[dict]) -> Optimizer:
    """The optimizer of `config.optimizer`, by its row of the table. Raises UserError when its package is missing."""
    kind = optimizer_kinds.optimizer_of(config)
    is_8_bit = config.use_8bit_adam and kind.in_8_bit
    home = kind.in_8_bit if is_8_bit else kind.home
    module, _, name = home.partition(":")
    try:
        found = getattr(import_module(module), name)
    except ImportError as error:
        package = "bitsandbytes" if is_8_bit else kind.package
        flag = "--use_8bit_adam" if is_8_bit else f"--optimizer {config.optimizer}"
        raise UserError(f"{flag} needs {package}: pip install {package}.") from error
    optimizer = found(groups, lr=groups[0]["lr"], **kind.options(config))
    if kind.averages:
        optimizer.train()
    return optimizer


def make_lr_schedule(config: table.TrainConfig, optimizer: Optimizer, max_train_steps: int) -> LRScheduler:
    """A learning-rate schedule of diffusers, in optimizer steps of any number of processes. Raises UserError."""
    # polynomial divides by the steps after the warm-up, after the run's last step too
    steps = max(max_train_steps, config.lr_warmup_steps + 1)
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as error:  # polynomial ends above zero
        other = "give a greater --learning_rate, or another schedule"
        raise UserError(f"--lr_scheduler {config.lr_scheduler}: {error}; {other}.") from error


NOT_SET = "p0"  # Prodigy's start of a weight. For a weight that started at zero it keeps a single number.


def checked_states(states: Mapping[str, Any], optimizer: Optimizer, step: int, exact: bool) -> dict[str, Any]:
    """The checkpoint's states at `step` with the groups' settings; `exact`: no fewer steps. Raises ValueError."""
    pattern = pattern_of(optimizer)
    groups = optimizer.state_dict()["param_groups"]
    loaded = states["param_groups"]
    if [group["params"] for group in loaded] != [group["params"] for group in groups]:
        raise ValueError("the groups of parameters are others")
    for number, state in states["state"].items():
        if number not in pattern:
            raise ValueError(f"there is no parameter {number}")
        check_state(dict(leaves_of(state)), dict(leaves_of(pattern[number])), step, exact)
    learns = {name for kind in optimizer_kinds.OPTIMIZERS.values() for name in kind.learns}
    for fresh, kept in zip(groups, loaded, strict=True):
        for name in learns & kept.keys():
            value = kept[name]
            fresh[name] = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
            if not is_number(fresh[name]):
                raise ValueError(f"{name} is not a number")
    return {"state": dense(states["state"]), "param_groups": groups}


def pattern_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The states of every parameter after the first step of such an optimizer."""
    groups = []
    for group in optimizer.param_groups:
        params = [torch.nn.Parameter(weight.detach().clone()) for weight in group["params"]]
        for weight in params:
            weight.grad = torch.ones_like(weight)
        groups.append({**group, "params": params})
    twin = type(optimizer)(groups)
    twin.step()
    return twin.state_dict()["state"]


def leaves_of(state: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested dicts: 8-bit AdamW nests."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def dense(value: Any) -> Any:
    """The same nested dicts and numbers; a file's tensor may have strides of 0, or share its memory with another."""
    if isinstance(value, Mapping):
        return {name: dense(part) for name, part in value.items()}
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value


def check_state(found: dict[str, Any], pattern: dict[str, Any], step: int, exact: bool) -> None:
    if found.keys() != pattern.keys():
        raise ValueError(f"states are {sorted(found)}, not {sorted(pattern)}")
    for name, expected in pattern.items():
        value = found[name]
        if name == "step":
            taken = value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
            if not isinstance(taken, (int, float)) or not (taken == step if exact else 0 <= taken <= step):
                raise ValueError(f"it has taken {taken} steps, not {step}")
        elif isinstance(expected, torch.Tensor):
            check_tensor(name, value, expected)
        elif type(value) is not type(expected):
            raise ValueError(f"{name} is a {type(value).__name__}")


def check_tensor(name: str, value: object, expected: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != expected.dtype or value.layout != expected.layout:
        raise ValueError(f"{name} is no tensor of {expected.dtype}")
    is_start = name == NOT_SET and value.dim() == 0
    if value.shape != expected.shape and not is_start and not (name == NOT_SET and expected.dim() == 0):
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(expected.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} is not finite")


class MovingAverage:
    """The exponential average of `parameters`, as diffusers' `EMAModel`: about n/9 steps back at step n."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self._mean = copies(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        before = step - 1
        decay = min(self.decay, (1 + before) / (10 + before)) if before else 0.0
        torch._foreach_lerp_(self._mean, list(self.parameters), 1 - decay)

    def values(self) -> list[torch.Tensor]:
        return self._mean


@dataclass(frozen=True)
class ScheduleFreeAverage:
    """x of the schedule-free optimizer. In training its parameters are y = (1 - beta1)·z + beta1·x."""

    parameters: list[torch.nn.Parameter]
    optimizer: Optimizer

    def update(self, step: int) -> None:
        """Does nothing: the optimizer updates x."""

    @torch.no_grad()
    def values(self) -> list[torch.Tensor]:
        """x of each parameter, in its shape. One that took no step has no z and is its own average."""
        beta1 = self.optimizer.param_groups[0]["betas"][0]
        ahead = [self.optimizer.state[p].get("z", p) for p in self.parameters]
        return [y.lerp(z, 1 - 1 / beta1) for y, z in zip(self.parameters, ahead, strict=True)]


def average_of(
    config: table.TrainConfig, parameters: list[torch.nn.Parameter], optimizer: Optimizer
) -> MovingAverage | ScheduleFreeAverage | None:
    if optimizer_kinds.optimizer_of(config).averages:
        return ScheduleFreeAverage(parameters, optimizer)
    return MovingAverage(parameters, config.ema_decay) if config.use_ema else None


@contextmanager
def lent(average: MovingAverage | ScheduleFreeAverage | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
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


def copies(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def put(values: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
