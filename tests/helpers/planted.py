"""Candidates for a folder of photos of one toy: its own other views, and planted ones that should
be rejected."""

import random
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image, ImageEnhance, ImageOps

from toybox.make_subjects import Subject, sample_photo_scenes
from toybox.render import render
from toybox.truth import sample_other_toy
from toybox.world import KINDS, PLACES, Scene, sample_scene, sample_toy

SIDE_PX = 128


@dataclass(frozen=True)
class Planted:
    """The photo, and (picture, whether it is good) in the order in which they come."""

    photo: Image.Image
    candidates: list[tuple[Image.Image, bool]]


def planted(subject: Subject, good: int = 20, wrong: int = 12, copied: int = 8) -> Planted:
    """Other views of the subject in other places; other toys, half of them of its kind; copies of
    the photo and of the good ones."""
    draws = random.Random(f"planted {subject.name}")
    places = [PLACES[number % len(PLACES)] for number in range(good)]
    views = [view_of(draws, subject.toy, place) for place in places]
    foreign = []
    for number in range(wrong):
        kind = draws.choice([kind for kind in KINDS if kind != subject.toy.kind])
        toy = sample_other_toy(subject.toy, draws) if number % 2 else sample_toy(draws, kind)
        foreign.append(view_of(draws, toy, draws.choice(PLACES)))
    photo, *pictures = pictures_of([sample_photo_scenes(subject)[0], *views, *foreign])

    # Copies come after what they are copies of.
    candidates = [(picture, True) for picture in pictures[:good]]
    for picture in pictures[good:]:
        candidates.insert(draws.randrange(len(candidates)), (picture, False))
    for number in range(copied):
        original = photo if number % 2 else pictures[draws.randrange(good)]
        candidates.append((copy_of(draws, original, number), False))
    return Planted(photo, candidates)


def view_of(draws: random.Random, toy, place: str) -> Scene:
    """The toy from any side, near or far."""
    scene = sample_scene(draws, toy, place, held_out=None)
    yaw = draws.choice((0.4, 0.9, -0.6, 1.7, 2.8, -1.5)) + draws.uniform(-0.2, 0.2)
    return replace(scene, yaw=yaw, distance=draws.uniform(1.7, 3.2))


def pictures_of(scenes: list[Scene]) -> list[Image.Image]:
    return [Image.fromarray(picture.numpy()) for picture in render(scenes, SIDE_PX)]


def copy_of(draws: random.Random, picture: Image.Image, number: int) -> Image.Image:
    """Cropped by a few percent, brighter, mirrored, or saved anew and smaller."""
    kind = number // 2 % 4
    if kind == 0:
        edge = draws.randint(2, 5)
        box = (edge, edge // 2, picture.width - edge // 2, picture.height - edge)
        return picture.crop(box).resize(picture.size, Image.Resampling.LANCZOS)
    if kind == 1:
        return ImageEnhance.Brightness(picture).enhance(draws.uniform(0.8, 1.25))
    if kind == 2:
        return ImageOps.mirror(picture)
    buffer = BytesIO()
    picture.resize((112, 112)).save(buffer, "JPEG", quality=60)
    return Image.open(buffer).convert("RGB")
