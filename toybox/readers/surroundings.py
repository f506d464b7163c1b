"""Reads a toy's place and light from a picture by the embedded base's own CLIP, zero shot.

    reader = surroundings.load(folder)   # assets/toy-sdxl
    reader.read(image, "duck")           # ("on the beach", "sunset")

It chooses the place and light whose caption's vector has the largest cosine to the picture's.

    python -m toybox.readers.surroundings --base assets/toy-sdxl --images 400

measures how often place and light are right on fresh renders.
"""

import argparse
import json
import random
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from toybox.captions import LIGHT_PHRASES
from toybox.drawing.places import PLACES, lights_of
from toybox.render import render
from toybox.world import Scene, sample_scene

__all__ = ["SurroundingsReader", "load", "phrase"]

SURROUNDINGS = tuple((place, light) for place in PLACES for light in lights_of(place))


def phrase(place: str, light: str) -> str:
    """The words of a caption: "on the beach at sunset"; daylight adds none."""
    return f"{place} {LIGHT_PHRASES[light]}".strip()


class SurroundingsReader:
    """Both towers of the CLIP inside a diffusers folder, fp32."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        options = {"dtype": torch.float32}
        self.vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", **options)
        self.text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **options)
        self.processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        self.device = device
        for tower in (self.vision, self.text):
            tower.requires_grad_(False).eval().to(device)
        self.vectors = cache(self._vectors)

    def _vectors(self, kind: str) -> Tensor:
        """Unit vectors (S, P) of a caption for each of the S surroundings."""
        captions = [f"a photo of a {kind} {phrase(*found)}" for found in SURROUNDINGS]
        words = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return normalize(self.text(words.input_ids.to(self.device)).text_embeds, dim=-1)

    @torch.no_grad()
    def read(self, image: Image.Image, kind: str = "toy") -> tuple[str, str]:
        """Place and light of an RGB picture of any size that shows a `kind`."""
        pixels = self.processor(image, return_tensors="pt").pixel_values
        seen = normalize(self.vision(pixels.to(self.device)).image_embeds, dim=-1)
        return SURROUNDINGS[int((self.vectors(kind) @ seen[0]).argmax())]


def load(folder: Path, device: torch.device | str = "cpu") -> SurroundingsReader:
    """The reader of a base that has its own CLIP."""
    return SurroundingsReader(Path(folder), device)


def fresh_scenes(count: int) -> list[Scene]:
    """Scenes from a seed that no training uses."""
    rng = random.Random("surroundings 0")
    return [sample_scene(rng) for _ in range(count)]


def evaluate(folder: Path, count: int) -> dict[str, float]:
    """Fractions of fresh renders whose place, light and both are right, also for pictures not in daylight."""
    reader, scenes = load(folder), fresh_scenes(count)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("assets/toy-sdxl"))
    parser.add_argument("--images", type=int, default=400, help="fresh renders to measure on")
    args = parser.parse_args(argv)
    print(json.dumps(evaluate(args.base, args.images)))


if __name__ == "__main__":
    main()
