"""Measures how often the embedded base's CLIP reads place and light right on fresh renders.

python -m toybox.measures.surroundings --base assets/toy-sdxl --images 400
"""

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image

from dreambooth_moslora.photos.toy_readers import SurroundingsReader
from toybox.render import render
from toybox.world import Scene, sample_scene


def sample_fresh_scenes(count: int) -> list[Scene]:
    """Scenes from a seed that no training uses."""
    rng = random.Random("surroundings 0")
    return [sample_scene(rng) for _ in range(count)]


def evaluate(folder: Path, count: int) -> dict[str, float]:
    """Fractions of fresh renders whose place, light and both are right, also for pictures not in
    daylight."""
    reader, scenes = SurroundingsReader(folder), sample_fresh_scenes(count)
    rows = []
    for scene, picture in zip(scenes, render(scenes)):
        place, light = reader.read(Image.fromarray(picture.numpy()), scene.toys[0].kind)
        rows.append((place == scene.place, light == scene.light, scene.light != "day"))
    right = torch.tensor(rows)
    return {
        "place": round(float(right[:, 0].float().mean()), 4),
        "light": round(float(right[:, 1].float().mean()), 4),
        "both": round(float((right[:, 0] & right[:, 1]).float().mean()), 4),
        "light_not_day": round(float(right[right[:, 2], 1].float().mean()), 4),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=Path("assets/toy-sdxl"))
    parser.add_argument("--images", type=int, default=400, help="fresh renders to measure on")
    args = parser.parse_args(argv)
    print(json.dumps(evaluate(args.base, args.images)))


if __name__ == "__main__":
    main()
