"""Damages existing files: cut, flipped, emptied, removed, filled with zeros or with noise."""

import random
import shutil
from pathlib import Path

__all__ = ["PARTS", "damage_file", "list_files", "harm_photo"]

PARTS = {
    "checkpoint": "dog/checkpoint-2/*",
    "cache": "cache/**/*.safetensors",
    "class image": "dog/class_images/*.png",
    "published files": "dog/*.safetensors",
    "metrics and configuration": "dog/*.json*",
    "card and pictures": "dog/*.[Rmp][En][Ag]*",
    "samples": "dog/samples/*",
}
"""Kind -> pattern in a home with a run that was stopped after two steps."""


def list_files(home: Path, kind: str) -> list[Path]:
    return sorted(path for path in home.glob(PARTS[kind]) if path.is_file())


def damage_file(path: Path, rng: random.Random) -> str:
    """Damage the file in a random way; returns which."""
    name, harm = rng.choice(list(HARMS.items()))
    harm(path, rng)
    return name


def cut_file(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def fill_with_zeros(path: Path, rng: random.Random) -> None:
    """Zero the end, as a file system may leave a file written just before a power failure."""
    content = path.read_bytes()
    kept_bytes = rng.randrange(max(1, len(content)))
    path.write_bytes(content[:kept_bytes] + bytes(len(content) - kept_bytes))


def fill_with_noise(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.randrange(2000)))


def lengthen_file(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(100)))


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def empty_file(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def make_loop(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


HARMS = {
    "cut": cut_file,
    "bit flipped": flip,
    "bit flipped ": flip,
    "zeros": fill_with_zeros,
    "noise": fill_with_noise,
    "longer": lengthen_file,
    "gone": remove,
    "empty": empty_file,
    "link to itself": make_loop,
}


def harm_photo(home: Path, rng: random.Random) -> str:
    """Damage or replace one photo, or remove all; or add a sidecar or another photo."""
    photos = sorted((home / "photos").glob("*.png"))
    photo = rng.choice(photos)
    choice = rng.choice(("damage", "damage", "exchange", "caption", "more", "all"))
    if choice == "damage":
        return f"{damage_file(photo, rng)} {photo.name}"
    if choice == "exchange":
        photo.write_bytes(rng.choice(photos).read_bytes())
    elif choice == "caption":
        photo.with_suffix(".txt").write_text("a photo of sks dog on the moon")
    elif choice == "more":
        shutil.copyfile(photo, photo.with_name("more.png"))
    else:
        shutil.rmtree(home / "photos")
    return f"{choice} {photo.name}"
