"""Gradient checkpointing: blocks are computed again in the backward pass."""

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch.utils.checkpoint import checkpoint

from dreambooth_moslora.settings.train_config import TrainConfig


class CheckpointedFeedForward(FeedForward):
    """Feed-forward block that keeps only its input for the backward pass, which recomputes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False)


def apply_gradient_checkpointing(config: TrainConfig, module: torch.nn.Module) -> None:
    """Let blocks be computed again in the backward pass, in place, as the settings say: all, or the
    feed-forward ones alone."""
    # In a block nothing but an adapter's dropout is random. Without it the generator's state is not
    # kept, which torch would read from the GPU once for each tensor of each block.
    options = {"use_reentrant": False, "preserve_rng_state": config.lora_dropout > 0}

    def run_checkpointed(block: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, **options)

    # diffusers and transformers name the method differently.
    if config.gradient_checkpointing:
        if hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing(run_checkpointed)
        else:
            module.gradient_checkpointing_enable(options)

    # Feed-forward blocks keep two fifths of what the UNet keeps for the backward pass. A step that
    # ran out of memory may change the settings, so they are turned on as well as off.
    is_apart = config.recompute_feed_forward and not config.gradient_checkpointing
    for part in module.modules():
        if type(part) in (FeedForward, CheckpointedFeedForward):
            part.__class__ = CheckpointedFeedForward if is_apart else FeedForward
