"""Measures the base's published VAE, CLIP and ViT on fresh renders; writes a JSON and a picture.

python -m toybox.measures.evaluate_parts --base assets/toy-sdxl --out WORK/evaluation --images 500

VAE: PSNR of its reconstruction in dB, pixels in [0, 1], the mean over the images and the tenth
percentile. CLIP: the fraction of images whose own caption is the nearest of 100 (the image encoder
against the second text encoder). ViT: the fraction of views whose nearest other one shows the same
individual, among 50 of its kind, with four views of each in other places. Any two of the 50 differ
in colours, pattern, material or accessories; among toys drawn at random some differ only in
proportions (`train_vit` measures those).
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm
from transformers import Dinov2Model

from toybox.captions import caption
from toybox.data.render_views import sample_sights
from toybox.data.renders import to_pixels, to_uint8
from toybox.learning.train_clip import convert_to_clip_pixels
from toybox.learning.train_vit import measure_separation
from toybox.measures.evaluate_base import draw_sheet
from toybox.render import render
from toybox.world import KINDS, Toy, sample_scene, sample_toy

__all__ = [
    "render_fresh",
    "measure_individuals",
    "sample_unlike_toys",
    "compute_psnr_db",
    "encode_and_decode",
    "measure_retrieval",
]


def render_fresh(count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """uint8 (count,128,128,3) and a varied caption of each, drawn from a seed that no training
    uses."""
    rng = random.Random(f"parts {seed}")
    scenes = [sample_scene(rng) for _ in range(count)]
    return render(scenes), [caption(scene, rng) for scene in scenes]


@torch.no_grad()
def encode_and_decode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """uint8 (N,H,W,3) encoded to the mode of the posterior and decoded again."""
    parts = (
        vae.decode(vae.encode(to_pixels(part)).latent_dist.mode()).sample
        for part in images.split(25)
    )
    return torch.cat([to_uint8(part.clamp(-1, 1)) for part in parts])


def compute_psnr_db(images: Tensor, references: Tensor) -> Tensor:
    """10·log10(255² / mean squared difference) of each pair, (N,)."""
    error = (images.float() - references.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


@torch.no_grad()
def measure_retrieval(
    base: StableDiffusionXLPipeline, images: Tensor, captions: list[str]
) -> float:
    """Fraction of images (N,H,W,3) whose own caption is the nearest of 100; the mean over the
    hundreds."""
    right = []
    for start in range(0, len(captions) - 99, 100):
        pixels, texts = (
            convert_to_clip_pixels(images[start : start + 100]),
            captions[start : start + 100],
        )
        tokens = base.tokenizer_2(texts, padding="max_length", truncation=True, return_tensors="pt")
        image_embeds = normalize(base.image_encoder(pixels).image_embeds, dim=-1)
        text_embeds = normalize(base.text_encoder_2(tokens.input_ids).text_embeds, dim=-1)
        right.append(((image_embeds @ text_embeds.T).argmax(1) == torch.arange(100)).float().mean())
    return float(torch.stack(right).mean())


def sample_unlike_toys(kind: str, count: int) -> list[Toy]:
    """Individuals of a kind, any two of which differ in more than proportions."""
    rng, individuals = random.Random(f"unlike {kind}"), {}
    while len(individuals) < count:
        toy = sample_toy(rng, kind)
        individuals.setdefault(replace(toy, genes=()), toy)
    return list(individuals.values())


def measure_individuals(vit: Dinov2Model, kind: str, count: int = 50, views: int = 4) -> float:
    rng = random.Random(f"views {kind}")
    scenes = [
        scene for toy in sample_unlike_toys(kind, count) for scene in sample_sights(rng, toy, views)
    ]
    return measure_separation(vit, render(scenes, compiled=len(scenes) > 50), views)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/toy-sdxl"))
    parser.add_argument("--dino", type=Path, default=Path("assets/toy-dino"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = StableDiffusionXLPipeline.from_pretrained(args.base)
    images, captions = render_fresh(args.images)
    again = encode_and_decode(base.vae, images)
    psnr = compute_psnr_db(images, again)
    vit = Dinov2Model.from_pretrained(args.dino, torch_dtype=torch.float32).eval()
    measured = [measure_individuals(vit, kind) for kind in tqdm(KINDS, desc="individuals")]
    scores = {
        "vae_psnr_db": round(float(psnr.mean()), 2),
        "vae_psnr_db_p10": round(float(psnr.quantile(0.1)), 2),
        "clip_retrieval_at_1_of_100": round(measure_retrieval(base, images, captions), 4),
        "vit_nearest_of_50_individuals": round(sum(measured) / len(measured), 4),
    }
    (args.out / "parts.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores))
    pairs = torch.cat([images[:8], again[:8], images[8:16], again[8:16]])
    draw_sheet(pairs, columns=8).save(args.out / "reconstructions.png")


if __name__ == "__main__":
    main()
