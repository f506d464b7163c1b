"""Measures the embedded base on prompts and seeds outside its training; writes a contact sheet and a JSON of scores.

    python -m toybox.measures.evaluate_base --base assets/toy-sdxl --out WORK/evaluation --images 400

Prompts are canonical captions of random toys, once of combinations (kind, colour, place) in the training and
once of held-out ones. 30 Euler steps, guidance 2.5. The judge reads the generated pictures and, for comparison,
fresh renders of the same scenes. `toybox.measures.swd` measures how far both differ in detail and contrast,
which the judge overlooks.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from toybox.captions import canonical_caption
from toybox.data.renders import to_uint8
from toybox.measures.swd import distances
from toybox.readers import judge
from toybox.render import render
from toybox.world import Scene, sample_scene

__all__ = ["accuracy", "generate", "scenes_for", "sheet"]

STEPS, GUIDANCE = 30, 2.5


def scenes_for(count: int, held_out: bool, seed: int) -> list[Scene]:
    """Scenes of one toy by day."""
    rng, scenes = random.Random(f"evaluation {seed} {held_out}"), []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=held_out)
        if len(scene.toys) == 1 and scene.light == "day":
            scenes.append(scene)
    return scenes


def generate(pipeline: StableDiffusionXLPipeline, prompts: list[str], seed: int = 0, batch: int = 10) -> Tensor:
    """uint8 (N,128,128,3); image i is made from seed + i."""
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pixels = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
        ).images
        images.append(to_uint8(pixels * 2 - 1))
    return torch.cat(images)


def accuracy(images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Fraction of images (N,H,W,3) in which the judge reads the scene's kind, main colour, place, and all three."""
    readings = judge.load().read(images)
    right = torch.tensor(
        [
            [r.kind == s.toys[0].kind, r.colour == s.toys[0].colour, r.place == s.place]
            for r, s in zip(readings, scenes, strict=True)
        ]
    ).float()
    names = ("kind", "colour", "place")
    return {
        **{name: round(float(v), 4) for name, v in zip(names, right.mean(0))},
        "all": round(float(right.prod(1).mean()), 4),
    }


def sheet(images: Tensor, columns: int = 10) -> Image.Image:
    """A contact sheet of uint8 images (N,H,W,3)."""
    rows = [torch.cat(list(row), dim=1) for row in images.split(columns) if len(row) == columns]
    return Image.fromarray(torch.cat(rows, dim=0).numpy())


def timings(base: Path) -> dict[str, float]:
    """Seconds to load, and to generate four images of 30 steps."""
    start = time.perf_counter()
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    loaded = time.perf_counter()
    pipeline.set_progress_bar_config(disable=True)
    generate(pipeline, ["a photo of a red robot on grass"] * 4)
    return {
        "load_sec": round(loaded - start, 2),
        "four_images_sec": round(time.perf_counter() - loaded, 2),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("assets/toy-sdxl"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scores = {"timings": timings(args.base)}
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.base)
    for name, held_out, seed in (("seen combinations", False, 0), ("held-out combinations", True, 50_000)):
        scenes = scenes_for(args.images, held_out, seed)
        images, renders = generate(pipeline, [canonical_caption(s) for s in scenes], seed), render(scenes)
        scores[name] = {
            "generated": accuracy(images, scenes) | {"swd": distances(images, renders)},
            "renders": accuracy(renders, scenes),
        }
        sheet(images[:100]).save(args.out / f"sheet_{'held_out' if held_out else 'seen'}.png")
        print(name, json.dumps(scores[name]), flush=True)
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores["timings"]))


if __name__ == "__main__":
    main()
