"""Make the sample photos as a person would have them: of different shapes, without captions, with
masks made by `check`.

    python -m tools.bare_photos --out runs/bare_photos              # for assets/studies/photos.toml
    python -m tools.bare_photos --captions --out runs/bare_prompt   # with captions by `caption`

Every second photo is cut to 4:3, the others to 3:4, around the middle of the subject.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

__all__ = ["crop_strip", "main"]

PHOTOS = Path("assets/subjects")
SUBJECTS = ("bear", "rocket", "long_eared_rabbit")


def crop_strip(photo: Image.Image, mask: Image.Image, wide: bool) -> Image.Image:
    """4:3 or 3:4 of a square photo: the strip whose middle is nearest to the middle of the mask's
    white part."""
    side, short = photo.width, photo.width * 3 // 4
    left_px, top, right, bottom = mask.getbbox() or (0, 0, side, side)
    middle = (top + bottom) // 2 if wide else (left_px + right) // 2
    start = min(max(0, middle - short // 2), side - short)
    return photo.crop((0, start, side, start + short) if wide else (start, 0, start + short, side))


def write(subject: str, folder: Path, captions: bool = False) -> None:
    """Photos and what the toy is, for the true renders; then the masks, and captions that each name
    a place."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(PHOTOS / subject / "subject.json", folder)
    for number, path in enumerate(sorted((PHOTOS / subject).glob("*.jpg"))):
        mask = Image.open(path.with_suffix(".mask.png")).convert("L")
        crop_strip(Image.open(path), mask, wide=number % 2 == 0).save(
            folder / path.name, quality=90
        )
    facts = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    run("check", str(folder), facts["class_word"], "--make_masks", "--no_picture")
    if captions:
        run("caption", str(folder), "--subject", f"{facts['token']} {facts['class_word']}")


def run(*command: str) -> None:
    """Run a command of the package on the embedded base."""
    base = ("--pretrained_model_name_or_path", "toy")
    subprocess.run([sys.executable, "-m", "dreambooth_moslora", *command, *base], check=True)


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--out", type=Path, default=Path("runs/bare_photos"))
    options.add_argument("--subjects", nargs="+", default=SUBJECTS)
    options.add_argument("--captions", action="store_true")
    args = options.parse_args(arguments)
    for subject in args.subjects:
        write(subject, args.out / subject, args.captions)


if __name__ == "__main__":
    main()
