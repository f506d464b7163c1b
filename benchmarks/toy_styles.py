"""Two styles of the toy world, each learnt from eight pictures: its score and its leak beside the
truth.

    python -m benchmarks.toy_styles [--out runs/styles]    # half an hour of one core

Each style is learnt twice by the command as a user types it: from eight toys, and from eight
pictures of one white rocket, which then leaks. `evaluate` scores the runs. Then the prompts of a
style are drawn at several scales of the adapter. A style of the toy world is a change of the whole
picture that leaves what has it already nearly as it is. So the truth is how much less the change
alters a picture than it alters the base's: 0 is the base, 1 what it would not alter at all.
Spearman's correlation of the style score with it is printed, and a sheet of the pictures is made. A
run already in `--out` is not trained again.
"""

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.one_word import run_command
from dreambooth_moslora.disk.run_folder import RunDir
from dreambooth_moslora.evaluation.metrics import Encoders, load_encoders, style_share
from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.settings.subject_kinds import OF_A_STYLE
from dreambooth_moslora.settings.toy_bases import UNRELATED
from toybox.measures.look_alikes import spearman
from toybox.render import render
from toybox.styles import STYLES
from toybox.world import KINDS, PLACES, Toy, sample_scene, sample_toy

__all__ = ["main"]

PHOTOS = 8
PHOTO_PX = 256
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1)
# What stands in every picture of a style that leaks
PLANTED = Toy("rocket", "white", "red", "striped", "glossy")
CONTENTS = ("many", "rocket")


@dataclass(frozen=True)
class Result:
    """Of one run: the scores of `evaluate`, and the correlation with the truth."""

    style: str  # with its interval, as the others
    leak: str
    leak_base: str
    leaked: str
    truth: float  # of the pictures at scale 1
    correlation: float  # NaN where the style has no score


def write_photos(folder: Path, style: str, content: str) -> None:
    """Eight pictures with captions, of different toys or of the planted one."""
    rng = random.Random(f"{style} {content}")
    folder.mkdir(parents=True, exist_ok=True)
    places = rng.sample(list(PLACES), PHOTOS)
    kinds = rng.sample(KINDS, PHOTOS)
    toys = [PLANTED] * PHOTOS if content == "rocket" else [sample_toy(rng, kind) for kind in kinds]
    scenes = [sample_scene(rng, toy, place, held_out=None) for toy, place in zip(toys, places)]
    for number, (scene, image) in enumerate(zip(scenes, render(scenes, PHOTO_PX))):
        toy = scene.toys[0]
        said = f"a photo of a {toy.colour} {toy.kind} {scene.place} in {style} style"
        Image.fromarray(STYLES[style](image).numpy()).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(said, encoding="utf-8")


def trained(out: Path, style: str, content: str) -> Path:
    """The run's folder, with its evaluation."""
    name = f"{style}_{content}"
    run = out / f"run_{name}"
    if not (out / name).is_dir():
        write_photos(out / name, style, content)
    if not RunDir(run).adapter_path.is_file():
        flags = ("--base", "toy", "--subject", "style", "--output_dir", str(run))
        run_command("train", str(out / name), style, *flags)
    if not scores_of(run).is_file():
        run_command("evaluate", str(run))
    return run


def scores_of(run: Path) -> Path:
    return run / "evaluation" / "scores.json"


def drawn(pipeline: SubjectPipeline, run: Path, style: str) -> list[list[Image.Image]]:
    """The prompts of a style at each scale, with the same seeds."""
    adapter = pipeline.load_adapter(run)
    found = []
    for scale in SCALES:
        pictures = []
        for text, kind in UNRELATED:
            prompt = text.format(kind) + OF_A_STYLE.format(style)
            for seed in SEEDS:
                params = GenerationParams(prompt, seed=seed, adapters=((adapter, scale),))
                pictures += [image.pixels for image in pipeline.draw(params)]
        found.append(pictures)
    return found


def alterations(pictures: list[Image.Image], style: str) -> np.ndarray:
    """How much the style would still alter each picture, (N,): the median over its values, as
    outlines are drawn around outlines too."""
    found = []
    for picture in pictures:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
        found.append((STYLES[style](pixels).float() - pixels.float()).abs().median().item())
    return np.array(found)


def measured(
    pipeline: SubjectPipeline, encoders: Encoders, out: Path, style: str, content: str
) -> Result:
    """The figures of one run; its pictures become a sheet."""
    run = trained(out, style, content)
    by_scale = drawn(pipeline, run, style)
    sheet(by_scale).save(out / f"{style}_{content}.jpg", quality=90)

    # Both measures of every picture, with the base's as their zero
    photos = [
        Image.open(path).convert("RGB") for path in sorted((out / run.name[4:]).glob("*.png"))
    ]
    look = encoders.style_images
    base, *_ = by_scale
    pictures = [picture for row in by_scale for picture in row]
    scores = style_share(look(pictures), look(base), look(photos))
    truth = 1 - alterations(pictures, style) / alterations(base, style).mean()

    said = json.loads(scores_of(run).read_text(encoding="utf-8"))
    intervals = {"style": "none"}
    for name in {"style", "leak", "leak_base"} & said["scores"].keys():
        intervals[name] = "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**said["scores"][name])
    return Result(
        **intervals,
        leaked=said["leaked"] or "none",
        truth=float(truth[-len(base) :].mean()),
        correlation=math.nan if scores is None else spearman(scores.numpy(), truth),
    )


def sheet(by_scale: list[list[Image.Image]]) -> Image.Image:
    """A row for each scale, the first seed of each prompt."""
    rows = [pictures[:: len(SEEDS)] for pictures in by_scale]
    side = rows[0][0].width
    found = Image.new("RGB", (len(rows[0]) * side, len(rows) * side))
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            found.paste(picture, (left * side, top * side))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/styles"))
    args = parser.parse_args(argv)
    encoders = load_encoders("toy")
    print("| style, pictures of | style | truth | correlation | leak | base's leak | named |")
    print(f"|{'---|' * 7}")
    for style in STYLES:
        for content in CONTENTS:
            pipeline = SubjectPipeline.from_base("toy")
            found = measured(pipeline, encoders, args.out, style, content)
            cells = (
                f"{style}, {content}",
                found.style,
                f"{found.truth:.2f}",
                f"{found.correlation:.2f}",
                found.leak,
                found.leak_base,
                found.leaked,
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
