"""Measure how far a base's predictions are from the true velocities of fresh renders: training
improves this before eyes see it.

    python -m toybox.measures.velocity_error assets/toy-sdxl assets/toy-zimage WORK/base

Each is a pipeline's folder, of SDXL's or of Z-Image's architecture. All get the same renders,
encoded by the first one's autoencoder (the others must be trained on its latents), the same noise
and captions, and no guidance. A table of mean squared errors is printed. None can fall to zero, as
noise cannot be told wholly from a picture.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from toybox.data.renders import to_pixels
from toybox.data.sample_latents import TIME_IDS
from toybox.learning.channels_last import to_channels_last
from toybox.learning.train_flow import FlowTeacher
from toybox.learning.train_unet import TextTowers, build_noise_schedule
from toybox.learning.training import compute_dtype
from toybox.measures.evaluate_parts import render_fresh

__all__ = ["compute_error", "load_predictor"]

TIMESTEPS = (100, 300, 500, 700)
BATCH = 32
Predict = Callable[[Tensor, Tensor, list[str]], Tensor]
"""Noisy latents (N,4,H,W), timesteps (N,) and captions -> velocities (N,4,H,W), fp32."""


def load_predictor(base: Path) -> Predict:
    if (base / "transformer").is_dir():
        return FlowTeacher(base)
    towers, dtype = TextTowers(base, base / "tokenizer"), compute_dtype()
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32).eval()
    unet.set_attn_processor(AttnProcessor())
    unet.to(dtype, memory_format=torch.channels_last)

    def predict(noisy: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        embeds, pooled = towers(captions)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([TIME_IDS]).repeat(len(noisy), 1)}
        return unet(
            to_channels_last(noisy, dtype), t, embeds, added_cond_kwargs=added
        ).sample.float()

    return predict


@torch.no_grad()
def compute_error(predict: Predict, latents: Tensor, captions: list[str], timestep: int) -> float:
    """Mean squared error of the velocities at scaled latents (N,4,H,W) and that timestep."""
    schedule, generator = build_noise_schedule(), torch.Generator().manual_seed(timestep)
    noise, t = (
        torch.randn(latents.shape, generator=generator),
        torch.full((len(latents),), timestep),
    )
    noisy, true = schedule.add_noise(latents, noise, t), schedule.get_velocity(latents, noise, t)
    parts = [slice(start, start + BATCH) for start in range(0, len(latents), BATCH)]
    return float(
        (torch.cat([predict(noisy[part], t[part], captions[part]) for part in parts]) - true)
        .square()
        .mean()
    )


@torch.no_grad()
def encode_images(base: Path, images: Tensor) -> Tensor:
    """uint8 (N,128,128,3) -> scaled latents (N,4,16,16), fp32."""
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval()
    means = [vae.encode(part).latent_dist.mean for part in to_pixels(images).split(BATCH)]
    return torch.cat(means) * vae.config.scaling_factor


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bases", type=Path, nargs="+", metavar="BASE")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0, help="of the renders' scenes")
    args = parser.parse_args(argv)
    images, captions = render_fresh(args.pictures, args.seed)
    latents = encode_images(args.bases[0], images)
    print("base", *(f"t = {timestep}" for timestep in TIMESTEPS), sep=" | ")
    for base in args.bases:
        predict = load_predictor(base)
        print(
            base,
            *(
                f"{compute_error(predict, latents, captions, timestep):.3f}"
                for timestep in TIMESTEPS
            ),
            sep=" | ",
        )


if __name__ == "__main__":
    main()
