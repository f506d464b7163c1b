"""The UNet's own versions of the renders' latents, from which a decoder learns to mend the UNet's errors.

    python -m toybox.estimate_latents --data DATA --latents WORK/latents.safetensors --unet WORK/unet/model \
        --clip WORK/clip/model --tokenizer WORK/tokenizer --out WORK/estimates.safetensors --count 2000

A latent is noised to a random level and sampled back to none, as the pipeline samples (Meng et al., "SDEdit",
2021). The picture stays the same; its detail is the UNet's. Resumable, in pieces.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from toybox.assemble import scheduler
from toybox.channels_last import to_channels_last
from toybox.data import Renders
from toybox.pieces import kept
from toybox.train_unet import TextTowers

__all__ = ["resample", "start_steps"]

STEPS, GUIDANCE = 30, 2.5  # as the base is evaluated
STRONGEST, WEAKEST = 1.5, 0.15  # noise to start from, in deviations of the latents
PIECE = 64  # latents sampled at once, all from the same level


def start_steps(sampler: EulerDiscreteScheduler) -> list[int]:
    """The sampler's steps at which its noise lies between `WEAKEST` and `STRONGEST`."""
    return [i for i, sigma in enumerate(sampler.sigmas.tolist()) if WEAKEST <= sigma <= STRONGEST]


@torch.no_grad()
def resample(
    unet: UNet2DConditionModel,
    latents: Tensor,
    conditions: tuple[Tensor, Tensor],
    time_ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Scaled latents (N,4,16,16), noised and sampled again under their captions' (embeds, pooled)."""
    sampler = scheduler()
    sampler.set_timesteps(STEPS)
    starts = start_steps(sampler)
    start = starts[int(torch.randint(len(starts), (), generator=generator))]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    x = latents + sampler.sigmas[start] * noise
    embeds, pooled = (torch.cat([torch.zeros_like(c), c]) for c in conditions)
    added = {"text_embeds": pooled, "time_ids": time_ids.repeat(2, 1)}
    for t in sampler.timesteps[start:]:
        twice = to_channels_last(sampler.scale_model_input(x, t).repeat(2, 1, 1, 1), embeds.dtype)
        without, said = unet(twice, t, embeds, added_cond_kwargs=added).sample.float().chunk(2)
        x = sampler.step(without + GUIDANCE * (said - without), t, x).prev_sample
    return x


def estimates(rows: range, renders: Renders, cache: dict, towers: TextTowers, unet: UNet2DConditionModel) -> dict:
    """Of the whole renders among `rows`: their numbers (N,) and resampled latents (N,4,16,16) fp16."""
    picked = torch.tensor([i for i in rows if is_whole(cache["time_ids"][i])])
    conditions = towers([renders.rows[i]["canonical_caption"] for i in picked.tolist()])
    generator = torch.Generator().manual_seed(rows.start)
    latents, time_ids = (cache[name][picked].float().to(towers.device) for name in ("latents", "time_ids"))
    found = resample(unet, latents, conditions, time_ids, generator)
    return {"rows": picked, "latents": found.half().cpu()}


def is_whole(time_ids: Tensor) -> bool:
    """Neither cropped nor shrunk before it was encoded (`cache_latents.view`): it decodes to its render."""
    return bool(time_ids[2] == time_ids[3] == 0 and time_ids[0] % 128 == 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "latents", "unet", "clip", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000, help="renders to take, from the first")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    renders, cache = Renders(args.data), load_file(args.latents)
    towers = TextTowers(args.clip, args.tokenizer, device=args.device)
    unet = UNet2DConditionModel.from_pretrained(args.unet).eval()
    unet.to(args.device, dtype=torch.bfloat16, memory_format=torch.channels_last)
    pieces, found = args.out.with_suffix(".pieces"), []
    for start in tqdm(range(0, args.count, PIECE), desc="estimate"):
        rows = range(start, min(start + PIECE, args.count))
        found.append(kept(pieces / f"{rows.stop}.safetensors", partial(estimates, rows, renders, cache, towers, unet)))
    save_file({name: torch.cat([piece[name] for piece in found]) for name in found[0]}, args.out)
    shutil.rmtree(pieces)


if __name__ == "__main__":
    main()
