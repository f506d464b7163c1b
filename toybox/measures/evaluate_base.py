"""Measures the embedded base on prompts and seeds outside its training; writes a contact sheet and
a JSON of scores.

python -m toybox.measures.evaluate_base --base assets/toy-sdxl --out WORK/evaluation --images 400

Three groups of prompts: canonical captions of random toys, once of combinations (kind, colour,
place) in the training and once of held-out ones; and captions of toys with a pattern or an
ornament, which name all that is to be seen. 30 steps of the base's own sampler, guidance 2.5 unless
another is given. The judge reads the generated pictures and, for comparison, fresh renders of the
same scenes; it is asked for a second colour or for ornaments only where the prompt tells.
`toybox.measures.swd` measures how far both differ in detail and contrast, which the judge
overlooks.

Pictures that OUT holds already are not drawn again: a new judge reads them in seconds.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from PIL import Image
from torch import Tensor

from toybox.captions import format_canonical_caption, format_full_caption
from toybox.data.renders import to_uint8
from toybox.measures.swd import compute_distances
from toybox.readers import judge
from toybox.render import render
from toybox.world import Scene, sample_scene

__all__ = ["measure_accuracy", "generate", "sample_scenes", "draw_sheet"]

STEPS, GUIDANCE, SIDE_PX = 30, 2.5, 128


class Group(NamedTuple):
    """Prompts of one kind. `full`: they name all that is to be seen, of toys with a pattern or an
    ornament."""

    held_out: bool
    full: bool
    seed: int


GROUPS = {
    "seen combinations": Group(held_out=False, full=False, seed=0),
    "held-out combinations": Group(held_out=True, full=False, seed=50_000),
    "patterns and ornaments": Group(held_out=False, full=True, seed=90_000),
}


def sample_scenes(count: int, held_out: bool, seed: int, full: bool = False) -> list[Scene]:
    """Scenes of one toy by day; if `full`, of one that has a pattern or wears something."""
    rng, scenes = random.Random(f"evaluation {seed} {held_out}"), []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=held_out)
        toy, *other_toys = scene.toys
        plain = toy.pattern == "plain" and not toy.accessories
        if not other_toys and scene.light == "day" and not (full and plain):
            scenes.append(scene)
    return scenes


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int = 0,
    batch: int = 10,
    guidance: float = GUIDANCE,
) -> Tensor:
    """uint8 (N,128,128,3); image i is made from seed + i. Z-Image's guidance counts from 0, where
    SDXL's is 1."""
    images = []
    options = {
        "num_inference_steps": STEPS,
        "height": SIDE_PX,
        "width": SIDE_PX,
        "output_type": "pt",
    }
    options["guidance_scale"] = guidance - isinstance(pipeline, ZImagePipeline)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pixels = pipeline(part, generator=generators, **options).images
        images.append(to_uint8(pixels * 2 - 1))
    return torch.cat(images)


def measure_accuracy(images: Tensor, scenes: list[Scene], full: bool = False) -> dict:
    """Measure the fraction of images (N,H,W,3) in which the judge reads what the prompt tells of
    the scene, by question.

    `full`: the prompts name all. `ornaments_worn` is `ornaments` among the toys that wear
    something, `all` is kind, colour and place together. `intervals` holds the 95 % interval of each
    and the number of pictures.
    """
    right = [
        reading.check_answers(scene)
        for reading, scene in zip(judge.load().read(images), scenes, strict=True)
    ]
    told_facts = [list_told(scene, full) for scene in scenes]
    hits = {
        name: [r[name] for r, t in zip(right, told_facts) if t[name]] for name in judge.QUESTIONS
    }
    hits["ornaments_worn"] = [
        r["ornaments"] for r, s in zip(right, scenes) if full and s.toys[0].accessories
    ]
    hits["all"] = [r["kind"] and r["colour"] and r["place"] for r in right]
    hits = {name: values for name, values in hits.items() if values}
    shares = {name: round(sum(values) / len(values), 4) for name, values in hits.items()}
    return shares | {
        "intervals": {
            name: (*compute_wilson_interval(sum(v), len(v)), len(v)) for name, v in hits.items()
        }
    }


def list_told(scene: Scene, full: bool) -> dict[str, bool]:
    """Return whether the prompt tells the answer: a canonical one tells the second colour with a
    pattern, and names no ornament, so that it is right only of a toy that wears none."""
    toy = scene.toys[0]
    unsaid = {"colour2": toy.pattern != "plain", "ornaments": not toy.accessories}
    return {name: full or unsaid.get(name, True) for name in judge.QUESTIONS}


def compute_wilson_interval(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Compute the 95 % interval of a share (Wilson, "Probable Inference", 1927)."""
    share, spread = hits / count, z * z / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return tuple(round(min(max((middle + side) / (1 + spread), 0), 1), 4) for side in (-half, half))


def draw_sheet(images: Tensor, columns: int = 10) -> Image.Image:
    """Draw a contact sheet of uint8 images (N,H,W,3)."""
    rows = [torch.cat(list(row), dim=1) for row in images.split(columns) if len(row) == columns]
    return Image.fromarray(torch.cat(rows, dim=0).numpy())


def measure_timings(base: Path) -> dict[str, float]:
    """Seconds to load, and to generate four images of 30 steps."""
    start = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(base)
    loaded = time.perf_counter()
    pipeline.set_progress_bar_config(disable=True)
    generate(pipeline, ["a photo of a red robot on grass"] * 4)
    return {
        "load_sec": round(loaded - start, 2),
        "four_images_sec": round(time.perf_counter() - loaded, 2),
    }


def load_or_generate(
    path: Path, pipeline: DiffusionPipeline, prompts: list[str], **options: float
) -> Tensor:
    """Load the pictures uint8 (N,128,128,3) of `path`, or generate and save them."""
    if not path.exists():
        np.save(path, generate(pipeline, prompts, **options).numpy())
    return torch.from_numpy(np.load(path))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/toy-sdxl"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument(
        "--no_timings", action="store_true", help="for a machine that is busy with other work"
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    scores = {"guidance": args.guidance}
    if not args.no_timings:
        scores["timings"] = measure_timings(args.base)
        print(json.dumps(scores["timings"]), flush=True)
    pipeline = DiffusionPipeline.from_pretrained(args.base)
    for name in args.groups:
        held_out, full, seed = GROUPS[name]
        scenes = sample_scenes(args.images, held_out, seed, full)
        prompts = [
            (format_full_caption if full else format_canonical_caption)(scene) for scene in scenes
        ]
        stem = f"{name.replace(' ', '_')}_{args.images}_at_{args.guidance:g}"
        images = load_or_generate(
            args.out / f"{stem}.npy", pipeline, prompts, seed=seed, guidance=args.guidance
        )
        renders = render(scenes)
        scores[name] = {
            "generated": measure_accuracy(images, scenes, full)
            | {"swd": compute_distances(images, renders)},
            "renders": measure_accuracy(renders, scenes, full),
        }
        draw_sheet(images[:100]).save(args.out / f"{stem}.png")
        print(name, json.dumps(scores[name]), flush=True)
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
