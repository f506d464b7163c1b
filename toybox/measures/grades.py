"""Pictures of twenty prompts for eyes that do not know who drew what, and the means of the grades
that these give.

    python -m toybox.measures.grades draw OUT --base new=assets/toy-sdxl --base old=OLD/toy-sdxl
    python -m toybox.measures.grades mean OUT first.json second.json

`draw` mixes the pictures of each base with true renders of the same scenes. OUT/sheet_1.png and so
on show twenty pictures each, at twice their size, with a number and what was asked for;
OUT/key.json tells who drew which. The prompts and seeds are fixed: eight of seen combinations, six
of held-out ones, six that name a pattern or an ornament.

A grader sees the sheets only, and writes {"1": 4, …}: 5, nothing to complain of; 4, one small flaw;
3, a flaw that is seen at once; 2, hard to recognise or a part of the prompt is missing; 1, not what
was asked for. `mean` prints the mean, the lowest and the highest for each source, over all graders,
and the graders' mean difference on one picture.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth_moslora.pictures import Row, draw_contact_sheet
from toybox.captions import canonical_caption, full_caption
from toybox.measures.evaluate_base import generate, scenes_for
from toybox.render import render

__all__ = ["draw", "mean", "main"]

GROUPS = ((8, False, 70_000, False), (6, True, 71_000, False), (6, False, 72_000, True))
"""How many scenes, and what `scenes_for` is told: held out, seed, and whether all is named."""
SEED, ON_A_SHEET, TILE_PX = 70_000, 20, 256
RENDERS = "renders"


def draw(
    out: Path, bases: dict[str, Path], parts: Sequence[tuple[int, bool, int, bool]] = GROUPS
) -> None:
    """OUT/sheet_N.png and OUT/key.json, {number: {"by": name, "prompt": words}}."""
    scenes, prompts = [], []
    for part in parts:
        found, caption = scenes_for(*part), full_caption if part[-1] else canonical_caption
        scenes += found
        prompts += [caption(scene) for scene in found]
    by_source = {RENDERS: render(scenes)}
    for name, base in bases.items():
        pipeline = DiffusionPipeline.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        by_source[name] = generate(pipeline, prompts, seed=SEED)
    drawn = [
        (name, i, pixels) for name, images in by_source.items() for i, pixels in enumerate(images)
    ]
    random.Random(SEED).shuffle(drawn)
    out.mkdir(parents=True, exist_ok=True)
    key = {
        number: {"by": name, "prompt": prompts[i]}
        for number, (name, i, _) in enumerate(drawn, start=1)
    }
    (out / "key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    for start in range(0, len(drawn), ON_A_SHEET):
        part = drawn[start : start + ON_A_SHEET]
        captions = tuple(
            f"{start + n}: {asked(prompts[i])}" for n, (_, i, _) in enumerate(part, start=1)
        )
        row = Row("", [Image.fromarray(pixels.numpy()) for _, _, pixels in part], captions)
        draw_contact_sheet([row], out / f"sheet_{start // ON_A_SHEET + 1}.png", tile_px=TILE_PX)


def asked(prompt: str) -> str:
    """Without the words that all prompts have: two lines under a picture hold the rest."""
    return prompt.removeprefix("a photo of ")


def mean(out: Path, graders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest grade by source. Raises ValueError if a grader left a picture
    out."""
    key = json.loads((out / "key.json").read_text(encoding="utf-8"))
    given = [json.loads(path.read_text(encoding="utf-8")) for path in graders]
    for path, grades in zip(graders, given):
        if missing := key.keys() - grades.keys():
            raise ValueError(f"{path}: no grade for {', '.join(sorted(missing, key=int))}")
    by_source = defaultdict(list)
    for number, picture in key.items():
        by_source[picture["by"]] += [grades[number] for grades in given]
    return {
        name: {"mean": round(fmean(grades), 2), "lowest": min(grades), "highest": max(grades)}
        for name, grades in by_source.items()
    }


def disagreement(graders: Sequence[Path]) -> float:
    """The mean difference of two graders on one picture."""
    given = [json.loads(path.read_text(encoding="utf-8")) for path in graders]
    return fmean(
        abs(one[number] - other[number]) for one, other in combinations(given, 2) for number in one
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing, reading = commands.add_parser("draw"), commands.add_parser("mean")
    for command in (drawing, reading):
        command.add_argument("out", type=Path, metavar="OUT")
    drawing.add_argument(
        "--base", action="append", required=True, metavar="NAME=FOLDER", help="again for another"
    )
    reading.add_argument("grades", type=Path, nargs="+", metavar="GRADES.json")
    args = parser.parse_args(argv)
    if args.command == "draw":
        draw(
            args.out,
            {name: Path(folder) for name, _, folder in (base.partition("=") for base in args.base)},
        )
        return
    for name, values in mean(args.out, args.grades).items():
        print(name, json.dumps(values))
    if len(args.grades) > 1:
        print(f"two graders differ by {disagreement(args.grades):.2f} on a picture")


if __name__ == "__main__":
    main()
