"""Precision and gradient checkpointing of the page's runs, chosen by the GPU that they will run on."""

from dataclasses import replace
from typing import Any

from dreambooth_moslora.base.locate import base_folder
from dreambooth_moslora.core.config import TrainConfig
from dreambooth_moslora.training.planning.estimate import GIB, Estimate, estimate, size_of_base
from dreambooth_moslora.training.planning.memory_plan import USABLE, half_precision

__all__ = ["choice_lines", "memory_choice"]


def memory_choice(config: TrainConfig) -> dict[str, Any]:
    """The settings that let `config` train on this machine's GPU; none where there is no GPU.

    Half precision always, as fp32 is slower and larger; gradient checkpointing where the estimate needs it.
    """
    free = free_gib()
    if free is None:
        return {}
    precision = half_precision()
    size = size_of_base(base_folder(config), config.target_modules, config.variant)
    cost = estimate(replace(config, mixed_precision=precision), size, config.max_train_steps or 1, 1)
    is_short = cost.training_gib > USABLE * free
    return {"mixed_precision": precision, "gradient_checkpointing": is_short}


def choice_lines(config: TrainConfig, cost: Estimate) -> list[str]:
    """What was chosen and why, for the cost estimate; nothing where nothing was chosen."""
    free = free_gib() if config.mixed_precision else None
    if free is None:
        return []
    recomputed = "with" if config.gradient_checkpointing else "without"
    line = f"GPU: {free:.1f} GiB free for this run, so it trains in {config.mixed_precision}"
    lines = [f"{line}, {recomputed} gradient checkpointing"]
    if cost.peak_gib > free:
        lines.append("the GPU may have too little memory even so")
    return lines


def free_gib() -> float | None:
    """GiB for a run on the GPU: what is free, and what this process gives back when the run begins.

    None where there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
