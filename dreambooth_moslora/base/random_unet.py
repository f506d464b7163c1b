"""SDXL's UNet with random weights, made in seconds, to time a step without a download.

The weights are one random megabyte repeated, scaled by 1/sqrt(fan-in), so that activations neither grow nor
vanish.
"""

import math
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import nn

SIZES = ("sdxl", "small")
"""2.57 billion parameters, or the same topology with a fortieth of the width."""


def text_widths(size: str) -> tuple[int, int]:
    return (768, 1280) if size == "sdxl" else (32, 64)


def text_width(size: str) -> int:
    """Channels of the text embeddings that the UNet reads."""
    return sum(text_widths(size))


def pooled_width(size: str) -> int:
    return text_widths(size)[1]


def random_unet(size: str, dtype: torch.dtype = torch.bfloat16) -> UNet2DConditionModel:
    """stabilityai/stable-diffusion-xl-base-1.0's UNet."""
    full = size == "sdxl"
    time_width = 256 if full else 32
    options = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280) if full else (32, 64, 64),
        "attention_head_dim": (5, 10, 20) if full else (1, 2, 2),
        "transformer_layers_per_block": (1, 2, 10) if full else (1, 1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": 6 * time_width + pooled_width(size),
        "cross_attention_dim": text_width(size),
    }
    return made(lambda: UNet2DConditionModel(**options), dtype)


def made(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Build on the meta device, then fill: the modules' own initialisation of billions of numbers takes minutes."""
    with torch.device("meta"):
        module = nn.Module.to(build(), dtype)
    module.to_empty(device="cpu")
    noise = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)  # odd: no two rows are equal
    for part in module.modules():
        fill(part, noise)
    return module.eval()


@torch.no_grad()
def fill(module: nn.Module, noise: torch.Tensor) -> None:
    """Norms become 1 and 0, biases 0, matrices random, and buffers what their module computes."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1)
        else:
            repeat_into(parameter, noise, 1 / math.sqrt(parameter[0].numel()))
    for name, buffer in module.named_buffers(recurse=False):
        if name == "position_ids":
            buffer.copy_(torch.arange(buffer.shape[-1]))


def repeat_into(target: torch.Tensor, noise: torch.Tensor, scale: float) -> None:
    flat, scaled = target.view(-1), noise * scale
    for start in range(0, flat.numel(), scaled.numel()):
        piece = flat[start : start + scaled.numel()]
        piece.copy_(scaled[: piece.numel()])
