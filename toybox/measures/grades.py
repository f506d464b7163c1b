"""Pictures for eyes that do not know who drew what, and the means of the grades that these give.

    python -m toybox.measures.grades draw OUT --base new=assets/toy-sdxl --base old=OLD/toy-sdxl
    python -m toybox.measures.grades adapters OUT --runs new=runs/one_word --runs old=OLD/runs \
        --base old=OLD/toy-sdxl
    python -m toybox.measures.grades mean OUT first.json second.json

`draw` mixes the pictures of each base with true renders of the same scenes. OUT/sheet_1.png and so
on show twenty pictures each, at twice their size, with a number and what was asked for;
OUT/key.json tells who drew which. The prompts and seeds are fixed: eight of seen combinations, six
of held-out ones, six that name a pattern or an ornament.

`adapters` does so with what adapters draw of sample subjects in four places that no photo shows:
OUT/sheet_SUBJECT.png begins with a photo. Each folder of runs has one by the name of each subject.

A grader sees the sheets only, and writes {"1": 4, …}: 5, nothing to complain of; 4, one small flaw;
3, a flaw that is seen at once; 2, hard to recognise or a part of the prompt is missing; 1, not what
was asked for. Of a subject, not to look like the photo's is a flaw. `mean` prints the mean, the
lowest and the highest for each source, over all graders, and the graders' mean difference on one
picture.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth_moslora.generation.image_params import GenerationParams
from dreambooth_moslora.generation.pipeline import SubjectPipeline
from dreambooth_moslora.pictures import SheetRow, draw_contact_sheet
from dreambooth_moslora.settings.subjects import build_prompts
from toybox.captions import format_canonical_caption, format_full_caption
from toybox.make_subjects import FOLDER, load
from toybox.measures.evaluate_base import generate, sample_scenes
from toybox.render import render
from toybox.truth import sample_view

__all__ = ["PLACES", "draw", "draw_adapters", "generate_places", "main", "compute_means"]

GROUPS = ((8, False, 70_000, False), (6, True, 71_000, False), (6, False, 72_000, True))
"""How many scenes, and what `sample_scenes` is told: held out, seed, and whether all is named."""
SEED, ON_A_SHEET, TILE_PX = 70_000, 20, 256
RENDERS = "renders"
PLACES = ("in the snow", "on a purple rug", "in the desert", "on a checkered floor")
"""For adapters; no photo of a sample subject shows them."""
INFERENCE_STEPS, GUIDANCE = 30, 2.5


class GradedImage(NamedTuple):
    """Picture, the model that drew it, and its prompt."""

    by: str
    prompt: str
    picture: Image.Image


def draw(
    out: Path, bases: dict[str, Path], parts: Sequence[tuple[int, bool, int, bool]] = GROUPS
) -> None:
    """OUT/sheet_N.png and OUT/key.json, {number: {"by": name, "prompt": words}}."""
    # Scenes and their prompts, rendered and drawn by each base
    scenes, prompts = [], []
    for part in parts:
        part_scenes, caption = (
            sample_scenes(*part),
            format_full_caption if part[-1] else format_canonical_caption,
        )
        scenes += part_scenes
        prompts += [caption(scene) for scene in part_scenes]
    by_source = {RENDERS: render(scenes)}
    for name, base in bases.items():
        pipeline = DiffusionPipeline.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        by_source[name] = generate(pipeline, prompts, seed=SEED)
    entries = [
        GradedImage(name, prompt, Image.fromarray(pixels.numpy()))
        for name, images in by_source.items()
        for prompt, pixels in zip(prompts, images)
    ]
    random.Random(SEED).shuffle(entries)

    # The sheets, and who drew what
    for start in range(0, len(entries), ON_A_SHEET):
        part = dict(enumerate(entries[start : start + ON_A_SHEET], start=start + 1))
        write_sheet(part, out / f"sheet_{start // ON_A_SHEET + 1}.png")
    write_key(dict(enumerate(entries, start=1)), out)


def draw_adapters(out: Path, runs: Mapping[str, Path], bases: Mapping[str, Path]) -> None:
    """Write OUT/sheet_SUBJECT.png and OUT/key.json, as `draw` does.

    runs: name -> a folder with a run for each subject
    bases: name -> the base of its runs, if it is not the toy
    """
    pipelines = {name: SubjectPipeline.from_base(bases.get(name, "toy")) for name in runs}
    first = next(iter(runs.values()))
    subjects = sorted(path.name for path in first.iterdir() if (FOLDER / path.name).is_dir())
    numbered: dict[int, GradedImage] = {}
    for subject in subjects:
        # True renders and each source's pictures in the same places, mixed
        sample, rng = load(subject), random.Random(f"{SEED} {subject}")
        prompt = build_prompts(sample.token, sample.class_word)["instance_prompt"]
        true = render([sample_view(rng, sample.toy, place) for place in PLACES])
        entries = [
            GradedImage(RENDERS, f"{prompt} {place}", Image.fromarray(pixels.numpy()))
            for place, pixels in zip(PLACES, true)
        ]
        for name, folder in runs.items():
            pictures = generate_places(pipelines[name], folder / subject, prompt)
            entries += [
                GradedImage(name, f"{prompt} {place}", picture)
                for place, picture in zip(PLACES, pictures)
            ]
        rng.shuffle(entries)

        # One sheet a subject, begun with a photo
        part = dict(enumerate(entries, start=len(numbered) + 1))
        with Image.open(FOLDER / subject / "00.jpg") as photo:
            write_sheet(part, out / f"sheet_{subject}.png", photo.convert("RGB"))
        numbered |= part
    write_key(numbered, out)


def generate_places(pipeline: SubjectPipeline, run: Path, prompt: str) -> list[Image.Image]:
    """Generate the run's subject in PLACES, each with a fixed seed."""
    adapters = ((pipeline.load_adapter(run, run.name), 1.0),)
    pictures = []
    for seed, place in enumerate(PLACES):
        params = GenerationParams(
            f"{prompt} {place}", "", seed, INFERENCE_STEPS, GUIDANCE, adapters=adapters
        )
        (image,) = pipeline.draw(params)
        pictures.append(image.pixels)
    return pictures


def write_sheet(
    numbered: Mapping[int, GradedImage], path: Path, photo: Image.Image | None = None
) -> None:
    """Write the pictures with their numbers and prompts, after a photo of the subject."""
    images = [entry.picture for entry in numbered.values()]
    captions = [f"{number}: {clean_prompt(entry.prompt)}" for number, entry in numbered.items()]
    if photo is not None:
        images, captions = [photo, *images], ["the photo", *captions]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet([SheetRow("", images, tuple(captions))], path, tile_px=TILE_PX)


def write_key(numbered: Mapping[int, GradedImage], out: Path) -> None:
    """OUT/key.json."""
    key = {number: {"by": entry.by, "prompt": entry.prompt} for number, entry in numbered.items()}
    (out / "key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")


def clean_prompt(prompt: str) -> str:
    """Without the words that all prompts have: two lines under a picture hold the rest."""
    return prompt.removeprefix("a photo of ")


def compute_means(out: Path, graders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest grade by source. Raises ValueError if a grader left a picture
    out."""
    key = json.loads((out / "key.json").read_text(encoding="utf-8"))
    grades_by_grader = [json.loads(path.read_text(encoding="utf-8")) for path in graders]
    for path, grades in zip(graders, grades_by_grader):
        if missing := key.keys() - grades.keys():
            raise ValueError(f"{path}: no grade for {', '.join(sorted(missing, key=int))}")
    by_source = defaultdict(list)
    for number, picture in key.items():
        by_source[picture["by"]] += [grades[number] for grades in grades_by_grader]
    return {
        name: {"mean": round(fmean(grades), 2), "lowest": min(grades), "highest": max(grades)}
        for name, grades in by_source.items()
    }


def compute_disagreement(graders: Sequence[Path]) -> float:
    """Compute the mean difference of two graders on one picture."""
    grades_by_grader = [json.loads(path.read_text(encoding="utf-8")) for path in graders]
    return fmean(
        abs(first[number] - second[number])
        for first, second in combinations(grades_by_grader, 2)
        for number in first
    )


def parse_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse NAME=FOLDER arguments."""
    pairs = (argument.partition("=") for argument in arguments)
    return {name: Path(folder) for name, _, folder in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing, adapters, reading = (
        commands.add_parser(name) for name in ("draw", "adapters", "mean")
    )
    for command in (drawing, adapters, reading):
        command.add_argument("out", type=Path, metavar="OUT")
    for command in (drawing, adapters):
        command.add_argument(
            "--base",
            action="append",
            required=command is drawing,
            default=[],
            metavar="NAME=FOLDER",
            help="again for another",
        )
    adapters.add_argument("--runs", action="append", required=True, metavar="NAME=FOLDER")
    reading.add_argument("grades", type=Path, nargs="+", metavar="GRADES.json")
    args = parser.parse_args(argv)
    if args.command == "draw":
        draw(args.out, parse_folders(args.base))
        return
    if args.command == "adapters":
        draw_adapters(args.out, parse_folders(args.runs), parse_folders(args.base))
        return
    for name, values in compute_means(args.out, args.grades).items():
        print(name, json.dumps(values))
    if len(args.grades) > 1:
        print(f"two graders differ by {compute_disagreement(args.grades):.2f} on a picture")


if __name__ == "__main__":
    main()
