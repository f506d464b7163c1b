"""Latents that the UNet draws from noise, on which the decoder is finished
(`toybox.learning.sharpen_decoder`).

    python -m toybox.data.sample_latents --data DATA --unet WORK/unet/model --clip WORK/clip/model \
        --tokenizer WORK/tokenizer --out WORK/samples.safetensors --count 1200

They follow the renders' captions, with the sampler and guidance of the base's evaluation.
Resumable, in pieces.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from toybox.assemble import build_scheduler
from toybox.data.pieces import load_or_make
from toybox.data.renders import Renders
from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.train_unet import TextTowers
from toybox.learning.training import compute_dtype

__all__ = ["draw"]

STEPS, GUIDANCE = 30, 2.5
PIECE_SIZE = 48  # latents sampled at once
TIME_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)  # a whole render


@torch.no_grad()
def draw(
    unet: UNet2DConditionModel, noise: Tensor, embeds: Tensor, pooled: Tensor, steps: int = STEPS
) -> Tensor:
    """Noise (N,4,16,16) of unit variance -> scaled latents of the same shape, under captions
    (N,77,256), (N,160)."""
    sampler = build_scheduler()
    sampler.set_timesteps(steps)
    x = noise * sampler.init_noise_sigma
    embeds, pooled = (torch.cat([torch.zeros_like(c), c]) for c in (embeds, pooled))
    added = {
        "text_embeds": pooled,
        "time_ids": torch.tensor([TIME_IDS]).repeat(len(embeds), 1).to(noise.device),
    }
    for t in sampler.timesteps:
        twice = to_channels_last(sampler.scale_model_input(x, t).repeat(2, 1, 1, 1), embeds.dtype)
        unconditional, conditional = (
            unet(twice, t, embeds, added_cond_kwargs=added).sample.float().chunk(2)
        )
        x = sampler.step(unconditional + GUIDANCE * (conditional - unconditional), t, x).prev_sample
    return x


def sample_latents(
    rows: range, renders: Renders, towers: TextTowers, unet: UNet2DConditionModel
) -> dict[str, Tensor]:
    embeds, pooled = towers([renders.rows[i]["canonical_caption"] for i in rows])
    generator = torch.Generator().manual_seed(rows.start)
    noise = torch.randn(len(rows), 4, 16, 16, generator=generator).to(towers.device)
    return {"latents": draw(unet, noise, embeds, pooled).half().cpu()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "unet", "clip", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1200, help="captions to take, from the first")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    renders, towers = Renders(args.data), TextTowers(args.clip, args.tokenizer, device=args.device)
    unet = UNet2DConditionModel.from_pretrained(args.unet, torch_dtype=torch.float32).eval()
    unet.set_attn_processor(AttnProcessor())
    dtype = compute_dtype(args.device)
    unet = replace_group_norms(unet).to(args.device, dtype=dtype, memory_format=torch.channels_last)
    pieces, shards = args.out.with_suffix(".pieces"), []
    for start in tqdm(range(0, min(args.count, len(renders.rows)), PIECE_SIZE), desc="sample"):
        rows = range(start, min(start + PIECE_SIZE, args.count))
        shards.append(
            load_or_make(
                pieces / f"{rows.stop}.safetensors",
                partial(sample_latents, rows, renders, towers, unet),
            )
        )
    save_file({"latents": torch.cat([piece["latents"] for piece in shards])}, args.out)
    shutil.rmtree(pieces)


if __name__ == "__main__":
    main()
