"""At which noise a base loses quality: renders are noised to a timestep, denoised by the base, and
compared.

    python -m toybox.measures.ladder assets/toy-zimage WORK/flow/model --out WORK/ladder

Each BASE is a pipeline's folder, of SDXL's or of Z-Image's architecture, and encodes and decodes
with its own autoencoder. All get the same renders, noise and captions, and no guidance. A table of
mean PSNRs in dB is printed: of the autoencoder alone, then from each timestep. What is lost at t =
100 is edges and small parts; what is lost at t = 400 is shapes. OUT/1.png is the first base's
strip: the renders, and below them a row for each column of the table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from toybox.captions import format_canonical_caption
from toybox.data.renders import to_uint8
from toybox.learning.train_unet import build_noise_schedule
from toybox.measures.evaluate_base import draw_sheet, sample_scenes
from toybox.measures.evaluate_parts import compute_psnr_db
from toybox.measures.velocity_error import BATCH, Predict, encode_images, load_predictor
from toybox.render import render

__all__ = ["denoise_latents", "build_rungs"]

STEPS = {100: 4, 200: 7, 400: 11}
"""How many steps the sampler takes from each timestep down to 0: a step for about 30 timesteps."""
SEED, SHOWN = 70_000, 10


def denoise_latents(
    predict: Predict, latents: Tensor, captions: list[str], timestep: int
) -> Tensor:
    """Scaled latents (N,4,H,W), noised to that timestep and denoised by DDIM (Song et al., 2021).

    x = a·z + b·n with a² + b² = 1. The prediction is v = a·n - b·z, so that z = a·x - b·v and n =
    b·x + a·v.
    """
    signal = build_noise_schedule().alphas_cumprod.sqrt()
    times = torch.linspace(timestep, 0, STEPS[timestep] + 1)[:-1].long()
    # The last step ends without noise.
    signals = torch.cat([signal[times], torch.ones(1)])
    noises = (1 - signals**2).sqrt()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
    x = signals[0] * latents + noises[0] * noise
    for i, time in enumerate(times):
        v = predict(x, time.repeat(len(x)), captions)
        clean = signals[i] * x - noises[i] * v
        noise = noises[i] * x + signals[i] * v
        x = signals[i + 1] * clean + noises[i + 1] * noise
    return x


def build_rungs(base: Path, images: Tensor, captions: list[str]) -> list[Tensor]:
    """Images (N,128,128,3) as the base's autoencoder alone gives them back, then from each
    timestep.

    All are uint8.
    """
    predict = load_predictor(base)
    latents = encode_images(base, images)
    stages = [latents]
    for timestep in STEPS:
        parts = []
        for start in range(0, len(latents), BATCH):
            part = slice(start, start + BATCH)
            parts.append(denoise_latents(predict, latents[part], captions[part], timestep))
        stages.append(torch.cat(parts))
    return [decode_latents(base, z) for z in stages]


def decode_latents(base: Path, latents: Tensor) -> Tensor:
    """Scaled latents (N,4,16,16) -> uint8 (N,128,128,3)."""
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval()
    parts = (latents / vae.config.scaling_factor).split(BATCH)
    return to_uint8(torch.cat([vae.decode(part).sample for part in parts]))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("bases", type=Path, nargs="+", metavar="BASE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=64)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(args.pictures, held_out=False, seed=SEED)
    captions = [format_canonical_caption(scene) for scene in scenes]
    images = render(scenes)
    print("base", "autoencoder", *(f"t = {timestep}" for timestep in STEPS), sep=" | ")
    shown_count = min(SHOWN, len(images))
    for number, base in enumerate(args.bases, start=1):
        rows = build_rungs(base, images, captions)
        figures = [f"{compute_psnr_db(images, row).mean():.2f}" for row in rows]
        print(base, *figures, sep=" | ", flush=True)
        strip = torch.cat([row[:shown_count] for row in (images, *rows)])
        draw_sheet(strip, columns=shown_count).save(args.out / f"{number}.png")


if __name__ == "__main__":
    main()
