"""SDXL's own structure with random weights, made in seconds, for timings without a download.

`sdxl` is the full size (UNet 2.57 billion parameters); `small` has the same topology with a
fortieth of the width, for tests. The weights are one random megabyte repeated, scaled by
1/sqrt(fan-in), so that activations neither grow nor vanish.

    python -m benchmarks.random_sdxl --out FOLDER

writes a whole base (6.5 GB) with the toy world's tokenizer: `train_dreambooth.py` runs on it as on
the real one.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth_moslora.extras.lab.full_step import WIDTHS, build_random_module, build_random_unet

__all__ = ["build_random_sdxl", "build_random_encoders", "build_random_unet", "build_random_vae"]

VOCABULARY_SIZE = 49408  # CLIP's vocabulary
TOKENIZER = Path(__file__).parent.parent / "assets" / "toy-sdxl" / "tokenizer"


def build_random_vae(size: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
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
    return build_random_module(lambda: AutoencoderKL(**options), dtype)


def build_random_encoders(
    size: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, nn.Module]:
    """CLIP ViT-L/14 and OpenCLIP bigG/14, the text halves."""
    full, (first, second) = size == "sdxl", WIDTHS[size]
    config = build_text_config(first, 12 if full else 2, hidden_act="quick_gelu")
    config_2 = build_text_config(
        second, 32 if full else 2, hidden_act="gelu", projection_dim=second
    )
    return build_random_module(lambda: CLIPTextModel(config), dtype), build_random_module(
        lambda: CLIPTextModelWithProjection(config_2), dtype
    )


def build_text_config(width: int, layers: int, **options) -> CLIPTextConfig:
    heads = max(1, width // 64)
    widths = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPTextConfig(vocab_size=VOCABULARY_SIZE, num_hidden_layers=layers, **widths, **options)


def build_random_sdxl(size: str) -> StableDiffusionXLPipeline:
    """Build all parts in bf16. The tokenizer has fewer tokens than the text encoders."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    first, second = build_random_encoders(size)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    vae, unet = build_random_vae(size, torch.bfloat16), build_random_unet(size)
    return StableDiffusionXLPipeline(vae, first, second, tokenizer, tokenizer, unet, scheduler)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=WIDTHS, default="sdxl")
    args = parser.parse_args()
    build_random_sdxl(args.size).save_pretrained(args.out)


if __name__ == "__main__":
    main()
