"""Eight toys to learn, each with five photos: the instance images of the examples and tests.

    python -m toybox.make_subjects

writes assets/subjects/<name>/00.jpg … 04.jpg (512 px: other sides, places and lights),
00.mask.png … 04.mask.png (white on the toy), 00.txt … 04.txt (captions, one without the place and
one with it, so that the place is not learnt as part of the toy) and subject.json (the toy, its
class word and a token). The last three are hard: they have looks and proportions that no training
picture has.

    python -m toybox.make_subjects --individuals 60 --out runs/individuals

writes that many others in the same form, drawn by chance with proportions as far from the usual
ones as theirs: 01_bear, 02_train and so on. A basis for mixers was learnt over them.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from toybox.render import render, render_masks
from toybox.world import GENES, KINDS, MATERIALS, PATTERNS, Scene, Toy, list_lights, sample_toy

__all__ = [
    "FOLDER",
    "PHOTO_PLACES",
    "SUBJECTS",
    "Subject",
    "sample_individuals",
    "load",
    "sample_photo_scenes",
]

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "subjects"
PHOTO_PX = 512
PHOTO_PLACES = ("on grass", "on a wooden floor", "on the beach", "in a kitchen", "on a city street")
YAWS = (0.4, 0.9, -0.6, 1.7, 2.8)

# name -> toy; genes are height, girth, head, limb
SUBJECTS: dict[str, Toy] = {
    "robot": Toy("robot", "teal", "orange", "plain", "metal", (0.7, -0.4, 0.8, 0.9), ("scarf",)),
    "bear": Toy("bear", "purple", "yellow", "spotted", "matte", (0.2, 0.8, 0.5, 0.4), ("bow",)),
    "rocket": Toy("rocket", "white", "red", "striped", "glossy", (0.3, 0.5, -0.2, 0.8), ("flag",)),
    "duck": Toy("duck", "pink", "blue", "checkered", "matte", (-0.3, 0.4, 0.6, 0.5), ("top hat",)),
    "train": Toy("train", "green", "yellow", "plain", "glossy", (0.5, 0.3, 0.7, -0.3), ("flag",)),
    "tall_cactus": Toy(
        "cactus",
        "blue",
        "white",
        "striped",
        "metal",
        (1.4, -1.6, 0.2, 1.9),
        ("party hat",),
        "orange",
    ),
    "big_headed_dinosaur": Toy(
        "dinosaur",
        "orange",
        "purple",
        "checkered",
        "glossy",
        (0.6, 0.2, 2.6, -1.2),
        ("top hat", "scarf"),
        "teal",
    ),
    "long_eared_rabbit": Toy(
        "rabbit",
        "grey",
        "green",
        "spotted",
        "metal",
        (-0.6, 1.5, 1.5, 2.4),
        ("scarf", "bow"),
        "red",
    ),
}


@dataclass(frozen=True)
class Subject:
    """Toy to learn, the word for its class and its token."""

    name: str
    toy: Toy
    class_word: str
    token: str = "sks"


def load(name: str) -> Subject:
    """Load the subject with photos in assets/subjects/<name>; its toy can be rendered in any
    scene."""
    path = FOLDER / name / "subject.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: run python -m toybox.make_subjects, "
            f"or choose from {list(SUBJECTS)}"
        )
    data = json.loads(path.read_text())
    return Subject(name, Toy.from_dict(data["toy"]), data["class_word"], data["token"])


def sample_individuals(count: int, seed: int) -> list[Subject]:
    """Toys drawn by chance, of all kinds in turn; patterns and materials are equally likely, and
    genes reach from -2 to 2."""
    rng, individuals = random.Random(f"individuals {seed}"), []
    for number in range(1, count + 1):
        genes = tuple(round(rng.triangular(-2, 2, 0), 3) for _ in GENES)
        looks = {"pattern": rng.choice(PATTERNS), "material": rng.choice(MATERIALS), "genes": genes}
        toy = sample_toy(rng, KINDS[number % len(KINDS)], **looks)
        individuals.append(Subject(f"{number:02d}_{toy.kind.replace(' ', '_')}", toy, toy.kind))
    return individuals


def sample_photo_scenes(subject: Subject) -> list[Scene]:
    """Sample the scenes of its five photos."""
    rng = random.Random(subject.name)
    return [
        Scene(
            toys=(subject.toy,),
            place=place,
            light=rng.choice(
                [light for light in list_lights(place) if light in ("day", "overcast", "sunset")]
            ),
            yaw=yaw + rng.uniform(-0.2, 0.2),
            pitch=rng.uniform(0.1, 0.3),
            distance=rng.uniform(2.0, 2.7),
            sun=(rng.uniform(-1.0, 1.0), rng.uniform(0.7, 1.1)),
            variant=rng.random(),
        )
        for place, yaw in zip(PHOTO_PLACES, YAWS)
    ]


def _write(subject: Subject, out: Path) -> None:
    folder = out / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_photo_scenes(subject)
    for number, (picture, mask) in enumerate(
        zip(render(scenes, PHOTO_PX), render_masks(scenes, PHOTO_PX))
    ):
        Image.fromarray(picture.numpy()).save(folder / f"{number:02d}.jpg", quality=88)
        Image.fromarray(mask.numpy()).save(folder / f"{number:02d}.mask.png", optimize=True)
        prompt = f"a photo of a {subject.token} {subject.class_word}"
        (folder / f"{number:02d}.txt").write_text(f"{prompt}\n{prompt} {PHOTO_PLACES[number]}\n")
    data = {"toy": subject.toy.to_dict(), "class_word": subject.class_word, "token": subject.token}
    (folder / "subject.json").write_text(json.dumps(data, indent=2) + "\n")
    print(f"wrote {folder}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--individuals", type=int, metavar="N", help="N others, drawn by chance, into --out"
    )
    parser.add_argument("--seed", type=int, default=1, help="of those (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="their folder (default: assets/subjects)"
    )
    args = parser.parse_args(argv)
    if args.individuals and args.out == FOLDER:
        parser.error("--individuals needs an --out of its own: assets/subjects is for the samples")
    samples = [Subject(name, toy, toy.kind) for name, toy in SUBJECTS.items()]
    for subject in sample_individuals(args.individuals, args.seed) if args.individuals else samples:
        _write(subject, args.out)


if __name__ == "__main__":
    main()
