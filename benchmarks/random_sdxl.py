"""SDXL's own structure with random weights, made in seconds: for timings no weight has to be downloaded.

`sdxl` is the full size (UNet 2.57 billion parameters); `small` has the same topology at a fortieth of the width, for
tests. Weights are one random megabyte repeated, scaled by 1/sqrt(fan-in), so that no activation grows or dies.

    python -m benchmarks.random_sdxl --out FOLDER

writes a whole base (6.5 GB) with the toy world's tokenizer: `train_dreambooth.py` runs on it as on the real one.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["SIZES", "pooled_width", "random_sdxl", "random_text_encoders", "random_unet", "random_vae", "text_width"]

SIZES = ("sdxl", "small")
WORDS = 49408  # CLIP's vocabulary
TOKENIZER = Path(__file__).parent.parent / "assets" / "toy-sdxl" / "tokenizer"


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


def random_vae(size: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """SDXL's autoencoder."""
    widths = (128, 256, 512, 512) if size == "sdxl" else (32, 32, 64, 64)
    options = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    }
    return made(lambda: AutoencoderKL(**options), dtype)


def random_text_encoders(size: str, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    """CLIP ViT-L/14 and OpenCLIP bigG/14, the text halves."""
    full, (first, second) = size == "sdxl", text_widths(size)
    config = text_config(first, 12 if full else 2, hidden_act="quick_gelu")
    config_2 = text_config(second, 32 if full else 2, hidden_act="gelu", projection_dim=second)
    return made(lambda: CLIPTextModel(config), dtype), made(lambda: CLIPTextModelWithProjection(config_2), dtype)


def text_config(width: int, layers: int, **options) -> CLIPTextConfig:
    heads = max(1, width // 64)
    widths = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPTextConfig(vocab_size=WORDS, num_hidden_layers=layers, **widths, **options)


def random_sdxl(size: str) -> StableDiffusionXLPipeline:
    """All of it in bf16. The tokenizer's words are fewer than the text encoders know."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    first, second = random_text_encoders(size)
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    vae, unet = random_vae(size, torch.bfloat16), random_unet(size)
    return StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer, unet, scheduler)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="sdxl")
    args = parser.parse_args()
    random_sdxl(args.size).save_pretrained(args.out)


if __name__ == "__main__":
    main()
