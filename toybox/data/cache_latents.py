"""Encodes the renders once, resumable: a latent of each (mostly whole, else cropped or small) with
SDXL's time ids.

Each latent comes with the fraction of each of its cells that a toy covers, which weighs the UNet's
loss, and with the CLIP vision tower's features of the picture (`toybox.learning.alignment`).

    python -m toybox.data.cache_latents --data DATA --vae WORK/vae/model --clip WORK/clip/model \
        --out WORK/latents.safetensors

The time ids are true: (original height, width, crop top, left, target height, width), as in SDXL
(Podell et al., 2023, section 2.2). A whole render stands for a photo of any size from 128 to 1024
px; a crop comes from an enlarged render; a small one was first shrunk to 48-96 px.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from tqdm import tqdm

from toybox.data.pieces import load_or_make
from toybox.data.renders import Renders, to_pixels, to_uint8
from toybox.learning.alignment import VisionTower
from toybox.learning.channels_last import to_channels_last
from toybox.render import render_masks
from toybox.world import Scene

__all__ = ["crop_random", "shrink_small", "sample_view", "keep_whole"]

SIZE_PX = 128
PIECE_SIZE = 32 * 16  # images in a file while the work goes on


def add_toy_masks(renders: Renders, indices: range) -> Tensor:
    """fp32 (N,4,128,128): the renders' pixels in [-1, 1], and as a fourth channel 1 where a toy is,
    0 elsewhere."""
    scenes = [Scene.from_dict(renders.rows[i]["scene"]) for i in indices]
    masks = interpolate(
        render_masks(scenes, 32)[:, None].float(), size=(SIZE_PX, SIZE_PX), mode="bilinear"
    )
    return torch.cat([to_pixels(renders.load_images(indices)), masks], dim=1)


def keep_whole(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """(C,128,128) -> the same, and its six time ids."""
    original = int(torch.randint(1, 9, (), generator=generator)) * SIZE_PX
    return pixels, [original, original, 0, 0, SIZE_PX, SIZE_PX]


def crop_random(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """(C,128,128) -> the same and its time ids: enlarged by 1.05 to 1.4, and cropped to 128 px
    anywhere."""
    size = int(SIZE_PX * (1.05 + 0.35 * torch.rand((), generator=generator)))
    top_px, left_px = torch.randint(0, size - SIZE_PX + 1, (2,), generator=generator).tolist()
    enlarged = interpolate(pixels[None], size=(size, size), mode="bicubic", antialias=True)[0]
    return enlarged[:, top_px : top_px + SIZE_PX, left_px : left_px + SIZE_PX], [
        size,
        size,
        top_px,
        left_px,
        SIZE_PX,
        SIZE_PX,
    ]


def shrink_small(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """(C,128,128) -> the same and its time ids: shrunk to 48-96 px and enlarged again, like a small
    photo."""
    size = int(torch.randint(48, 97, (), generator=generator))
    shrunk = interpolate(pixels[None], size=(size, size), mode="bicubic", antialias=True)
    back = interpolate(shrunk, size=(SIZE_PX, SIZE_PX), mode="bicubic")[0]
    return back, [size, size, 0, 0, SIZE_PX, SIZE_PX]


def sample_view(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """(C,128,128) -> the same and its time ids: of a hundred, 83 are whole, 12 cropped, 5 small."""
    kind = float(torch.rand((), generator=generator))
    return (keep_whole if kind < 0.83 else crop_random if kind < 0.95 else shrink_small)(
        pixels, generator
    )


@torch.no_grad()
def encode(
    renders: Renders, numbers: range, vae: AutoencoderKL, sight: VisionTower, first: int = 0
) -> dict[str, Tensor]:
    """latents (N,4,16,16) fp16, scaled; time_ids (N,6) int16; toys (N,16,16) fp16 in [0, 1]; seen
    (N,160,4,4) fp16.

    `first` is the number of the renders' first picture in a growing set: the views are drawn by
    these numbers.
    """
    vae.eval().to(sight.device, dtype=sight.dtype, memory_format=torch.channels_last)
    latents, toys, features, ids = [], [], [], []
    for start in range(numbers.start, numbers.stop, 32):
        generator = torch.Generator().manual_seed(first + start)
        pixels = add_toy_masks(renders, range(start, min(start + 32, numbers.stop)))
        views = [sample_view(p, generator) for p in pixels]
        x = torch.stack([v for v, _ in views])
        features.append(sight(to_uint8(x[:, :3])))
        mean = (
            vae.encode(to_channels_last(x[:, :3].clamp(-1, 1)).to(sight.device))
            .latent_dist.mean.float()
            .cpu()
        )
        latents.append((mean * vae.config.scaling_factor).half().contiguous())
        toys.append(adaptive_avg_pool2d(x[:, 3].clamp(0, 1), latents[-1].shape[-2:]).half())
        ids += [i for _, i in views]
    return {
        "latents": torch.cat(latents),
        "toys": torch.cat(toys),
        "seen": torch.cat(features).contiguous(),
        "time_ids": torch.tensor(ids, dtype=torch.int16),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="only the first so many images")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    sight = VisionTower(args.clip / "image_encoder", device=args.device)
    renders, vae = Renders(args.data, args.limit), AutoencoderKL.from_pretrained(args.vae)
    pieces, shards = args.out.with_suffix(".pieces"), []
    for start in tqdm(range(0, len(renders), PIECE_SIZE), desc="encode"):
        numbers = range(start, min(start + PIECE_SIZE, len(renders)))
        shards.append(
            load_or_make(
                pieces / f"{numbers.stop}.safetensors",
                partial(encode, renders, numbers, vae, sight),
            )
        )
    tensors = {name: torch.cat([piece[name] for piece in shards]) for name in shards[0]}
    save_file(tensors, args.out)
    shutil.rmtree(pieces)
    print(
        {k: tuple(v.shape) for k, v in tensors.items()},
        "std",
        float(tensors["latents"].float().std()),
    )


if __name__ == "__main__":
    main()
