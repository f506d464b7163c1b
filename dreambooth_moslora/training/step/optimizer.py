"""Parameter groups with their learning rates, the optimizers, and the learning-rate schedule.

Beside AdamW (also in 8 bit) and Prodigy there are schedule-free AdamW, which needs no learning-rate schedule,
and Adafactor, which many recipes of other trainers use. Optimizers that only save memory are left out: Adam's
states take a third of a GiB for SDXL at rank 16.

Weight decay would pull a mixer towards zero instead of its start, so mixers have none. In terms of LoRA+ a
mixer belongs to B's group: `mixer_lr_scale` multiplies its learning rate.
"""

from collections.abc import Sequence

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dreambooth_moslora.adapters.moslora import adapter_parameters, mixer_parameters
from dreambooth_moslora.core.config.train_config import TrainConfig
from dreambooth_moslora.core.config.training_settings import OPTIMIZERS, SCHEDULE_FREE
from dreambooth_moslora.core.errors import UserError

__all__ = ["make_lr_schedule", "make_optimizer", "optimizer_kind", "parameter_groups"]


def parameter_groups(
    config: TrainConfig, components: dict[str, nn.Module], world_size: int = 1, tokens: Sequence[nn.Parameter] = ()
) -> list[dict]:
    """Groups of A and B, and of mixers, for the UNet and each text encoder, then of new tokens. Empty groups
    are left out.

    As in diffusers' script, `scale_lr` scales only the UNet's rate; text encoders without a rate use the
    UNet's.
    """
    lr_scale = config.gradient_accumulation_steps * config.train_batch_size * world_size if config.scale_lr else 1
    prodigy = config.optimizer.lower() == "prodigy"
    groups = []
    unet_lr = lr_scale * config.learning_rate
    text_lr = unet_lr if prodigy else config.text_encoder_lr or unet_lr
    for name, module in components.items():
        is_text = name != "unet"
        lr = text_lr if is_text else unet_lr
        decay = config.adam_weight_decay_text_encoder if is_text else config.adam_weight_decay
        mixers = [p for _, p in mixer_parameters(module)]
        mixer_ids = {id(p) for p in mixers}
        others = [p for _, p in adapter_parameters(module) if id(p) not in mixer_ids]
        groups.append({"name": name, "params": others, "lr": lr, "weight_decay": decay})
        groups.append(
            {"name": f"{name}.mixer", "params": mixers, "lr": lr * config.mixer_lr_scale, "weight_decay": 0.0}
        )
    groups.append({"name": "tokens", "params": list(tokens), "lr": text_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def optimizer_kind(config: TrainConfig) -> str:
    """The optimizer's name. Optimizers of the same name read each other's states."""
    return "AdamW8bit" if config.use_8bit_adam and config.optimizer == "AdamW" else config.optimizer


def make_optimizer(config: TrainConfig, groups: list[dict]) -> Optimizer:
    """The optimizer of `config.optimizer`. Raises UserError when its name is unknown or its package is not
    installed."""
    kind = config.optimizer.lower()
    if kind == "prodigy":
        return make_prodigy(config, groups)
    if kind == "adafactor":
        return make_adafactor(groups)
    if kind == SCHEDULE_FREE.lower():
        return make_schedule_free(config, groups)
    if kind != "adamw":
        raise UserError(f"--optimizer {config.optimizer} is unknown: choose {', '.join(OPTIMIZERS)}.")
    betas = (config.adam_beta1, config.adam_beta2)
    # Fused: one kernel for the hundreds of small matrices takes a quarter of the loop's time on a CPU.
    fused = {} if config.use_8bit_adam else {"fused": True}
    return adamw_class(config)(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, **fused)


def adamw_class(config: TrainConfig) -> type[Optimizer]:
    """AdamW, or its 8-bit version. Raises UserError when bitsandbytes is not installed."""
    if not config.use_8bit_adam:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
    return AdamW8bit


def make_prodigy(config: TrainConfig, groups: list[dict]) -> Optimizer:
    """Prodigy finds the learning rate by itself (Mishchenko & Defazio 2023); the given one, usually 1.0, multiplies it.

    On a GPU, a step reads two numbers per group instead of two per parameter (`flat_prodigy`). Raises UserError
    when it is not installed.
    """
    try:
        from prodigyopt import Prodigy

        from dreambooth_moslora.training.step.flat_prodigy import FlatProdigy
    except ImportError as error:
        raise UserError("--optimizer Prodigy needs prodigyopt: pip install prodigyopt.") from error
    is_on_cpu = groups[0]["params"][0].device.type == "cpu"
    return (Prodigy if is_on_cpu else FlatProdigy)(
        groups,
        lr=groups[0]["lr"],
        betas=(config.adam_beta1, config.adam_beta2),
        beta3=config.prodigy_beta3,
        eps=config.adam_epsilon,
        decouple=config.prodigy_decouple,
        use_bias_correction=config.prodigy_use_bias_correction,
        safeguard_warmup=config.prodigy_safeguard_warmup,
    )


def make_schedule_free(config: TrainConfig, groups: list[dict]) -> Optimizer:
    """AdamW that averages its steps (Defazio et al. 2024, arXiv 2405.15682); use a constant learning rate.

    The average is published (`averages`). Raises UserError when it is not installed.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise UserError(f"--optimizer {SCHEDULE_FREE} needs schedulefree: pip install schedulefree.") from error
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = AdamWScheduleFree(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    optimizer.train()
    return optimizer


def make_adafactor(groups: list[dict]) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018) at the given learning rate. It has no momentum.

    As kohya writes it: `scale_parameter=False relative_step=False warmup_init=False`.
    """
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=groups[0]["lr"], scale_parameter=False, relative_step=False)


def make_lr_schedule(config: TrainConfig, optimizer: Optimizer, max_train_steps: int) -> LRScheduler:
    """A learning-rate schedule of diffusers by its name. It counts optimizer steps, whatever the number of processes.

    Raises UserError for an unknown name.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler} is unknown to diffusers: {error}") from error
